// A run while it trains: its state, curves that grow, and the newest grid.

import { $, duration, element, get } from "./controls.js";

const POLL_MS = 2000;
const POLL_AT_REST_MS = 15000;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const short = (value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(1);
  return String(+value.toPrecision(4));
};

class Chart {
  constructor(title, shown) {
    this.shown = shown; // a function: whether a curve is drawn at first
    this.data = {};
    this.chosen = new Map();
    this.pointer = null;
    this.canvas = element("canvas", { role: "img" });
    this.legend = element("div", { className: "legend", role: "group", "aria-label": `Curves of ${title}` });
    this.log = element("input", { type: "checkbox", onchange: () => this.draw() });
    const head = element("h3", {}, title, element("label", {}, this.log, "logarithmic"));
    this.root = element("div", { className: "chart" }, head, this.canvas, this.legend);
    this.title = title;
    this.canvas.addEventListener("pointermove", (event) => {
      this.pointer = event.offsetX;
      this.draw();
    });
    this.canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  set(data) {
    this.data = data;
    this.root.hidden = Object.keys(data).length === 0;
    for (const name of Object.keys(data)) {
      if (this.chosen.has(name)) continue;
      this.chosen.set(name, this.shown(name, Object.keys(data)));
      const button = element("button", { type: "button", onclick: () => {
        this.chosen.set(name, !this.chosen.get(name));
        this.draw();
      } });
      button.dataset.name = name;
      this.legend.append(button);
    }
    this.draw();
  }

  draw() {
    const names = Object.keys(this.data).filter((name) => this.chosen.get(name));
    const colours = new Map(names.map((name, i) => [name, colour(`--c${i % 8}`)]));
    for (const button of this.legend.children) {
      const { name } = button.dataset;
      const points = this.data[name];
      button.hidden = !points;
      if (!points) continue;
      button.setAttribute("aria-pressed", colours.has(name));
      button.style.setProperty("--mark", colours.get(name) ?? "transparent");
      button.textContent = `${name} ${short(points.at(-1)[1])}`;
    }
    const last = names.map((name) => `${name} ${short(this.data[name].at(-1)[1])}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.title}: ${last || "no curve is chosen"}`);
    this.canvas.dataset.points = names.reduce((sum, name) => sum + this.data[name].length, 0);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const ink = this.canvas.getContext("2d");
    ink.scale(scale, scale);
    ink.font = "11px system-ui, sans-serif";
    this.paint(ink, width, height, names, colours);
  }

  paint(ink, width, height, names, colours) {
    const log = this.log.checked;
    const value = (v) => (log ? Math.log10(v) : v);
    const usable = (point) => !log || point[1] > 0;
    const points = names.flatMap((name) => this.data[name].filter(usable));
    if (!points.length) return;
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const [x, y] of points) {
      [x0, x1] = [Math.min(x0, x), Math.max(x1, x)];
      [y0, y1] = [Math.min(y0, value(y)), Math.max(y1, value(y))];
    }
    if (x1 === x0) [x0, x1] = [x0 - 0.5, x1 + 0.5];
    const margin = y1 > y0 ? 0.06 * (y1 - y0) : 0.5 * Math.abs(y1) + 0.1;
    [y0, y1] = [y0 - margin, y1 + margin];
    const box = { left: 44, top: 6, right: width - 8, bottom: height - 20 };
    const px = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
    const py = (y) => box.bottom - ((value(y) - y0) / (y1 - y0)) * (box.bottom - box.top);
    this.axes(ink, box, [x0, x1], [y0, y1], log);
    ink.lineWidth = 1.6;
    ink.lineJoin = "round";
    for (const name of names) {
      ink.strokeStyle = ink.fillStyle = colours.get(name);
      const drawn = this.data[name].filter(usable);
      ink.beginPath();
      drawn.forEach(([x, y], i) => (i ? ink.lineTo(px(x), py(y)) : ink.moveTo(px(x), py(y))));
      ink.stroke();
      if (drawn.length) {
        ink.beginPath();
        ink.arc(px(drawn.at(-1)[0]), py(drawn.at(-1)[1]), 2.6, 0, 7);
        ink.fill();
      }
    }
    if (this.pointer !== null && this.pointer >= box.left && this.pointer <= box.right)
      this.reading(ink, box, names, colours, x0 + ((this.pointer - box.left) / (box.right - box.left)) * (x1 - x0), px, py);
  }

