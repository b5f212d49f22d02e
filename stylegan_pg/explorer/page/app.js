// The page: what is shown follows from `state`, and the newest picture is asked for whenever that has changed.

import { $, Fault, ask, checkbox, choice, element, file, get, layerGroups, layerSwitches, picture, remove, show, slider } from "./controls.js";
import { RunPanel } from "./curves.js";

const SEEDS = 2 ** 32;
const ROW = 1000; // the seed above a seed is greater by this (explorer/face.py)
const SETTLED_MS = 160; // without a change, after which the whole picture replaces a preview
const BUSY_MS = 500; // after which the page says that it is at work
const SPEED = 0.9; // seeds per second while an arrow key is held down
const MOST_ENLARGED = 7; // times; small pictures look blurred beyond
const TAP = 0.06; // seeds, of a short press

const fresh = () => ({
  place: { seed: 0, right: 0, up: 0, c: null },
  other: { seed: 1, c: null },
  mixing: false,
  amount: 1,
  layers: null,
  psi: 0.7,
  cutoff: null,
  noise: "const",
  noise_seed: 0,
  directions: {},
  direction_layers: null,
  move: [0, 0, 0],
});

let state = fresh();
let facts = null; // of the generator that is shown
let sources = [];
let source = 0;
let snapshots = [];
let moment = -1; // index into snapshots
let formats = {};
let kept = []; // [{state, img}]
let controls = {}; // those that must follow `state`

// ------------------------------------------------------------------------------------------------------------- picture

const wrap = (seed) => ((seed % SEEDS) + SEEDS) % SEEDS;
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 100000;

// The server's description of a face.
function faceOf(s) {
  const face = { ...s, place: { ...s.place }, psi: facts.has_w ? s.psi : 1 };
  delete face.mixing;
  face.other = s.mixing ? { ...s.other } : null;
  if (!facts.c_dim) {
    face.place.c = null;
    if (face.other) face.other.c = null;
  }
  face.directions = Object.fromEntries(Object.entries(s.directions).filter(([name, a]) => a && knownDirections.has(name)));
  return face;
}

const target = () => ({ source, snapshot: snapshots[moment]?.name });
let changes = 0;
let shown = { change: -1, whole: false };
let pumping = false;
let changedAt = 0;
let slow = 0; // seconds that the last whole picture took
let problem = "";
let wholeRequest = null; // an AbortController, while the whole picture is made

// Ask for pictures until the newest state is shown: a fast one at once, the whole one when nothing has changed for a
// moment. There is one request at a time, so that the pictures follow the controls as fast as they can be made.
async function pump() {
  if (pumping) return;
  pumping = true;
  let busy = null;
  let preview = "";
  while (facts) {
    const change = changes;
    const settled = performance.now() - changedAt >= SETTLED_MS;
    if (shown.change === change && shown.whole) break;
    if (shown.change === change && !settled) {
      await new Promise((done) => setTimeout(done, 30));
      continue;
    }
    const whole = shown.change === change;
    try {
      const began = performance.now();
      if (whole) wholeRequest = new AbortController();
      busy = setTimeout(() => badge("working …"), BUSY_MS);
      const made = await picture({ ...target(), face: faceOf(state), preview: !whole, channel: "main" }, wholeRequest?.signal);
      if (whole || made.whole) slow = (performance.now() - began) / 1000;
      show($("picture"), made.blob);
      shown = { change, whole };
      if (whole) document.body.dataset.shown = change;
      preview = made.whole ? "" : `preview, ${made.size.replace("x", "×")}`;
      if (problem) notify((problem = ""));
    } catch (fault) {
      if (fault.status === 204) continue;
      problem = fault.message;
      notify(problem);
      shown = { change, whole: true }; // the same would fail again
      if (fault.status === 404) refresh();
    } finally {
      clearTimeout(busy);
      wholeRequest = null;
      badge(preview);
    }
  }
  pumping = false;
  settle();
}

function badge(text) {
  $("badge").hidden = !text;
  $("badge").textContent = text;
}

function changed() {
  changes += 1;
  changedAt = performance.now();
  document.body.dataset.wanted = changes;
  wholeRequest?.abort();
  caption();
  remember();
  pump();
}

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function caption() {
  if (!facts) return;
  const { seed, right, up } = state.place;
  const between = right || up ? ` + ${right.toFixed(2)} → ${up.toFixed(2)} ↑` : "";
  const name = facts.classes.length && state.place.c !== null ? `, ${facts.classes[state.place.c] ?? ""}` : "";
  controls.otherFrame?.classList.toggle("off", !state.mixing);
  const mixed = state.mixing ? `, mixed with seed ${state.other.seed}` : "";
  const text = `Seed ${seed}${between}${name}${mixed}`;
  $("caption").textContent = text;
  $("picture").alt = `Generated picture: ${text}`;
}

