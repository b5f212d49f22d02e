// Latents by seed, the same numbers as numpy.random.RandomState(seed).randn(n), which `stylegan-pg sample` uses: the
// Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), and normal variates by the polar method (Marsaglia and Bray
// 1964), of which each pair is returned in the order second, first.

const N = 624, M = 397;

export class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(N);
    this.state[0] = seed >>> 0;
    for (let i = 1; i < N; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(before, 1812433253) + i;
    }
    this.place = N;
  }

  word() {
    if (this.place === N) this.refill();
    let y = this.state[this.place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  refill() {
    const s = this.state;
    for (let i = 0; i < N; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % N] & 0x7fffffff);
      s[i] = s[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.place = 0;
  }

  // A number in [0, 1) with 53 random bits.
  uniform() {
    const high = this.word() >>> 5, low = this.word() >>> 6;
    return (high * 67108864 + low) / 9007199254740992;
  }
}

// n standard normal numbers of a seed in [0, 2^32), as Float32Array.
export function latents(seed, n) {
  const dice = new MersenneTwister(seed), found = new Float32Array(n);
  for (let i = 0; i < n; i += 2) {
    let x, y, square;
    do {
      x = 2 * dice.uniform() - 1;
      y = 2 * dice.uniform() - 1;
      square = x * x + y * y;
    } while (square >= 1 || square === 0);
    const factor = Math.sqrt((-2 * Math.log(square)) / square);
    found[i] = factor * y;
    if (i + 1 < n) found[i + 1] = factor * x;
  }
  return found;
}