  axes(ink, box, [x0, x1], [y0, y1], log) {
    ink.fillStyle = colour("--soft");
    ink.strokeStyle = colour("--line");
    ink.lineWidth = 1;
    ink.textBaseline = "middle";
    ink.textAlign = "right";
    for (const y of ticks(y0, y1, 4)) {
      const at = Math.round(box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top)) + 0.5;
      ink.beginPath();
      ink.moveTo(box.left, at);
      ink.lineTo(box.right, at);
      ink.stroke();
      ink.fillText(short(log ? 10 ** y : y), box.left - 5, at);
    }
    ink.textBaseline = "top";
    ink.textAlign = "center";
    for (const x of ticks(x0, x1, Math.max(2, Math.floor((box.right - box.left) / 55)))) {
      const at = box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
      if (at < box.right - 34) ink.fillText(short(x), at, box.bottom + 5);
    }
    ink.textAlign = "right";
    ink.fillText("kimg", box.right, box.bottom + 5);
  }

  reading(ink, box, names, colours, x, px, py) {
    const nearest = names
      .map((name) => [name, this.data[name].reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))])
      .sort((a, b) => b[1][1] - a[1][1]);
    if (!nearest.length) return;
    const at = px(nearest[0][1][0]);
    ink.strokeStyle = colour("--soft");
    ink.beginPath();
    ink.moveTo(at, box.top);
    ink.lineTo(at, box.bottom);
    ink.stroke();
    const lines = [[`${short(nearest[0][1][0])} kimg`, colour("--ink")], ...nearest.map(([name, p]) => [`${name} ${short(p[1])}`, colours.get(name)])];
    const wide = Math.max(...lines.map(([text]) => ink.measureText(text).width)) + 14;
    const left = at + wide + 10 < box.right ? at + 8 : at - wide - 8;
    ink.fillStyle = colour("--card");
    ink.globalAlpha = 0.92;
    ink.fillRect(left, box.top, wide, 15 * lines.length + 8);
    ink.globalAlpha = 1;
    ink.textAlign = "left";
    ink.textBaseline = "top";
    lines.forEach(([text, ink_], i) => {
      ink.fillStyle = ink_;
      ink.fillText(text, left + 7, box.top + 5 + 15 * i);
    });
    for (const [name, [kx, ky]] of nearest) {
      ink.fillStyle = colours.get(name);
      ink.beginPath();
      ink.arc(px(kx), py(ky), 3, 0, 7);
      ink.fill();
    }
  }
}

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) found.push(Math.abs(v) < 1e-9 * step ? 0 : v);
  return found;
}

const isLoss = (name) => /^loss|penalty|^r1|^r2|^pl|path_length/.test(name);

// Follows one run after another. `snapshots` is called with the list of a run's snapshots whenever it may have changed.
export class RunPanel {
  constructor(snapshots) {
    this.snapshots = snapshots;
    this.timer = null;
    this.source = null;
    this.losses = new Chart("Losses", (name) => /^loss/.test(name));
    this.others = new Chart("Other statistics", (name) => name === "score_real" || name === "score_fake");
    this.metrics = new Chart("Metrics", (name, all) => !all.some((other) => name.startsWith(`${other}_`)));
    $("charts").append(this.losses.root, this.metrics.root, this.others.root);
    document.addEventListener("visibilitychange", () => this.poll());
  }

  // Show a run's number, or nothing for null.
  follow(source, name) {
    this.source = source;
    this.version = "";
    this.grid = null;
    $("run").hidden = source === null;
    $("grid").hidden = true;
    $("run-title").textContent = name;
    for (const chart of this.charts()) chart.set({});
    this.poll();
  }

  charts() {
    return [this.losses, this.others, this.metrics];
  }

  redraw() {
    for (const chart of this.charts()) chart.draw();
  }

  async poll() {
    clearTimeout(this.timer);
    const { source } = this;
    if (source === null || document.hidden) return;
    let wait = POLL_MS;
    try {
      const found = await get(`/api/runs/${source}?version=${encodeURIComponent(this.version)}`);
      if (source !== this.source) return;
      this.version = found.version;
      this.update(found);
      if (found.status.state !== "training") wait = POLL_AT_REST_MS;
    } catch (fault) {
      $("run-state").textContent = fault.status ? fault.message : "no answer";
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), wait);
  }

  update({ status, snapshots, grid, curves, metrics }) {
    $("run-state").textContent = status.state;
    const share = status.end ? status.nimg / status.end : 0;
    $("run-progress").value = Math.min(share, 1);
    const kimg = (n) => (n / 1000).toFixed(n < 1e5 ? 1 : 0);
    const parts = [status.problem];
    if (status.end) parts.push(`${kimg(status.nimg)} of ${kimg(status.end)} kimg`);
    if (status.phase) parts.push(status.phase + (status.alpha === null || status.alpha === 1 ? "" : `, alpha ${status.alpha.toFixed(2)}`));
    if (status.state === "training") {
      if (status.img_per_sec) parts.push(`${short(status.img_per_sec)} images/s`);
      if (status.eta_sec !== null) parts.push(`${duration(status.eta_sec)} to go`);
    }
    if (status.faults) parts.push(`${status.faults} warnings or errors in the log`);
    $("run-text").textContent = parts.filter(Boolean).join(" · ");
    if (curves) {
      const pick = (wanted) => Object.fromEntries(Object.entries(curves).filter(([name]) => isLoss(name) === wanted));
      this.losses.set(pick(true));
      this.others.set(pick(false));
      this.metrics.set(metrics);
    }
    const name = grid && grid.name;
    if (name !== this.grid) {
      this.grid = name;
      $("grid").hidden = name === null;
      if (name !== null) {
        $("grid-picture").src = `/api/runs/${this.source}/grids/${encodeURIComponent(name)}`;
        $("grid-text").textContent = `The newest grid, ${(grid.nimg / 1000).toLocaleString("en")} kimg`;
      }
    }
    this.snapshots(snapshots);
  }
}