// What is done when no picture is waited for: thumbnails beside the controls.
let settledFor = "";
async function settle() {
  if (!facts || slow > 1.5) return;
  const { seed, c } = state.place;
  const now = JSON.stringify([source, moment, seed, c, state.other, state.mixing, state.psi, state.cutoff]);
  if (now === settledFor) return;
  settledFor = now;
  const change = changes;
  const plain = { place: { seed, right: 0, up: 0, c } };
  const around = [0, 1, ROW, ROW + 1].map((step) => ({ place: { ...plain.place, seed: wrap(seed + step) } }));
  const wanted = around.map((face, i) => [controls.plane.corners[i], face]);
  wanted.unshift([controls.otherPicture, { place: { ...state.other, right: 0, up: 0 } }]);
  for (const [img, face] of wanted) {
    if (!img || changes !== change) return void (settledFor = changes === change ? settledFor : "");
    if (!(await thumbnail(img, { ...fresh(), psi: state.psi, cutoff: state.cutoff, ...face }))) return;
  }
}

async function thumbnail(img, of, at = target()) {
  try {
    const { blob } = await picture({ ...at, face: faceOf(of), preview: true, size: 128, channel: `thumb-${img.dataset.id ??= Math.random()}` });
    show(img, blob);
    return true;
  } catch {
    return false; // the large picture tells what is wrong
  }
}

// ---------------------------------------------------------------------------------------------------------- generators

const isRun = () => sources[source]?.is_run;

async function open(number) {
  source = number;
  snapshots = sources[number].snapshots;
  moment = bestMoment();
  stopPlaying();
  panel.follow(isRun() ? number : null, sources[number].name);
  await loadMoment();
}

function bestMoment() {
  return snapshots.length - 1;
}

async function loadMoment() {
  drawTimeline();
  if (moment < 0) {
    facts = null;
    $("empty").hidden = false;
    $("empty").textContent = isRun() ? "This run has no snapshot yet. Faces appear here with the first one." : "There is no snapshot any more.";
    $("picture").removeAttribute("src");
    $("controls").hidden = true;
    $("facts").textContent = "";
    $("caption").textContent = "";
    for (const name of ["random", "keep", "download", "reset"]) $(name).disabled = true;
    return;
  }
  const asked = target();
  badge("loading …");
  try {
    const found = await ask("/api/generator", { ...asked, channel: "facts" });
    if (JSON.stringify(asked) !== JSON.stringify(target())) return;
    const before = facts && shape(facts);
    facts = found;
    $("empty").hidden = true;
    $("controls").hidden = false;
    for (const name of ["random", "keep", "download", "reset"]) $(name).disabled = false;
    if (before !== shape(facts)) {
      limit();
      build();
    }
    describe();
    const ready = loadDirections();
    if (Object.values(state.directions).some(Boolean)) await ready;
    else ready.catch((fault) => fault.status === 204 || notify(fault.message));
    changed();
  } catch (fault) {
    badge("");
    if (fault.status !== 204) notify(fault.message);
    if (fault.status === 404) refresh();
  }
}

// What the controls depend on.
const shape = (f) => JSON.stringify([f.has_w, f.layers, f.c_dim, f.classes, f.examples, f.noise, f.moves, f.height, f.width]);

function describe() {
  const { network, width, height, nimg, parameters } = facts;
  const millions = parameters >= 1e6 ? `${(parameters / 1e6).toFixed(1)} million` : parameters.toLocaleString("en");
  const shownTo = nimg === null ? "" : ` · ${(nimg / 1000).toLocaleString("en")} kimg`;
  $("facts").textContent = `${network} · ${width}×${height} · ${millions} parameters${shownTo}`;
  $("frame").style.setProperty("--ratio", width / height);
  $("frame").style.setProperty("--most", `${MOST_ENLARGED * width}px`);
  $("frame").classList.toggle("opaque", facts.channels !== 4);
}

