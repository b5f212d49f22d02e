// The page: what is asked for goes to the worker, one picture at a time, and only the newest wish for each canvas.

import { latents } from "./latents.js";

const facts = JSON.parse(document.getElementById("facts").textContent);
const at = (id) => document.getElementById(id);
const [height, width] = facts.size;
const MOST = 4294967295;
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const wishes = new Map(); // canvas's id -> the place on the walk that it shall show
let working = null, loaded = false, playing = 0;

function shown(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

// ------------------------------------------------------------------------------------------------------ what is wanted

function seedOf(end) {
  const value = Math.floor(Number(at(`seed-${end}`).value));
  return Number.isFinite(value) ? Math.min(Math.max(value, 0), MOST) : 0;
}

function conditionOf(end) {
  const chosen = Number(at(`class-${end}`).value) || 0;
  if (facts.examples) return Float32Array.from(facts.examples[chosen]);
  const c = new Float32Array(facts.c_dim);
  c[chosen] = 1;
  return c;
}

function inputsAt(t) {
  const given = {
    z: { data: latents(seedOf("a"), facts.z_dim), dims: [1, facts.z_dim] },
    to: { data: latents(seedOf("b"), facts.z_dim), dims: [1, facts.z_dim] },
    t: { data: Float32Array.of(t), dims: [] },
  };
  if (facts.c_dim) {
    given.c = { data: conditionOf("a"), dims: [1, facts.c_dim] };
    given.c_to = { data: conditionOf("b"), dims: [1, facts.c_dim] };
  }
  if (facts.styled) {
    const count = Number(at("layers").value);
    given.psi = { data: Float32Array.of(Number(at("psi").value)), dims: [] };
    given.mask = { data: Float32Array.from(facts.default_mask, (_, i) => (i < count ? 1 : 0)), dims: [facts.default_mask.length] };
  }
  return given;
}

function next() {
  if (!loaded || working !== null || !wishes.size) return;
  const [id, t] = wishes.entries().next().value;
  wishes.delete(id);
  working = id;
  at("picture").classList.toggle("busy", id === "picture");
  worker.postMessage({ id, inputs: inputsAt(t) });
}

const place = () => Number(at("t").value);

function wish(...ids) {
  const places = { picture: place(), "thumb-a": 0, "thumb-b": 1 };
  for (const id of ids) wishes.set(id, places[id]);
  document.body.dataset.state = "busy";
  next();
}

const everything = () => wish("picture", "thumb-a", "thumb-b");

// --------------------------------------------------------------------------------------------------------- what comes

function drawn(id, images) {
  const canvas = at(id), pixels = new ImageData(width, height), size = width * height;
  const value = (channel, i) => images[channel * size + i] * 127.5 + 127.5; // rounded and clipped by ImageData
  for (let i = 0; i < size; i++) {
    for (let k = 0; k < 3; k++) pixels.data[4 * i + k] = value(facts.channels === 1 ? 0 : k, i);
    pixels.data[4 * i + 3] = facts.channels === 4 ? value(3, i) : 255;
  }
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(pixels, 0, 0);
}

worker.onmessage = ({ data }) => {
  if (data.error) {
    shown(`This did not work: ${data.error}`, true);
    document.body.dataset.state = "failed";
    return;
  }
  if (data.loaded) {
    loaded = true;
    shown("");
  } else {
    drawn(data.id, data.images);
    if (data.id === "picture") shown(`${width} x ${height} pixels in ${Math.round(data.milliseconds)} ms`);
    working = null;
    at("picture").classList.remove("busy");
    if (!wishes.size) document.body.dataset.state = "idle";
  }
  next();
};
worker.onerror = (event) => {
  shown(`The generator cannot be started: ${event.message ?? "this browser may be too old"}`, true);
  document.body.dataset.state = "failed";
};

// ------------------------------------------------------------------------------------------------------------ controls

const random = (end) => (at(`seed-${end}`).value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000);

function described() {
  if (!facts.styled) return;
  at("psi-value").textContent = Number(at("psi").value).toFixed(2);
  at("layers-value").textContent = `${at("layers").value} of ${facts.default_mask.length}`;
}

function remembered() {
  const state = { a: seedOf("a"), b: seedOf("b"), t: at("t").value, psi: at("psi").value, layers: at("layers").value };
  if (facts.c_dim) Object.assign(state, { ca: at("class-a").value, cb: at("class-b").value });
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

function recalled() {
  const state = new URLSearchParams(location.hash.slice(1));
  const ids = { a: "seed-a", b: "seed-b", t: "t", psi: "psi", layers: "layers", ca: "class-a", cb: "class-b" };
  for (const [key, id] of Object.entries(ids)) if (state.has(key)) at(id).value = state.get(key);
}

function setUp() {
  at("about").textContent = `A generator of ${width} x ${height} pictures`;
  for (const id of ["picture", "thumb-a", "thumb-b"]) [at(id).width, at(id).height] = [width, height];
  if (facts.styled) {
    at("truncation").hidden = false;
    at("layers").max = facts.default_mask.length;
    at("layers").value = facts.default_mask.reduce((sum, one) => sum + one, 0);
  }
  [at("seed-a").value, at("seed-b").value] = [0, 1];
  for (const end of ["a", "b"]) {
    const select = at(`class-${end}`);
    select.closest("label").hidden = !facts.c_dim;
    facts.names.forEach((name, i) => select.add(new Option(facts.examples ? `example ${name}` : name, i)));
    const changed = () => (remembered(), wish("picture", `thumb-${end}`));
    at(`seed-${end}`).addEventListener("input", changed);
    at(`seed-${end}`).addEventListener("change", () => (at(`seed-${end}`).value = seedOf(end)));
    select.addEventListener("change", changed);
    at(`random-${end}`).addEventListener("click", () => (random(end), changed()));
    at(`to-${end}`).addEventListener("click", () => {
      at("t").value = end === "a" ? 0 : 1;
      remembered();
      wish("picture");
    });
  }
  at("t").addEventListener("input", () => (remembered(), wish("picture")));
  for (const id of ["psi", "layers"]) at(id).addEventListener("input", () => (described(), remembered(), everything()));
  at("random").addEventListener("click", () => (random("a"), random("b"), remembered(), everything()));
  at("swap").addEventListener("click", () => {
    for (const name of ["seed", "class"]) {
      const [a, b] = [at(`${name}-a`), at(`${name}-b`)];
      [a.value, b.value] = [b.value, a.value];
    }
    at("t").value = 1 - place();
    remembered();
    everything();
  });
  at("play").addEventListener("click", () => {
    clearInterval(playing);
    const on = at("play").getAttribute("aria-pressed") !== "true";
    at("play").setAttribute("aria-pressed", String(on));
    at("play").textContent = on ? "Pause" : "Play";
    let phase = Math.acos(1 - 2 * place()); // it slows down at both ends
    playing = on ? setInterval(() => {
      if (wishes.has("picture") || working === "picture") return; // a slow device shows fewer steps
      phase += 0.05;
      at("t").value = (1 - Math.cos(phase)) / 2;
      wish("picture");
    }, 40) : 0;
  });
  at("save").addEventListener("click", () => {
    at("picture").toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = place() === 0 ? `seed${seedOf("a")}.png` : `seed${seedOf("a")}-seed${seedOf("b")}-${place()}.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }, "image/png");
  });
  window.addEventListener("hashchange", () => (recalled(), described(), everything()));
  recalled();
  described();
}

setUp();
document.body.dataset.state = "busy";
worker.postMessage({ load: new URL(facts.model, import.meta.url).href });
everything();
