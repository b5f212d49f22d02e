// Requests to the server, and the elements of which the page's controls consist.

const client = Array.from(crypto.getRandomValues(new Uint32Array(2)), (n) => n.toString(36)).join("");

export class Fault extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function checked(promise) {
  let answer;
  try {
    answer = await promise;
  } catch (fault) {
    if (fault.name === "AbortError") throw new Fault(204, "This request was given up.");
    throw new Fault(0, "The explorer does not answer: its command may have ended.");
  }
  if (answer.status === 204) throw new Fault(204, "A newer request took the place of this one.");
  if (answer.ok) return answer;
  let message = `The explorer answers with ${answer.status}.`;
  try {
    message = (await answer.json()).error;
  } catch {
    // The status has to suffice.
  }
  throw new Fault(answer.status, message);
}

export async function get(path) {
  return (await checked(fetch(path))).json();
}

export async function file(path) {
  return (await checked(fetch(path))).blob();
}

function post(path, body, signal) {
  return checked(
    fetch(path, {
      signal,
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ client, ...body }),
    }),
  );
}

export async function ask(path, body) {
  return (await post(path, body)).json();
}

export async function remove(path) {
  await checked(fetch(path, { method: "DELETE" }));
}

// A picture as {blob, size, whole}. Requests of one channel replace each other; the older ones fail with status 204, as
// do those that `signal` gives up.
export async function picture(body, signal) {
  const answer = await post("/api/picture", body, signal);
  const blob = await answer.blob();
  return { blob, size: answer.headers.get("x-picture"), whole: answer.headers.get("x-whole") === "1" };
}

// Show a blob in an image, and free the one before.
export function show(img, blob) {
  const before = img.src;
  img.src = URL.createObjectURL(blob);
  if (before.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(before), 1000);
}

export const $ = (id) => document.getElementById(id);

export function element(name, given = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

let counter = 0;

// A slider with a label and a number, which may lie beyond the slider's ends up to `limit`. A double click on the label
// restores `initial`. `input` is called with each new number.
export function slider({ label, min, max, step, initial, input, title = "", limit = null, id = "" }) {
  id = id || `slider-${++counter}`;
  const low = limit === null ? min : -limit;
  const high = limit === null ? max : limit;
  const range = element("input", { type: "range", id, min, max, step, title });
  const number = element("input", { type: "number", min: low, max: high, step: "any", title, "aria-label": `${label}, number` });
  let current = initial;
  const set = (value, from) => {
    current = value;
    if (from !== range) range.value = value;
    if (from !== number) number.value = Math.round(value * 1000) / 1000;
  };
  set(initial);
  range.addEventListener("input", () => {
    set(range.valueAsNumber, range);
    input(range.valueAsNumber);
  });
  number.addEventListener("input", () => {
    const value = number.valueAsNumber;
    if (!Number.isFinite(value) || value < low || value > high) return;
    set(value, number);
    input(value);
  });
  number.addEventListener("blur", () => set(current)); // what was no possible number disappears
  const name = element("label", { htmlFor: id, title: title || "A double click restores the first value" }, label);
  name.addEventListener("dblclick", () => {
    set(initial);
    input(initial);
  });
  const root = element("div", { className: "slider" }, name, range, number);
  return { root, set, range, number };
}

export function checkbox(label, initial, change, title = "") {
  const box = element("input", { type: "checkbox", checked: initial, title });
  box.addEventListener("change", () => change(box.checked));
  return { root: element("label", { title }, box, label), box };
}

export function choice(label, options, initial, change) {
  const select = element("select", {}, ...options.map(([value, text]) => element("option", { value }, text)));
  select.value = initial;
  select.addEventListener("change", () => change(select.value));
  return { root: element("label", { className: "grow" }, label, select), select };
}

// A row of switches, one for each layer, which can be painted with the pointer held down.
export function layerSwitches(names, label, change) {
  let chosen = new Set(names.keys());
  let painting = null;
  const buttons = names.map((name, i) => {
    const button = element("button", { type: "button", title: `Layer ${i + 1} of ${names.length}, ${name}` }, name);
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      button.focus();
      painting = !chosen.has(i);
      toggle(i, painting);
    });
    button.addEventListener("click", (event) => {
      if (event.detail === 0) toggle(i, !chosen.has(i)); // by the keyboard; the pointer has been heard already
    });
    return button;
  });
  const root = element("div", { className: "layers", role: "group", "aria-label": label }, ...buttons);
  root.addEventListener("pointermove", (event) => {
    if (painting === null) return;
    const i = buttons.indexOf(document.elementFromPoint(event.clientX, event.clientY));
    if (i >= 0 && chosen.has(i) !== painting) toggle(i, painting);
  });
  window.addEventListener("pointerup", () => (painting = null));
  window.addEventListener("pointercancel", () => (painting = null));
  const draw = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", chosen.has(i)));
  const toggle = (i, on) => {
    if (on) chosen.add(i);
    else chosen.delete(i);
    draw();
    change(layers());
  };
  const layers = () => [...chosen].sort((a, b) => a - b);
  const set = (list) => {
    chosen = new Set(list);
    draw();
  };
  draw();
  return { root, set, layers };
}

// The layers of a generator in three groups: what they change is coarse (pose, shape), middle (features) or fine
// (colours, texture).
export function layerGroups(count) {
  const all = [...Array(count).keys()];
  const [a, b] = [Math.ceil(count / 3), Math.ceil((2 * count) / 3)];
  return { all, coarse: all.slice(0, a), middle: all.slice(a, b), fine: all.slice(b) };
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}