// Numbers of another generator that this one does not have.
function limit() {
  const count = facts.classes.length || facts.examples.length;
  for (const place of [state.place, state.other]) {
    if (!facts.c_dim) continue;
    if (Array.isArray(place.c) ? place.c.length !== facts.c_dim || !facts.examples.length : !(place.c < count)) place.c = 0;
    place.c ??= 0;
  }
  if (state.cutoff !== null && state.cutoff >= facts.layers.length) state.cutoff = null;
}

async function refresh() {
  try {
    const found = await get("/api/sources");
    sources = found.sources;
    follow(sources[source].snapshots);
  } catch (fault) {
    notify(fault.message);
  }
}

// The list of a run's snapshots has perhaps grown. A page that shows the newest one goes on with the newest one.
function follow(list) {
  if (JSON.stringify(list) === JSON.stringify(snapshots)) return;
  const name = snapshots[moment]?.name;
  const newest = moment === snapshots.length - 1;
  snapshots = list;
  const same = list.findIndex((one) => one.name === name);
  moment = newest || same < 0 ? list.length - 1 : same;
  if (snapshots[moment]?.name === name) drawTimeline();
  else loadMoment();
}

// ------------------------------------------------------------------------------------------------------------ timeline

let playing = null;

function drawTimeline() {
  $("timeline").hidden = snapshots.length < 2;
  $("moment").max = snapshots.length - 1;
  $("moment").value = moment;
  const one = snapshots[moment];
  const text = one ? (one.nimg === null ? one.name : `${(one.nimg / 1000).toLocaleString("en")} kimg`) + (one.best ? " ★" : "") : "";
  $("moment-text").textContent = text;
  $("moment-text").title = one?.best ? "The best one by its metrics" : "";
  $("moment").setAttribute("aria-valuetext", text);
}

let loading = false;
// Load the chosen moment; while that takes, further movements of the slider are only noted.
async function goTo(index) {
  moment = index;
  drawTimeline();
  if (loading) return;
  loading = true;
  let done = -1;
  while (done !== moment) {
    done = moment;
    await loadMoment();
  }
  loading = false;
}

function stopPlaying() {
  playing = null;
  $("play").textContent = "▶";
  $("play").setAttribute("aria-pressed", "false");
}

async function play() {
  if (playing) return stopPlaying();
  const mine = (playing = {});
  $("play").textContent = "❚❚";
  $("play").setAttribute("aria-pressed", "true");
  if (moment === snapshots.length - 1) moment = -1;
  while (playing === mine && moment < snapshots.length - 1) {
    const began = performance.now();
    await goTo(moment + 1);
    while (shown.change !== changes && playing === mine) await new Promise((done) => setTimeout(done, 20));
    await new Promise((done) => setTimeout(done, Math.max(0, 350 - (performance.now() - began))));
  }
  if (playing === mine) stopPlaying();
}

// ---------------------------------------------------------------------------------------------------------- directions

let knownDirections = new Set();
let directionsOf = "";

async function loadDirections() {
  const now = JSON.stringify(target());
  const needed = $("directions-card").open || Object.values(state.directions).some(Boolean);
  if (!needed || directionsOf === now) return;
  const { directions } = await ask("/api/directions", { ...target(), channel: "directions" });
  directionsOf = now;
  knownDirections = new Set(directions.map((d) => d.name));
  buildDirections(directions);
}

function buildDirections(directions) {
  const body = $("directions-body");
  const groups = Map.groupBy ? Map.groupBy(directions, (d) => d.kind) : grouped(directions);
  body.replaceChildren();
  if (!directions.length) body.append(element("p", { className: "note" }, "No directions are known for this generator."));
  const sliders = [];
  if (facts.has_w && facts.layers.length > 2) {
    const parts = layerGroups(facts.layers.length);
    const names = [["all", "all layers"], ["coarse", "coarse layers"], ["middle", "middle layers"], ["fine", "fine layers"]];
    const now = names.find(([name]) => JSON.stringify(parts[name]) === JSON.stringify(state.direction_layers))?.[0] ?? "all";
    const { root } = choice("Change", names, now, (name) => {
      state.direction_layers = name === "all" ? null : parts[name];
      changed();
    });
    body.append(element("div", { className: "row" }, root));
  }
  for (const [kind, some] of groups) {
    body.append(element("p", { className: "note" }, kind[0].toUpperCase() + kind.slice(1)));
    some.forEach(({ name }, i) => {
      const label = kind.startsWith("file") ? name.split("/").pop() : `${kind.startsWith("p") ? "PCA" : "Weights"} ${i + 1}`;
      const made = slider({ label, min: -4, max: 4, step: 0.05, initial: 0, limit: 20, id: `direction-${name.replaceAll(/\W/g, "-")}`, title: `${name}, in standard deviations`, input: (value) => {
        state.directions = { ...state.directions, [name]: value };
        changed();
      } });
      made.set(state.directions[name] ?? 0);
      sliders.push(made);
      body.append(made.root);
    });
  }
  if (sliders.length) {
    body.append(element("div", { className: "row" },
      element("button", { type: "button", onclick: () => {
        const names = [...knownDirections];
        state.directions = Object.fromEntries(names.map((name) => [name, Math.round((Math.random() + Math.random() - 1) * 200) / 100]));
        buildDirections(directions);
        changed();
      } }, "Surprise me"),
      element("button", { type: "button", onclick: () => {
        state.directions = {};
        sliders.forEach((one) => one.set(0));
        changed();
      } }, "All to zero")));
  }
}

