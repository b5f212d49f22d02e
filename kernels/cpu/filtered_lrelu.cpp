// The filtered leaky ReLU on the CPU: up-sampling, activation and down-sampling in one pass. The up-sampled image exists
// only as a few rows at a time.
//
// One function computes the operation and all of its derivatives. Stage 1 up-samples by `up` and filters; then values at
// the temporary rate ("mid") are activated, or multiplied by the slopes of an earlier activation; stage 2 filters and
// keeps every down-th value. The gradient is the same with the stages exchanged. The slopes are stored in two bits.
//
// Each row passes through the following steps: filtering along x (stage 1), along y, activation, along y (stage 2),
// along x. In channels_last, a vector holds neighbouring channels of a pixel. Otherwise it holds neighbouring columns:
// so that they are contiguous both before and after a change of the rate, rows are split into phases, and phase p of a
// row at the temporary rate has the columns p, p + P, p + 2P, ... with P = max(up, down). With this, both layouts use
// the same loops. Filters that are not separable are applied as one filter along x for each of their rows.

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "parallel.h"
#include "shape.h"
#include "vectors.h"

namespace spg {
namespace {

enum Mode : int { kPlain, kRecord, kMasked };  // activate; activate and store the slopes; multiply by stored slopes

constexpr int64_t kMidColumns = 1024, kMidPixels = 128;  // columns at the temporary rate that a task processes at once
constexpr int64_t kTasks = 64, kFewestRows = 32;         // rows are divided if there are fewer tasks than this
constexpr int kTogether = 4;                             // vectors that are computed together; also those of a block of slopes

struct Axis {
  int64_t in, mid, out, pad1, pad2;
};
template <class A>
struct Filter {
  int kh, kw;
  bool separable;
  std::vector<A> x, y;  // the factors of a separable filter, otherwise x is [kh, kw]; in the orientation of a correlation
};

template <class A>
Filter<A> prepare(const float* f, int kh, int kw, bool separable, bool correlate, double gain) {
  Filter<A> out{kh, kw, separable, {}, {}};
  const int count = separable ? kw : kh * kw;
  for (int i = 0; i < count; i++) {
    const float tap = f[correlate ? i : count - 1 - i];
    out.x.push_back(separable ? A(tap) : A(tap * gain));
    if (separable) out.y.push_back(A(tap * gain));
  }
  return out;
}

// A number that is added to an output: a tap times the value at an offset from the output's position.
template <class A>
struct Term {
  A tap;
  int64_t at;
};
template <class A>
using Terms = std::vector<Term<A>>;

// The part [ox0, ox1) of the outputs of a row, and what it needs. q counts groups of P columns at the temporary rate.
struct Segment {
  int64_t ox0, ox1;
  int64_t q0, blocks;       // the first group, which begins a block of slopes, and the number of blocks
  int64_t own0, own1;       // the blocks whose slopes this segment stores
  int64_t a0, inputs;       // the first group of input columns, and the number of groups
};

template <class T, class A>
struct Job {
  static constexpr int L = kLanes<A>;
  int64_t n, c;
  Axis x, y;
  int up, down;
  bool last;  // channels_last
  A gain, slope, clamp;
  const T* from;
  T* to;
  uint8_t* slopes;
  const A* bias;
  Filter<A> f1, f2;

  // What follows from the above.
  int P, PI, PO;                        // phases at the temporary rate, of the input, and of the output
  int64_t block;                        // columns at the temporary rate of a block of slopes
  std::vector<Terms<A>> terms1, terms2; // for each filter row and phase
  int64_t near1, far1, near2, far2;     // the range of groups that outputs of group 0 reach
  std::vector<Segment> segments;
  int64_t si, sx, sm, so, margin;       // lengths of a phase: input, filtered input, temporary rate, output; zeros before it
  int ring1, ring2;                     // rows that are kept
  int64_t row_bytes, plane_bytes;       // of slopes