function grouped(directions) {
  const found = new Map();
  for (const d of directions) found.set(d.kind, [...(found.get(d.kind) ?? []), d]);
  return found;
}

// ------------------------------------------------------------------------------------------------------------ controls

function build() {
  controls = {};
  buildFace();
  buildMix();
  buildMove();
  buildFilm();
  directionsOf = "";
  $("directions-card").hidden = false;
}

function seedInput(label, get_, set) {
  const input = element("input", { type: "number", min: 0, max: SEEDS - 1, step: 1, value: get_() });
  input.addEventListener("input", () => {
    if (input.validity.valid && input.value !== "") set(input.valueAsNumber);
  });
  input.addEventListener("blur", () => (input.value = get_()));
  return { root: element("label", {}, label, input), input };
}

function conditionInput(label, place) {
  if (!facts.c_dim) return [];
  if (facts.classes.length) {
    const { root, select } = choice(label, facts.classes.map((name, i) => [i, name]), place().c ?? 0, (value) => {
      place().c = +value;
      changed();
    });
    return [root, (c) => (select.value = c ?? 0)];
  }
  const text = element("input", { type: "text", spellcheck: false, title: `${facts.c_dim} numbers, separated by commas` });
  const { root, select } = choice(label, facts.examples.map((_, i) => [i, `#${i + 1}`]), Array.isArray(place().c) ? "" : place().c ?? 0, (value) => {
    place().c = +value;
    text.value = facts.examples[+value].map((v) => +v.toPrecision(4)).join(", ");
    changed();
  });
  const set = (c) => {
    select.value = Array.isArray(c) ? "" : c ?? 0;
    text.value = (Array.isArray(c) ? c : facts.examples[c ?? 0]).map((v) => +v.toPrecision(4)).join(", ");
  };
  text.addEventListener("input", () => {
    const numbers = text.value.split(",").map((part) => (part.trim() === "" ? NaN : Number(part)));
    const valid = numbers.length === facts.c_dim && numbers.every(Number.isFinite);
    text.setCustomValidity(valid ? "" : `${facts.c_dim} numbers are needed, separated by commas`);
    if (!valid) return;
    place().c = numbers;
    select.value = "";
    changed();
  });
  set(place().c);
  return [element("div", { className: "row grow" }, root, element("label", { className: "grow" }, "Vector", text)), set];
}

const rowOf = (control) => (control ? [element("div", { className: "row" }, control)] : []);

function buildFace() {
  const body = $("face-body");
  body.replaceChildren();
  const seed = seedInput("Seed", () => state.place.seed, (value) => {
    Object.assign(state.place, { seed: value, right: 0, up: 0 });
    placed();
  });
  controls.seed = seed.input;
  const step = (by) => () => {
    Object.assign(state.place, { seed: wrap(state.place.seed + by), right: 0, up: 0 });
    placed();
  };
  const [condition, setCondition] = conditionInput(facts.classes.length ? "Class" : "Condition", () => state.place);
  controls.condition = setCondition;
  const side = element("div", { className: "inner" });
  side.append(
    element("div", { className: "row" }, seed.root,
      element("button", { type: "button", onclick: step(-1), title: "The seed before", "aria-label": "The seed before" }, "‹"),
      element("button", { type: "button", onclick: step(1), title: "The next seed", "aria-label": "The next seed" }, "›")),
    element("p", { className: "note" }, "The square shows where you are between four seeds. Drag the dot, the large picture, or use the arrow keys."));
  body.append(element("div", { className: "pair" }, buildPlane(), side), ...rowOf(condition));
  if (facts.has_w) {
    controls.psi = slider({ label: "Truncation ψ", min: -0.5, max: 1.5, step: 0.01, initial: 0.7, limit: 2, id: "psi", title: "0 is the mean face, 1 is no truncation; lower is more typical, higher more varied", input: (value) => {
      state.psi = value;
      changed();
    } });
    controls.psi.set(state.psi);
    body.append(controls.psi.root);
    const last = facts.layers.length;
    if (last > 1) {
      controls.cutoff = slider({ label: "Cutoff", min: 0, max: last, step: 1, initial: facts.cutoff ?? last, id: "cutoff", title: "How many layers, from the coarsest on, truncation changes", input: (value) => {
        state.cutoff = Math.round(value);
        changed();
      } });
      controls.cutoff.set(state.cutoff ?? facts.cutoff ?? last);
      body.append(controls.cutoff.root);
    }
  }
  if (facts.noise) {
    const noise = choice("Noise", [["const", "constant"], ["none", "none"], ["random", "random"]], state.noise, (value) => {
      state.noise = value;
      again.disabled = value !== "random";
      changed();
    });
    const again = element("button", { type: "button", disabled: state.noise !== "random", onclick: () => {
      state.noise_seed = randomSeed();
      changed();
    } }, "Other noise");
    controls.noise = (value) => {
      noise.select.value = value;
      again.disabled = value !== "random";
    };
    body.append(element("div", { className: "row" }, noise.root, again));
  }
  const pixels = checkbox("Show pixels", $("stage").classList.contains("pixels"), (on) => {
    $("frame").classList.toggle("pixels", on);
    $("stage").classList.toggle("pixels", on);
  }, "Enlarge without smoothing");
  body.append(element("div", { className: "row" }, pixels.root));
}

function buildPlane() {
  const corners = [0, 1, 2, 3].map(() => element("img", { alt: "" }));
  const dot = element("span", { className: "dot" });
  const root = element("div", { className: "plane", title: "The place between four seeds" }, ...corners, dot);
  const move = (event) => {
    const box = root.getBoundingClientRect();
    const clip = (x) => Math.min(Math.max(x, 0), 0.999);
    state.place.right = clip((event.clientX - box.left) / box.width);
    state.place.up = clip(1 - (event.clientY - box.top) / box.height);
    placed();
  };
  root.addEventListener("pointerdown", (event) => {
    root.setPointerCapture(event.pointerId);
    move(event);
  });
  root.addEventListener("pointermove", (event) => root.hasPointerCapture(event.pointerId) && move(event));
  controls.plane = { corners, dot };
  drawDot();
  return root;
}

function drawDot() {
  const { dot } = controls.plane ?? {};
  if (!dot) return;
  dot.style.left = `${12 + 76 * state.place.right}%`;
  dot.style.top = `${88 - 76 * state.place.up}%`;
}

function placed() {
  if (document.activeElement !== controls.seed) controls.seed.value = state.place.seed;
  drawDot();
  changed();
}

function buildMix() {
  const body = $("mix-body");
  body.replaceChildren();
  controls.mixing = checkbox("Mix", state.mixing, (on) => mix(on), "M").box;
  controls.mixing.id = "mixing";
  const other = seedInput("Seed", () => state.other.seed, (value) => mixWith(value));
  controls.otherSeed = other.input;
  controls.otherPicture = element("img", { alt: "The other face" });
  const [condition, setCondition] = conditionInput(facts.classes.length ? "Class" : "Condition", () => state.other);
  controls.otherCondition = setCondition;
  const side = element("div", { className: "inner" });
  side.append(
    element("div", { className: "row" }, controls.mixing.parentElement, other.root),
    element("div", { className: "row" },
      element("button", { type: "button", id: "other-random", onclick: () => mixWith(randomSeed()) }, "Random"),
      element("button", { type: "button", id: "swap", onclick: swap, title: "Exchange the two faces" }, "Swap")));
  body.append(element("div", { className: "pair" }, (controls.otherFrame = element("div", { className: "other" }, controls.otherPicture)), side), ...rowOf(condition));
  controls.amount = slider({ label: "Amount", min: 0, max: 1, step: 0.01, initial: 1, id: "amount", title: "How much of the other face the chosen layers take", input: (value) => {
    state.amount = value;
    if (!state.mixing) return mix(true);
    changed();
  } });
  controls.amount.set(state.amount);
  body.append(controls.amount.root);
  if (facts.layers.length > 1) {
    const parts = layerGroups(facts.layers.length);
    const switches = layerSwitches(facts.layers, "Layers that take the other face", (layers) => {
      state.layers = layers;
      if (!state.mixing) return mix(true);
      changed();
    });
    const choose = (list) => () => {
      switches.set(list);
      state.layers = list;
      if (!state.mixing) return mix(true);
      changed();
    };
    controls.layers = switches;
    if (state.layers) switches.set(state.layers);
    body.append(
      element("div", { className: "row", role: "group", "aria-label": "Layers" },
        ...Object.entries({ Coarse: parts.coarse, Middle: parts.middle, Fine: parts.fine, All: parts.all }).map(([name, list]) =>
          element("button", { type: "button", id: `mix-${name.toLowerCase()}`, onclick: choose(list) }, name))),
      switches.root,
      element("p", { className: "note" }, "Marked layers take the other face. Coarse ones change pose and shape, fine ones colours and texture."));
  } else {
    body.append(element("p", { className: "note" }, "This generator has one input for all layers, so faces are blended as a whole."));
  }
}