  // The position of group q of phase p in a row with phases of length `s`. All phases of a group are neighbours in
  // channels_last.
  int64_t position(int64_t p, int64_t q, int64_t s, int64_t phases) const { return last ? (q * phases + p) * L : p * s + q; }
  int64_t length(int64_t s, int64_t phases) const { return last ? s * phases * L : s * phases; }
};

inline int64_t modulo(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Calls found(phase, tap, phase of the source, group) for all taps that meet a value and not an inserted zero. An
// output of phase p and group 0 begins at p * step - pad, in units in which every `every`-th value of the source exists.
template <class F>
void for_taps(int phases, int step, int every, int source_phases, int64_t pad, int taps, const F& found) {
  for (int p = 0; p < phases; p++)
    for (int k = 0; k < taps; k++) {
      const int64_t t = p * step + k - pad;
      if (modulo(t, every)) continue;
      const int64_t i = floor_div(t, every);
      found(p, k, modulo(i, source_phases), floor_div(i, source_phases));
    }
}

template <class T, class A>
void plan(Job<T, A>& j, bool record) {
  constexpr int L = Job<T, A>::L;
  j.P = std::max(j.up, j.down), j.PI = j.P / j.up, j.PO = j.P / j.down;
  j.block = j.last ? kTogether : kTogether * L;
  j.near1 = j.near2 = std::numeric_limits<int64_t>::max() / 4, j.far1 = j.far2 = -j.near1;
  for_taps(j.P, 1, j.up, j.PI, j.x.pad1, j.f1.kw, [&](int, int, int64_t, int64_t q) {
    j.near1 = std::min(j.near1, q), j.far1 = std::max(j.far1, q);
  });
  for_taps(j.PO, j.down, 1, j.P, j.x.pad2, j.f2.kw, [&](int, int, int64_t, int64_t q) {
    j.near2 = std::min(j.near2, q), j.far2 = std::max(j.far2, q);
  });
  if (j.near1 > j.far1) j.near1 = j.far1 = 0;

  const int64_t most = std::max<int64_t>(1, (j.last ? kMidPixels : kMidColumns) / j.down / j.PO) * j.PO;
  j.si = j.sx = j.so = j.margin = 0;
  int64_t behind = 0;
  for (int64_t ox0 = 0; ox0 < j.x.out; ox0 += most) {
    Segment s{ox0, std::min(ox0 + most, j.x.out), 0, 0, 0, 0, 0, 0};
    auto first = [&](int64_t ox) { return ox == 0 && record ? 0 : std::clamp<int64_t>(ox * j.down - j.x.pad2, 0, j.x.mid); };
    const bool at_end = s.ox1 == j.x.out && record;
    const int64_t end = at_end ? j.x.mid : std::min(j.x.mid, (s.ox1 - 1) * j.down - j.x.pad2 + j.f2.kw);
    s.own0 = first(ox0) / j.block, s.q0 = s.own0 * j.block / j.P;
    s.blocks = std::max<int64_t>(0, (end + j.block - 1) / j.block - s.own0);
    s.own1 = s.ox1 == j.x.out ? s.own0 + s.blocks : first(s.ox1) / j.block;
    const int64_t groups = s.blocks * j.block / j.P, g0 = ox0 / j.PO;
    const int64_t outputs = round_up((s.ox1 - s.ox0 + j.PO - 1) / j.PO, j.last ? 1 : L);
    s.a0 = s.q0 + j.near1, s.inputs = j.far1 - j.near1 + groups;
    j.si = std::max(j.si, round_up(s.inputs, L)), j.sx = std::max(j.sx, groups), j.so = std::max(j.so, outputs);
    j.margin = std::max(j.margin, s.q0 - (g0 + j.near2));
    behind = std::max(behind, std::max(groups, g0 + j.far2 + outputs - s.q0));
    j.segments.push_back(s);
  }
  j.margin = round_up(j.margin, L);
  j.sm = round_up(j.margin + behind, L);

  const int rows1 = j.f1.separable ? 1 : j.f1.kh, rows2 = j.f2.separable ? 1 : j.f2.kh;
  j.terms1.resize(rows1 * j.P), j.terms2.resize(rows2 * j.PO);
  for (int ky = 0; ky < rows1; ky++)
    for_taps(j.P, 1, j.up, j.PI, j.x.pad1, j.f1.kw, [&](int p, int k, int64_t phase, int64_t q) {
      j.terms1[ky * j.P + p].push_back({j.f1.x[ky * j.f1.kw + k], j.position(phase, q - j.near1, j.si, j.PI)});
    });
  for (int ky = 0; ky < rows2; ky++)
    for_taps(j.PO, j.down, 1, j.P, j.x.pad2, j.f2.kw, [&](int p, int k, int64_t phase, int64_t q) {
      j.terms2[ky * j.PO + p].push_back({j.f2.x[ky * j.f2.kw + k], j.position(phase, q, j.sm, j.P)});
    });
  j.ring1 = j.f1.kh / j.up + 2, j.ring2 = j.f2.kh;
  const int64_t blocks = (j.x.mid + j.block - 1) / j.block;
  j.row_bytes = blocks * L, j.plane_bytes = j.y.mid * j.row_bytes;
}

// Computes `count` vectors: to[v * to_step] = the sum over rows r and terms t of tap * from[r][v * from_step + at].
template <class A>
void along_x(A* __restrict to, int64_t to_step, const A* const* from, int64_t from_step, const Terms<A>* terms,
             int64_t terms_step, int rows, int64_t count) {
  int64_t v = 0;
  auto run = [&](auto together) __attribute__((always_inline)) {
    constexpr int n = decltype(together)::value;
    for (; v + n <= count; v += n) {
      Pack<A> sum[n] = {};
      for (int r = 0; r < rows; r++) {
        const A* __restrict row = from[r] + v * from_step;
        for (const Term<A>& term : terms[r * terms_step]) {
          const A* __restrict p = row + term.at;
          for (int i = 0; i < n; i++) sum[i] += term.tap * load_pack(p + i * from_step);
        }
      }
      for (int i = 0; i < n; i++) store_pack(to + (v + i) * to_step, sum[i]);
    }
  };
  run(std::integral_constant<int, kTogether>());
  run(std::integral_constant<int, 1>());
}

// Computes `count` vectors: to = the sum over rows of tap * row.
template <class A>
void along_y(A* __restrict to, const A* const* rows, const A* taps, int number, int64_t count) {
  constexpr int L = kLanes<A>;
  int64_t v = 0;
  auto run = [&](auto together) __attribute__((always_inline)) {
    constexpr int n = decltype(together)::value;
    for (; v + n <= count; v += n) {
      Pack<A> sum[n] = {};
      for (int r = 0; r < number; r++)
        for (int i = 0; i < n; i++) sum[i] += taps[r] * load_pack(rows[r] + (v + i) * L);
      for (int i = 0; i < n; i++) store_pack(to + (v + i) * L, sum[i]);
    }
  };
  run(std::integral_constant<int, kTogether>());
  run(std::integral_constant<int, 1>());
}

// Slopes: 0 for z > 0, 1 for the leaky side, 2 where the clamp limits the value. Lane i of vector v of a block is bits 2v
// and 2v + 1 of byte i.
template <class A>
struct Codes {
  typedef typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type Int;
  typedef Int Ints __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
};

template <int mode, class A>
SPG_INLINE void activate(Pack<A>* z, uint8_t* at, bool write, A gain, A slope, A clamp) {
  using Ints = typename Codes<A>::Ints;
  using Bytes = typename Codes<A>::Bytes;
  const Pack<A> zero = {}, top = zero + clamp, bottom = zero - clamp;
  Ints packed = {};
  if constexpr (mode == kMasked) {
    Bytes bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    packed = __builtin_convertvector(bytes, Ints);
  }
  for (int v = 0; v < kTogether; v++) {
    if constexpr (mode == kMasked) {
      const Pack<A> d = ((packed >> (2 * v)) & 1) != 0 ? zero + gain * slope : zero + gain;
      z[v] = ((packed >> (2 * v)) & 2) != 0 ? zero : z[v] * d;
      continue;
    }
    const Pack<A> y = (z[v] < zero ? z[v] * slope : z[v]) * gain;
    const auto above = y > top, below = y < bottom;
    if constexpr (mode == kRecord) {
      const Ints one = Ints{} + 1, none = {};
      packed |= ((above | below) ? one + one : (z[v] > zero ? none : one)) << (2 * v);
    }
    z[v] = above ? top : below ? bottom : y;  // NaN stays NaN
  }
  if constexpr (mode == kRecord) {
    const Bytes bytes = __builtin_convertvector(packed, Bytes);
    if (write) std::memcpy(at, &bytes, sizeof bytes);
  }
}

template <int mode, class T, class A>
struct Worker {
  static constexpr int L = kLanes<A>;
  const Job<T, A>& j;
  const Segment& s;
  int64_t plane, channels;  // the plane, or the sample and the first of the channels; how many channels
  int64_t channel, sample;
  std::vector<A> memory;
  A *input, *ring1, *ring2, *row, *out;
  int64_t input_length, ring1_length, mid_length;
  std::vector<const A*> rows, begins;

  Worker(const Job<T, A>& j_, const Segment& s_, int64_t sample_, int64_t channel_)
      : j(j_), s(s_), channels(j_.last ? std::min<int64_t>(L, j_.c - channel_) : 1), channel(channel_), sample(sample_) {
    input_length = j.length(j.si, j.PI), mid_length = j.length(j.sm, j.P);
    ring1_length = j.f1.separable ? j.length(j.sx, j.P) : input_length;
    const int64_t rest = j.length(j.sx, j.P) + mid_length + j.length(j.so, j.PO);
    memory.resize(input_length + j.ring1 * ring1_length + j.ring2 * mid_length + rest + L);
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
    input = reinterpret_cast<A*>(begin);
    ring1 = input + input_length;
    ring2 = ring1 + j.ring1 * ring1_length;
    row = ring2 + j.ring2 * mid_length;      // a filtered row at the temporary rate; with zeros around it
    out = row + mid_length + j.length(j.sx, j.P);
    rows.resize(std::max(j.ring1, j.ring2) + 1);
    begins.resize(rows.size());
  }

  A* before() { return row + mid_length; }  // a row at the temporary rate before the activation, of filters that are not separable

  // Loads the input row iy, with the bias and with zeros where the image has no columns.
  void load_row(int64_t iy, A* to) const {
    const int64_t w = j.x.in, begin = s.a0 * j.PI;
    if (j.last) {
      const T* from = j.from + (sample * j.y.in + iy) * w * j.c + channel;
      Pack<A> bias = {};
      if (j.bias) bias = load_pack(j.bias + channel, channels);
      for (int64_t i = 0; i < s.inputs * j.PI; i++) {
        const bool inside = begin + i >= 0 && begin + i < w;
        store_pack(to + i * L, inside ? load_pack(from + (begin + i) * j.c, channels) + bias : Pack<A>{});
      }
      return;
    }
    const T* from = j.from + ((sample * j.c + channel) * j.y.in + iy) * w;
    const A bias = j.bias ? j.bias[channel] : A(0);
    for (int b = 0; b < j.PI; b++, to += j.si) {
      // The groups whose columns PI * a + b are inside.
      const int64_t first = std::clamp(-floor_div(begin + b, j.PI), int64_t(0), s.inputs);
      const int64_t end = std::clamp(floor_div(w - 1 - b - begin, j.PI) + 1, first, s.inputs);
      std::fill(to, to + first, A(0));
      std::fill(to + end, to + j.si, A(0));
      const T* __restrict p = from + begin + b;
      A* __restrict q = to;
      if (j.PI == 1) {
#pragma omp simd
        for (int64_t a = first; a < end; a++) q[a] = load(p[a]) + bias;
      } else {
        for (int64_t a = first; a < end; a++) q[a] = load(p[a * j.PI]) + bias;
      }
    }
  }

  int64_t groups() const { return s.blocks * j.block / j.P; }

  // Filters rows along x to the temporary rate. Columns behind its end become zero.
  void to_mid(A* to, const A* const* from, const Terms<A>* terms, int64_t terms_step, int number) const {
    for (int p = 0; p < j.P; p++) {
      if (j.last) along_x(to + p * L, j.P * L, from, j.PI * L, terms + p, terms_step, number, groups());
      else along_x(to + p * j.sx, L, from, L, terms + p, terms_step, number, groups() / L);
    }
    const int64_t rest = j.x.mid - s.q0 * j.P;  // columns before the end
    if (rest >= s.blocks * j.block) return;
    if (j.last) std::fill(to + rest * L, to + s.blocks * j.block * L, A(0));
    for (int p = 0; p < j.P && !j.last; p++)
      std::fill(to + p * j.sx + std::max<int64_t>(0, (rest - p + j.P - 1) / j.P), to + p * j.sx + groups(), A(0));
  }

  // Computes row m at the temporary rate, from the rows in the first ring.
  void mid_row(int64_t m, int64_t& loaded, bool own) {
    const int64_t q = m - j.y.pad1, begin = std::max<int64_t>(0, -floor_div(-q, j.up));
    const int64_t end = std::min(j.y.in, floor_div(q + j.f1.kh - 1, j.up) + 1);
    loaded = std::max(loaded, begin);
    for (; loaded < end; loaded++) {
      A* const to = ring1 + loaded % j.ring1 * ring1_length;
      load_row(loaded, j.f1.separable ? input : to);
      const A* const from = input;
      if (j.f1.separable) to_mid(to, &from, j.terms1.data(), 0, 1);
    }
    int number = 0;
    for (int64_t iy = begin; iy < end; iy++) rows[number++] = ring1 + iy % j.ring1 * ring1_length;
    const int64_t k0 = begin * j.up - q;
    A taps[64];  // of the rows, which are every up-th of at most 64 taps
    if (j.f1.separable)
      for (int r = 0; r < number; r++) taps[r] = j.f1.y[k0 + r * j.up];
    if (!j.f1.separable) {
      to_mid(before(), rows.data(), j.terms1.data() + (number ? k0 * j.P : 0), int64_t(j.up) * j.P, number);
      rows[0] = before(), taps[0] = 1, number = 1;
    }
    A* const to = ring2 + m % j.ring2 * mid_length + j.position(0, j.margin, j.sm, j.P);
    const int64_t each = kTogether / j.P;  // vectors of a phase in a block
    uint8_t* slopes = nullptr;
    if (mode != kPlain) {
      const int64_t chunks = (j.c + L - 1) / L;
      const int64_t index = j.last ? (sample * chunks + channel / L) : sample * j.c + channel;
      slopes = j.slopes + index * j.plane_bytes + m * j.row_bytes + s.q0 * j.P / j.block * L;
    }
    for (int64_t b = 0; b < s.blocks; b++) {
      Pack<A> z[kTogether] = {};
      int64_t at[kTogether], target[kTogether];
      for (int v = 0; v < kTogether; v++) {
        const int64_t p = v / each, i = (b * each + v % each) * L;
        at[v] = j.last ? (b * kTogether + v) * L : p * j.sx + i;
        target[v] = j.last ? at[v] : p * j.sm + i;
      }
      for (int r = 0; r < number; r++)
        for (int v = 0; v < kTogether; v++) z[v] += taps[r] * load_pack(rows[r] + at[v]);
      const bool write = own && s.q0 * j.P / j.block + b < s.own1;
      activate<mode>(z, mode == kPlain ? nullptr : slopes + b * L, write, j.gain, j.slope, j.clamp);
      for (int v = 0; v < kTogether; v++) store_pack(to + target[v], z[v]);
    }
  }

  // Computes the output rows [oy0, oy1), and adds them to `sums` if it is not null.
  void run(int64_t oy0, int64_t oy1, double* sums) {
    auto first = [&](int64_t oy) { return std::clamp<int64_t>(oy * j.down - j.y.pad2, 0, j.y.mid); };
    int64_t mid = first(oy0), loaded = 0;
    const int64_t own = oy1 == j.y.out ? j.y.mid : first(oy1);
    for (int64_t oy = oy0; oy < oy1; oy++) {
      const int64_t q = oy * j.down - j.y.pad2, begin = first(oy), end = std::clamp<int64_t>(q + j.f2.kh, 0, j.y.mid);
      for (; mid < end; mid++) mid_row(mid, loaded, mid < own);
      int number = 0;
      for (int64_t m = begin; m < end; m++) rows[number++] = ring2 + m % j.ring2 * mid_length;
      const int64_t k0 = begin - q;
      const A* const filtered = row;
      if (j.f2.separable) {
        std::copy(rows.begin(), rows.begin() + number, begins.begin());
        for (int p = 0; p < (j.last ? 1 : j.P); p++) {
          const int64_t at = j.last ? j.position(0, j.margin, j.sm, j.P) : p * j.sm + j.margin;
          for (int r = 0; r < number; r++) rows[r] = begins[r] + at;
          along_y(row + at, rows.data(), j.f2.y.data() + (number ? k0 : 0), number, s.blocks * kTogether / (j.last ? 1 : j.P));
        }
      }
      const int64_t shift = j.position(0, j.margin + s.ox0 / j.PO - s.q0, j.sm, j.P);
      const int number2 = j.f2.separable ? 1 : number;
      if (j.f2.separable) rows[0] = filtered;
      for (int r = 0; r < number2; r++) rows[r] += shift;
      const Terms<A>* terms = j.terms2.data() + (j.f2.separable || !number ? 0 : k0 * j.PO);
      const int64_t outputs = (s.ox1 - s.ox0 + j.PO - 1) / j.PO;
      for (int p = 0; p < j.PO; p++) {
        if (j.last) along_x(out + p * L, j.PO * L, rows.data(), j.P * L, terms + p, j.PO, number2, outputs);
        else along_x(out + p * j.so, L, rows.data(), L, terms + p, j.PO, number2, round_up(outputs, L) / L);
      }
      store_row(oy, sums);
    }
    if (mode == kRecord)
      for (; mid < own; mid++) mid_row(mid, loaded, true);  // rows that no output uses
  }

  void store_row(int64_t oy, double* sums) const {
    const int64_t width = s.ox1 - s.ox0;
    if (j.last) {
      T* to = j.to + ((sample * j.y.out + oy) * j.x.out + s.ox0) * j.c + channel;
      Pack<A> sum = {};
      for (int64_t i = 0; i < width; i++) {
        const Pack<A> v = load_pack(out + i * L);
        store_pack(to + i * j.c, v, channels);
        sum += v;
      }
      if (sums)
        for (int i = 0; i < channels; i++) sums[i] += sum[i];
      return;
    }
    T* __restrict to = j.to + ((sample * j.c + channel) * j.y.out + oy) * j.x.out + s.ox0;
    const A* __restrict from = out;
    if (j.PO == 1) {
#pragma omp simd
      for (int64_t i = 0; i < width; i++) store(to + i, from[i]);
    } else if (j.PO == 2) {
      for (int64_t i = 0; i < width / 2; i++) {
        store(to + 2 * i, from[i]);
        store(to + 2 * i + 1, from[j.so + i]);
      }
      if (width % 2) store(to + width - 1, from[width / 2]);
    } else {
      for (int64_t i = 0; i < width; i++) store(to + i, from[i % j.PO * j.so + i / j.PO]);
    }
    if (!sums) return;
    for (int p = 0; p < j.PO; p++) {
      A lanes[L] = {};
      const int64_t count = (width - p + j.PO - 1) / j.PO;
      const A* __restrict v = out + p * j.so;
      int64_t i = 0;
      for (; i + L <= count; i += L)
#pragma omp simd
        for (int k = 0; k < L; k++) lanes[k] += v[i + k];
      for (int k = 0; i < count; i++, k++) lanes[k] += v[i];
      for (A lane : lanes) *sums += lane;
    }
  }
};

template <int mode, class T, class A>
void filtered_lrelu(const Job<T, A>& j, A* dbias) {
  constexpr int L = kLanes<A>;
  const int64_t lanes = j.last ? L : 1, chunks = (j.c + lanes - 1) / lanes;
  const int64_t segments = j.segments.size(), units = j.n * chunks * segments;
  const int64_t wanted = std::clamp<int64_t>(kTasks / units, 1, (j.y.out + kFewestRows - 1) / kFewestRows);
  const int64_t rows = (j.y.out + wanted - 1) / wanted, bands = (j.y.out + rows - 1) / rows;
  std::vector<double> sums(dbias ? units * bands * lanes : 0);
  // In channels_last neighbouring tasks read the other channels of the same pixels.
  parallel_for(units * bands, 1, [&](int64_t task) {
    const int64_t chunk = j.last ? task % chunks : task / bands / segments % chunks;
    const int64_t part = j.last ? task / chunks : task % (bands * segments), sample = task / (bands * segments * chunks);
    const int64_t segment = part / bands % segments, band = part % bands;
    Worker<mode, T, A> worker(j, j.segments[segment], sample, chunk * lanes);
    worker.run(band * rows, std::min((band + 1) * rows, j.y.out), dbias ? sums.data() + task * lanes : nullptr);
  });
  if (!dbias) return;
  std::vector<double> total(chunks * lanes);
  for (int64_t task = 0; task < units * bands; task++)
    for (int64_t i = 0; i < lanes; i++)
      total[(j.last ? task % chunks : task / bands / segments % chunks) * lanes + i] += sums[task * lanes + i];
  std::copy(total.begin(), total.begin() + j.c, dbias);
}

}  // namespace
}  // namespace spg

// Computes y [n, c, out_h, out_w] from x [n, c, h, w], both dense and in the same layout, through [mid_h, mid_w] values
// at the temporary rate. mode: 0 activation, 1 activation and recording of `slopes`, 2 multiplication by recorded
// slopes. top1 and left1 are zeros before the up-sampled image; top2 and left2 are zeros before the image at the
// temporary rate; all may be negative. The filters are float32 [k] if separable, otherwise [kh, kw], multiplied by
// gain1 and gain2, and used for correlation or convolution. bias [c] is added to x, or null. dbias [c], or null,
// becomes the sum of y; it has the accumulating format, as bias has. clamp < 0 means no clamp. Returns 0, -1 if there
// is no kernel for these arguments, or -2 if memory is short.
SPG_API int spg_filtered_lrelu_cpu(int dtype, int mode, const void* x, void* y, void* slopes, const void* bias,
                                   void* dbias, const float* f1, const float* f2, int64_t n, int64_t c, int64_t h,
                                   int64_t w, int64_t mid_h, int64_t mid_w, int64_t out_h, int64_t out_w, int64_t left1,
                                   int64_t top1, int64_t left2, int64_t top2, int up, int down, int kh1, int kw1,
                                   int separable1, int kh2, int kw2, int separable2, int channels_last, int correlate,
                                   double gain1, double gain2, double gain, double slope, double clamp) {
  using namespace spg;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulator<T>::type;
    if (n * c * out_h * out_w == 0) return 0;
    Job<T, A> j{};
    j.n = n, j.c = c, j.x = {w, mid_w, out_w, left1, left2}, j.y = {h, mid_h, out_h, top1, top2};
    j.up = up, j.down = down, j.last = channels_last != 0;
    j.gain = A(gain), j.slope = A(slope), j.clamp = clamp < 0 ? std::numeric_limits<A>::infinity() : A(clamp);
    j.from = static_cast<const T*>(x), j.to = static_cast<T*>(y), j.slopes = static_cast<uint8_t*>(slopes);
    j.bias = static_cast<const A*>(bias);
    try {
      j.f1 = prepare<A>(f1, kh1, kw1, separable1 != 0, correlate != 0, gain1);
      j.f2 = prepare<A>(f2, kh2, kw2, separable2 != 0, correlate != 0, gain2);
      plan(j, mode == kRecord);
      will_fill(y, size_t(n * c * out_h * out_w) * sizeof(T));
      if (mode == kPlain) filtered_lrelu<kPlain>(j, static_cast<A*>(dbias));
      else if (mode == kRecord) filtered_lrelu<kRecord>(j, static_cast<A*>(dbias));
      else filtered_lrelu<kMasked>(j, static_cast<A*>(dbias));
    } catch (const std::bad_alloc&) {
      return -2;
    }
    return 0;
  };
  auto fits = [](int factor) { return factor == 1 || factor == 2 || factor == 4; };
  if (!fits(up) || !fits(down) || std::max({kh1, kw1, kh2, kw2}) > 48) return -1;
  switch (dtype) {
    case kFloat32: return run(float());
    case kFloat64: return run(double());
    case kBFloat16: return run(bfloat16());
    default: return -1;
  }
}