function mix(on) {
  state.mixing = on;
  controls.mixing.checked = on;
  settledFor = "";
  changed();
}

function mixWith(seed) {
  state.other.seed = seed;
  if (document.activeElement !== controls.otherSeed) controls.otherSeed.value = seed;
  mix(true);
}

function swap() {
  const { seed, c } = state.place;
  state.place = { seed: state.other.seed, right: 0, up: 0, c: state.other.c };
  state.other = { seed, c };
  state.mixing = true;
  sync();
  changed();
}

function buildMove() {
  $("move-card").hidden = !facts.moves;
  if (!facts.moves) return;
  const body = $("move-body");
  body.replaceChildren();
  controls.move = [["Right", -0.5, 0.5, 0.005], ["Up", -0.5, 0.5, 0.005], ["Rotation °", -180, 180, 1]].map(([label, min, max, step], i) => {
    const made = slider({ label, min, max, step, initial: 0, id: `move-${i}`, input: (value) => {
      state.move[i] = value;
      changed();
    } });
    made.set(state.move[i]);
    body.append(made.root);
    return made;
  });
  body.append(element("p", { className: "note" }, "StyleGAN3 moves and turns the scene itself, in widths of the picture."));
}

// Make the controls show `state`, which was changed otherwise.
function sync() {
  if (!facts) return;
  limit();
  controls.seed.value = state.place.seed;
  controls.condition?.(state.place.c);
  controls.psi?.set(state.psi);
  controls.cutoff?.set(state.cutoff ?? facts.cutoff ?? facts.layers.length);
  controls.noise?.(state.noise);
  controls.mixing.checked = state.mixing;
  controls.otherSeed.value = state.other.seed;
  controls.otherCondition?.(state.other.c);
  controls.amount.set(state.amount);
  controls.layers?.set(state.layers ?? facts.layers.keys());
  controls.move?.forEach((one, i) => one.set(state.move[i]));
  directionsOf = "";
  loadDirections().then(changed, (fault) => fault.status === 204 || notify(fault.message));
  drawDot();
}

// --------------------------------------------------------------------------------------------------------- kept, video

function keep() {
  if (!facts) return;
  const one = { state: structuredClone(state), img: element("img", { alt: `Kept face, seed ${state.place.seed}` }) };
  thumbnail(one.img, one.state);
  kept.push(one);
  drawKept();
}

function drawKept() {
  $("kept").replaceChildren(...kept.map((one, i) =>
    element("div", { className: "thumb", role: "listitem" },
      element("button", { type: "button", title: "Show this face", onclick: () => {
        state = structuredClone(one.state);
        sync();
        changed();
      } }, one.img),
      element("button", { type: "button", className: "drop", title: "Remove", "aria-label": `Remove kept face ${i + 1}`, onclick: () => {
        kept.splice(i, 1);
        drawKept();
      } }, "×"))));
  controls.filmNote?.();
}

function buildFilm() {
  const body = $("film-body");
  body.replaceChildren();
  const film = { seconds: 2, fps: 30, loop: true, format: formats.mp4 ? "mp4" : "webp" };
  const note = element("p", { className: "note" });
  const seconds = slider({ label: "Seconds", min: 0.5, max: 10, step: 0.5, initial: 2, limit: 600, id: "film-seconds", title: "From each face to the next one; of a video of the training, of the whole", input: (value) => {
    film.seconds = value;
    drawNote();
  } });
  const options = [["mp4", "MP4"], ["webp", "WebP"]].filter(([name]) => formats[name]);
  const make = element("button", { type: "button", className: "main", id: "film-make", onclick: () => start("faces") }, "Make video");
  const training = element("button", { type: "button", id: "film-training", title: "This face through all snapshots of the run", onclick: () => start("training") }, "Of the training");
  const progress = element("progress", { max: 1, value: 0, hidden: true, "aria-label": "Progress of the video" });
  const cancel = element("button", { type: "button", hidden: true }, "Cancel");
  const result = element("div", { className: "inner" });
  const faces = () => (kept.length >= 2 ? kept.map((one) => one.state) : state.mixing ? [{ ...state, mixing: false }, state] : kept.length === 1 ? [kept[0].state, state] : []);
  const drawNote = () => {
    const count = faces().length;
    make.disabled = count < 2;
    training.hidden = !(snapshots.length > 1 && isRun());
    const length = film.seconds * (film.loop ? count : count - 1);
    note.textContent = count < 2 ? "Keep two or more faces (K), or mix two: the video goes from one to the next."
      : `${count} faces, ${Math.round(length * 10) / 10} seconds, by the generator that is shown.`;
  };
  controls.filmNote = drawNote;
  body.append(note, seconds.root,
    element("div", { className: "row" },
      choice("Frames per second", [[15, "15"], [24, "24"], [30, "30"], [60, "60"]], 30, (value) => (film.fps = +value)).root,
      choice("Format", options, film.format, (value) => (film.format = value)).root),
    element("div", { className: "row" }, checkbox("Loop", true, (on) => {
      film.loop = on;
      drawNote();
    }).root, make, training),
    element("div", { className: "row" }, element("div", { className: "grow" }, progress), cancel), result);

  async function start(kind) {
    make.disabled = training.disabled = true;
    progress.hidden = cancel.hidden = false;
    progress.value = 0;
    result.replaceChildren();
    try {
      const wanted = (kind === "training" ? [state] : faces()).map(faceOf);
      const { film: name } = await ask("/api/films", { ...target(), film: { ...film, kind, faces: wanted } });
      let stop = false;
      cancel.onclick = () => (stop = true);
      for (;;) {
        await new Promise((done) => setTimeout(done, 250));
        if (stop) {
          await remove(`/api/films/${name}`);
          break;
        }
        const now = await get(`/api/films/${name}`);
        progress.value = now.done / now.frames;
        if (now.problem) throw new Fault(422, now.problem);
        if (!now.ready) continue;
        const path = URL.createObjectURL(await file(`/api/films/${name}/file`));
        const view = film.format === "mp4"
          ? element("video", { src: path, controls: true, loop: film.loop, autoplay: true, muted: true, playsInline: true })
          : element("img", { src: path, alt: "The video", className: "film-picture" });
        result.append(view, element("a", { className: "button", href: path, download: `faces.${film.format}`, id: "film-download" }, "Download"));
        break;
      }
    } catch (fault) {
      result.append(element("p", { className: "notice" }, fault.message));
    }
    progress.hidden = cancel.hidden = true;
    training.disabled = false;
    drawNote();
  }
  drawNote();
}

async function download() {
  if (!facts) return;
  try {
    const { blob } = await picture({ ...target(), face: faceOf(state), channel: "download" });
    const link = element("a", { href: URL.createObjectURL(blob), download: `seed${String(state.place.seed).padStart(6, "0")}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (fault) {
    notify(fault.message);
  }
}

// ------------------------------------------------------------------------------------------------------- walks, keys

const held = new Set();
let walkedAt = 0;

function walk(dx, dy) {
  const { place } = state;
  const x = place.right + dx;
  const y = place.up + dy;
  place.seed = wrap(place.seed + Math.floor(x) + ROW * Math.floor(y));
  const rest = (v) => Math.min(v - Math.floor(v), 0.999999);
  [place.right, place.up] = [rest(x), rest(y)];
  placed();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

function walking(now) {
  if (!held.size) return;
  const step = Math.min((now - walkedAt) / 1000, 0.1) * SPEED * (held.has("Shift") ? 4 : 1);
  walkedAt = now;
  let [dx, dy] = [0, 0];
  for (const key of held) {
    dx += ARROWS[key]?.[0] ?? 0;
    dy += ARROWS[key]?.[1] ?? 0;
  }
  // On a slow device the walk waits for its pictures, so that it shows all of the way.
  if ((dx || dy) && changes - shown.change < 3) walk(dx * step, dy * step);
  requestAnimationFrame(walking);
}

const typing = (node) => node.closest?.("input, select, textarea, video") !== null;

document.addEventListener("keydown", (event) => {
  if (event.key === "Shift") held.size && held.add("Shift");
  if (!facts || event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  if (event.key in ARROWS) {
    event.preventDefault();
    if (event.repeat) return;
    const idle = !held.size;
    held.add(event.key);
    if (event.shiftKey) held.add("Shift");
    const [dx, dy] = ARROWS[event.key];
    walk(dx * TAP, dy * TAP);
    if (idle) {
      walkedAt = performance.now();
      requestAnimationFrame(walking);
    }
    return;
  }
  const action = { r: random, k: keep, s: download, m: () => mix(!state.mixing), 0: reset }[event.key.toLowerCase()];
  if (action && !event.repeat) {
    event.preventDefault();
    action();
  }
});
document.addEventListener("keyup", (event) => {
  held.delete(event.key);
  if (!Object.keys(ARROWS).some((key) => held.has(key))) held.clear();
});
window.addEventListener("blur", () => held.clear());

function dragging() {
  const frame = $("frame");
  let from = null;
  frame.addEventListener("pointerdown", (event) => {
    if (!facts || event.button) return;
    frame.setPointerCapture(event.pointerId);
    from = [event.clientX, event.clientY];
  });
  frame.addEventListener("pointermove", (event) => {
    if (!from || !frame.hasPointerCapture(event.pointerId)) return;
    const width = frame.clientWidth;
    walk(-(event.clientX - from[0]) / width, (event.clientY - from[1]) / width);
    from = [event.clientX, event.clientY];
  });
  for (const name of ["pointerup", "pointercancel"]) frame.addEventListener(name, () => (from = null));
}

function random() {
  Object.assign(state.place, { seed: randomSeed(), right: 0, up: 0 });
  controls.seed.value = state.place.seed;
  placed();
}

function reset() {
  const { seed, c } = state.place;
  state = { ...fresh(), place: { seed, right: 0, up: 0, c } };
  sync();
  changed();
}

// --------------------------------------------------------------------------------------------------- address, colours

// The face is kept in the address, so that the page can be reloaded, and a face can be noted.
let remembering = null;
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(writeAddress, 300); // browsers limit how often it may be changed
}

function writeAddress() {
  if (!facts) return;
  const text = JSON.stringify({ at: sources[source].name, ...state });
  history.replaceState(null, "", `#${encodeURIComponent(text)}`);
}
window.addEventListener("pagehide", writeAddress);

function recalled() {
  try {
    const { at, ...found } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    const start = fresh();
    for (const key of Object.keys(start)) {
      if (key in found && (found[key] === null || start[key] === null || typeof found[key] === typeof start[key])) start[key] = found[key];
    }
    return [at, start];
  } catch {
    return [null, fresh()];
  }
}

const THEMES = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" };
const system = matchMedia("(prefers-color-scheme: dark)");

function stored(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch {
    // Without storage, the choice lasts as long as the page.
  }
  return null;
}

let theme = stored("theme") ?? "auto";
function paint() {
  if (!(theme in THEMES)) theme = "auto";
  document.documentElement.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
  $("theme").textContent = THEMES[theme];
  panel.redraw();
}

// ------------------------------------------------------------------------------------------------------------- start

const panel = new RunPanel(follow);

async function start() {
  paint();
  system.addEventListener("change", paint);
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    stored("theme", theme);
    paint();
  });
  $("random").addEventListener("click", random);
  $("keep").addEventListener("click", keep);
  $("download").addEventListener("click", download);
  $("reset").addEventListener("click", reset);
  $("moment").addEventListener("input", () => {
    stopPlaying();
    goTo($("moment").valueAsNumber);
  });
  $("play").addEventListener("click", play);
  $("directions-card").addEventListener("toggle", () => facts && loadDirections().catch((fault) => fault.status === 204 || notify(fault.message)));
  dragging();
  try {
    const found = await get("/api/sources");
    [sources, formats] = [found.sources, found.formats];
    $("source").append(...sources.map((one, i) => element("option", { value: i }, one.name)));
    $("source-label").hidden = sources.length < 2;
    document.title = `${sources[0].name} · stylegan_pg explorer`;
    const [at, before] = recalled();
    state = before;
    const there = Math.max(0, sources.findIndex((one) => one.name === at));
    $("source").value = there;
    $("source").addEventListener("change", () => open(+$("source").value));
    await open(there);
  } catch (fault) {
    notify(fault.message);
  }
}

start();
