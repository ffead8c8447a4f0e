"use strict";
// Draws the charts of a sweep's report at the width that there is, and the table. Text only ever goes into text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const byIndex = new Map(data.trials.map(t => [t.index, t]));
const sign = data.minimize ? 1 : -1;
const tip = document.getElementById("tip");
const NS = "http://www.w3.org/2000/svg";

const figure = v => v === undefined || v === null ? "–" : typeof v !== "number" ? String(v) :
  v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6) ? v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e") : String(+v.toPrecision(4));
const duration = s => s < 60 ? `${Math.round(s)} s` : s < 3600 ? `${+(s / 60).toPrecision(2)} min` : `${+(s / 3600).toPrecision(3)} h`;
const better = (a, b) => sign * a < sign * b;
const outcomes = { Complete: "complete", Pruned: "pruned", Failed: "failed", Ignored: "not counted", Open: "open" };
const isBest = t => t.name === data.best;
const last = t => t.value !== null ? t.value : t.evaluations.length ? t.evaluations[t.evaluations.length - 1][1] : null;

// Rank among those that have ended, from 0 (the best) to 1: one outlier would take all colours for itself otherwise.
const ended = data.trials.filter(t => t.value !== null).sort((a, b) => sign * (a.value - b.value));
const rank = new Map(ended.map((t, i) => [t.index, ended.length > 1 ? i / (ended.length - 1) : 0]));

function node(parent, tag, attributes = {}, text) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}
function html(parent, tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.appendChild(made);
  return made;
}
function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function mix(share) {  // 0 is near, 1 is far
  const rgb = name => css(name).match(/[0-9a-f]{2}/gi).map(h => parseInt(h, 16));
  const [near, far] = [rgb("--near"), rgb("--far")];
  return `rgb(${near.map((v, i) => Math.round(v + (far[i] - v) * Math.sqrt(share))).join(",")})`;
}
function shorten(text, room) { text = String(text); const most = Math.max(4, Math.floor(room / 7)); return text.length > most ? text.slice(0, most - 1) + "…" : text; }

// ---------------------------------------------------------------------------------------------------------- scales ----
function ticksOf(low, high, count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(+v.toPrecision(12));
  return found;
}
function linear(low, high, from, to, count = 5) {
  if (!(high > low)) { const room = Math.abs(low) * 0.05 || 1; low -= room; high += room; }
  return { at: v => from + (v - low) / (high - low) * (to - from), ticks: ticksOf(low, high, count), low, high };
}
function logarithmic(low, high, from, to, count = 5) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const found = [];
  for (const steps of [[1], [1, 3], [1, 2, 5]]) {
    found.length = 0;
    for (let e = Math.floor(inner.low); e <= inner.high; e++) for (const m of steps) { const v = m * 10 ** e; if (v >= low * 0.999 && v <= high * 1.001) found.push(v); }
    if (found.length >= 3) break;
  }
  const every = Math.ceil(found.length / (count + 1));
  return { at: v => inner.at(Math.log10(v)), ticks: found.filter((_, i) => i % every === 0), low, high };
}
function ofParameter(p, from, to, count) {
  if (p.values) {
    const slot = (to - from) / p.values.length, key = v => `${typeof v} ${v}`;
    const place = new Map(p.values.map((v, i) => [key(v), from + slot * (i + 0.5)]));
    return { at: v => place.get(key(v)) ?? from, ticks: p.values, slot: Math.abs(slot) };
  }
  const values = data.trials.map(t => t.parameters[p.name]).filter(v => typeof v === "number");
  const low = p.min ?? values.reduce((a, b) => Math.min(a, b), Infinity), high = p.max ?? values.reduce((a, b) => Math.max(a, b), -Infinity);
  return (p.log && low > 0 ? logarithmic : linear)(low, high, from, to, count);
}
// The objective's axis: single bad trials (a diverged loss) may not press all others into a line.
function ofObjective(values, from, to, count = 5) {
  const sorted = values.filter(v => v !== null).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const at = share => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  let low = sorted[0], high = sorted[sorted.length - 1];
  const spread = at(0.9) - at(0.1);
  if (sorted.length > 8 && spread > 0) {
    if (sign > 0) high = Math.min(high, at(0.9) + 1.5 * spread); else low = Math.max(low, at(0.1) - 1.5 * spread);
  }
  const room = (high - low) * 0.06;
  const scale = linear(low - room, high + room, from, to, count);
  return { ...scale, at: v => scale.at(Math.max(scale.low, Math.min(scale.high, v))) };
}

// ---------------------------------------------------------------------------------------------------------- charts ----
function frame(place, height, label) {
  const width = Math.max(240, place.clientWidth);
  const svg = node(place, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  return { svg, width, height };
}
function axes(svg, x, y, box, xText, xFormat = figure) {
  for (const v of y.ticks) {
    node(svg, "line", { class: "rule", x1: box.left, x2: box.right, y1: y.at(v), y2: y.at(v) });
    node(svg, "text", { x: box.left - 8, y: y.at(v) + 4, "text-anchor": "end" }, figure(v));
  }
  for (const v of x.ticks) node(svg, "text", { x: x.at(v), y: box.bottom + 18, "text-anchor": "middle" }, xFormat(v));
  node(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  node(svg, "text", { x: box.right, y: box.bottom + 36, "text-anchor": "end" }, xText);
}
function describe(t) {
  const lines = [`${t.name} · ${outcomes[t.outcome] || t.outcome}${t.reason && t.outcome !== "Complete" ? ` (${t.reason})` : ""}`];
  const value = last(t);
  if (value !== null) lines.push(`${data.metric} ${figure(value)}`);
  for (const p of data.parameters) if (p.name in t.parameters) lines.push(`${p.name}: ${figure(t.parameters[p.name])}`);
  return lines.join("\n");
}
function point(svg, found) {  // found(x, y): [element or null, trial] that is near, or nothing
  let lit = null;
  const move = event => {
    const box = svg.getBoundingClientRect(), hit = found(event.clientX - box.left, event.clientY - box.top);
    if (lit) lit.classList.remove("on");
    lit = hit && hit[0];
    tip.hidden = !hit;
    if (!hit) return;
    if (lit) { lit.classList.add("on"); lit.parentNode.appendChild(lit); }
    tip.textContent = describe(hit[1]);
    const right = event.clientX + 16 + tip.offsetWidth < innerWidth;
    tip.style.left = `${Math.max(6, right ? event.clientX + 14 : event.clientX - tip.offsetWidth - 14)}px`;
    tip.style.top = `${Math.max(6, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6))}px`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; if (lit) lit.classList.remove("on"); lit = null; });
}
function nearest(points, x, y, most = 24) {  // points: [x, y, element, trial]
  let hit = null, least = most * most;
  for (const p of points) { const d = (p[0] - x) ** 2 + (p[1] - y) ** 2; if (d < least) { least = d; hit = p; } }
  return hit && [hit[2], hit[3]];
}
function empty(place, text) { html(place, "p", text, "empty"); }
function legend(place, items) {
  const list = html(place, "div", undefined, "legend");
  for (const [text, colour] of items) html(list, "span", text).style.setProperty("--key", `var(${colour})`);
}
function path(points) { return points.map((p, i) => `${i ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}`).join(""); }

function curves(place) {
  const shown = data.curves.map(i => byIndex.get(i)).filter(t => t.evaluations.length);
  if (!shown.length) return empty(place, "No trial has evaluated yet.");
  const { svg, width, height } = frame(place, Math.min(380, Math.max(260, place.clientWidth * 0.42)), "Learning curves");
  const box = { left: 52, right: width - 12, top: 22, bottom: height - 44 };
  const all = shown.flatMap(t => t.evaluations);
  const y = ofObjective(all.map(e => e[1]), box.bottom, box.top);
  const x = linear(0, all.reduce((m, e) => Math.max(m, e[0]), 0), box.left, box.right, width < 500 ? 4 : 8);
  axes(svg, x, y, box, "training examples seen", v => v.toLocaleString("en"));
  for (const rung of data.rungs) if (rung <= x.high) {
    node(svg, "line", { class: "rung", x1: x.at(rung), x2: x.at(rung), y1: box.top, y2: box.bottom });
  }
  const points = [], order = t => isBest(t) ? 2 : t.outcome === "Complete" ? 1 : 0;
  for (const t of [...shown].sort((a, b) => order(a) - order(b))) {
    const line = t.evaluations.map(e => [x.at(e[0]), y.at(e[1])]);
    const kind = isBest(t) ? "best" : "";
    const drawn = node(svg, "path", { class: `trial ${kind}`, d: path(line), stroke: `var(${t.outcome === "Complete" ? "--plain" : "--faint"})`, opacity: t.outcome === "Complete" ? 0.75 : 0.45 });
    if (line.length === 1) node(svg, "circle", { class: kind, cx: line[0][0], cy: line[0][1], r: 2.5, fill: `var(${t.outcome === "Complete" ? "--plain" : "--faint"})`, opacity: 0.6 });
    for (const [px, py] of line) points.push([px, py, drawn, t]);
  }
  point(svg, (px, py) => nearest(points, px, py));
  legend(place, [["best trial", "--best"], ["ran to the end", "--plain"], ["pruned or not ended", "--faint"]]);
  if (shown.length < data.trials.filter(t => t.evaluations.length).length) html(place, "p", `${shown.length} of ${data.trials.length} trials are drawn, the best among them.`, "note");
}

function bestSoFar(place, order, cost, xText, xFormat) {
  const rows = order.filter(t => t.value !== null);
  if (!rows.length) return empty(place, "No trial has ended with a value yet.");
  const { svg, width, height } = frame(place, 250, xText);
  const box = { left: 52, right: width - 12, top: 10, bottom: height - 44 };
  const y = ofObjective(rows.map(t => t.value), box.bottom, box.top, 4), x = linear(0, Math.max(...order.map(cost).slice(-1), 1), box.left, box.right, 4);
  axes(svg, x, y, box, xText, xFormat);
  const line = [], points = [], dots = new Set(data.dots);
  let best = null;
  for (const t of rows) {
    const px = x.at(cost(t));
    if (best === null || better(t.value, best)) {
      if (best !== null) line.push([px, y.at(best)]);
      best = t.value;
      line.push([px, y.at(best)]);
    }
    if (dots.has(t.index) || isBest(t)) {
      const dot = node(svg, "circle", { class: isBest(t) ? "best" : "", cx: px, cy: y.at(t.value), r: isBest(t) ? 5.5 : 2.8, fill: "var(--plain)", opacity: 0.55 });
      points.push([px, y.at(t.value), null, t]);
      if (isBest(t)) dot.dataset.top = "1";
    }
  }
  line.push([box.right, y.at(best)]);
  node(svg, "path", { class: "step", d: path(line) });
  const top = svg.querySelector("[data-top]");
  if (top) svg.appendChild(top);
  point(svg, (px, py) => nearest(points, px, py));
}

function parallel(place) {
  const shown = data.lines.map(i => byIndex.get(i)).sort((a, b) => (isBest(a) ? 1 : 0) - (isBest(b) ? 1 : 0) || rank.get(b.index) - rank.get(a.index));
  if (!shown.length || !data.parameters.length) return empty(place, "No trial has ended with a value yet.");
  const room = place.clientWidth, columns = data.parameters.length + 1, tall = room / columns < 96;
  if (tall) return parallelTall(place, shown);
  const { svg, width, height } = frame(place, 340, "Parameters and result of each trial");
  const top = 40, bottom = height - 34, gap = (width - 150) / (columns - 1);
  const names = [...data.parameters.map(p => p.name), data.metric];
  const scales = [...data.parameters.map(p => ofParameter(p, bottom, top, 5)), ofObjective(shown.map(t => t.value), bottom, top)];
  const at = column => 70 + column * gap;
  draw(svg, shown, t => scales.map((s, c) => [at(c), c < columns - 1 ? (names[c] in t.parameters ? s.at(t.parameters[names[c]]) : height - 10) : s.at(t.value)]));
  scales.forEach((s, c) => {
    node(svg, "line", { class: "axis", x1: at(c), x2: at(c), y1: top, y2: bottom });
    label(svg, at(c), 18, "middle", names[c], gap - 8);
    for (const v of s.ticks) mark(svg, at(c) - 7, s.at(v) + 4, "end", figure(v), gap - 16);
  });
  if (shown.some(t => data.parameters.some(p => !(p.name in t.parameters)))) node(svg, "text", { x: 0, y: height - 6 }, "not used");
}
// On a narrow screen the axes lie, one below the other.
function parallelTall(place, shown) {
  const names = [...data.parameters.map(p => p.name), data.metric], row = 62;
  const { svg, width } = frame(place, names.length * row + 6, "Parameters and result of each trial");
  const left = 10, right = width - 22;
  const scales = [...data.parameters.map(p => ofParameter(p, left, right, 3)), ofObjective(shown.map(t => t.value), left, right, 3)];
  const at = r => 30 + r * row;
  draw(svg, shown, t => scales.map((s, r) => [r < data.parameters.length ? (names[r] in t.parameters ? s.at(t.parameters[names[r]]) : width - 4) : s.at(t.value), at(r)]));
  scales.forEach((s, r) => {
    node(svg, "line", { class: "axis", x1: left, x2: right, y1: at(r), y2: at(r) });
    label(svg, left, at(r) - 9, "start", names[r], width - 20);
    const every = s.slot && s.slot < 40 ? Math.ceil(40 / s.slot) : 1;
    s.ticks.forEach((v, i) => i % every || mark(svg, s.at(v), at(r) + 16, "middle", figure(v), s.slot ? s.slot * every - 4 : 70));
  });
}
function draw(svg, shown, line) {
  const points = [];
  for (const t of shown) {
    const made = line(t), share = rank.get(t.index) ?? 1;
    const drawn = node(svg, "path", { class: `trial ${isBest(t) ? "best" : ""}`, d: path(made), stroke: mix(share), opacity: share < 0.15 ? 0.95 : 0.6 });
    for (let i = 0; i + 1 < made.length; i++) for (let k = 0; k <= 6; k++) {
      points.push([made[i][0] + (made[i + 1][0] - made[i][0]) * k / 6, made[i][1] + (made[i + 1][1] - made[i][1]) * k / 6, drawn, t]);
    }
  }
  const lines = svg.querySelectorAll("path").length;
  point(svg, (px, py) => lines && nearest(points, px, py, 16));
}
function halo(text) { text.setAttribute("style", "paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round"); return text; }
function label(svg, x, y, anchor, text, room) { halo(node(svg, "text", { class: "name", x, y, "text-anchor": anchor }, shorten(text, room))); }
function mark(svg, x, y, anchor, text, room) { halo(node(svg, "text", { x, y, "text-anchor": anchor }, shorten(text, room))); }

function importance(place) {
  const rows = [...data.importance].sort((a, b) => b[1] - a[1]);
  if (!rows.length) return empty(place, "It is estimated once ten trials have ended.");
  const row = 30, { svg, width } = frame(place, rows.length * row, "Importance of the parameters");
  const left = Math.min(220, width * 0.42), most = rows[0][1] || 1;
  rows.forEach(([name, share], i) => {
    const y = i * row, long = Math.max(1.5, (width - left - 52) * share / most);
    node(svg, "text", { x: left - 10, y: y + 19, "text-anchor": "end" }, shorten(name, left - 12));
    node(svg, "rect", { class: "bar", x: left, y: y + 6, width: long, height: 18, rx: 3 });
    node(svg, "text", { x: left + long + 8, y: y + 19 }, `${Math.round(share * 100)} %`);
  });
}

function slices(place) {
  const shown = data.dots.map(i => byIndex.get(i));
  if (!shown.length) return empty(place, "No trial has evaluated yet.");
  const list = html(place, "div", undefined, "small");
  const y0 = shown.filter(t => t.value !== null).map(last);
  for (const p of data.parameters) {
    const cell = html(list, "div"), { svg, width, height } = frame(cell, 210, `${data.metric} over ${p.name}`);
    const box = { left: 46, right: width - 10, top: 26, bottom: height - 30 };
    const y = ofObjective(y0.length ? y0 : shown.map(last), box.bottom - 20, box.top, 4), x = ofParameter(p, box.left, box.right, 3);
    for (const v of y.ticks) {
      node(svg, "line", { class: "rule", x1: box.left, x2: box.right, y1: y.at(v), y2: y.at(v) });
      node(svg, "text", { x: box.left - 7, y: y.at(v) + 4, "text-anchor": "end" }, figure(v));
    }
    const every = x.slot && x.slot < 34 ? Math.ceil(34 / x.slot) : 1;
    x.ticks.forEach((v, i) => i % every || node(svg, "text", { x: x.at(v), y: box.bottom + 18, "text-anchor": "middle" }, shorten(figure(v), x.slot ? x.slot * every : 70)));
    node(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
    label(svg, 0, 14, "start", p.log ? `${p.name} (logarithmic)` : p.name, width);
    const points = [], ordered = [...shown].sort((a, b) => (isBest(a) ? 1 : 0) - (isBest(b) ? 1 : 0) || (a.value === null ? 0 : 1) - (b.value === null ? 0 : 1));
    for (const t of ordered) if (p.name in t.parameters) {
      // Of several trials with one value of few, each gets a place of its own, always the same.
      const apart = x.slot ? ((t.index * 0.618034) % 1 - 0.5) * Math.min(x.slot * 0.6, 40) : 0;
      // Values of those that were pruned are of earlier times: they would look worse than they are.
      const cx = x.at(t.parameters[p.name]) + apart, cy = t.value !== null ? y.at(t.value) : box.bottom - 8;
      const look = t.value !== null ? { fill: "var(--plain)", opacity: 0.7 } : { fill: "none", stroke: "var(--faint)", opacity: 0.8 };
      node(svg, "circle", { class: isBest(t) ? "best" : "", cx, cy, r: isBest(t) ? 5.5 : 3.2, ...look });
      points.push([cx, cy, null, t]);
    }
    point(svg, (px, py) => nearest(points, px, py, 18));
  }
}

// ----------------------------------------------------------------------------------------------------------- table ----
const PAGE = 100;
function table() {
  const place = document.querySelector("#trials table"), more = document.querySelector("#trials > button");
  const numeric = p => !p.values || p.values.every(v => typeof v === "number");
  const columns = [
    ["Trial", t => t.index, t => t.name, false],
    ["Outcome", t => t.outcome, t => outcomes[t.outcome] || t.outcome, false],
    [data.metric, t => t.value, t => figure(t.value), true],
    ...data.parameters.map(p => [p.name, t => t.parameters[p.name], t => figure(t.parameters[p.name]), numeric(p)]),
    ["Examples seen", t => t.evaluations.length ? t.evaluations[t.evaluations.length - 1][0] : null, t => t.evaluations.length ? t.evaluations[t.evaluations.length - 1][0].toLocaleString("en") : "–", true],
    ["Time", t => t.seconds, t => duration(t.seconds), true],
    ["Chosen by", t => t.algorithm, t => t.algorithm || "–", false],
  ];
  let by = 2, up = data.minimize, all = data.trials.length <= PAGE * 1.2;
  const head = html(html(place, "thead"), "tr"), body = html(place, "tbody");
  const heads = columns.map(([name, , , n], i) => {
    const cell = html(head, "th", undefined, n ? "n" : "");
    cell.scope = "col";
    const button = html(cell, "button", name);
    button.type = "button";
    button.addEventListener("click", () => { up = by === i ? !up : !(i === 2 && !data.minimize); by = i; fill(); });
    return cell;
  });
  const compare = (a, b) => {
    const [x, y] = [columns[by][1](a), columns[by][1](b)], none = v => v === null || v === undefined || v === "";
    if (none(x) || none(y)) return none(x) - none(y) || a.index - b.index;  // what is not there stands last, however it is sorted
    const c = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return (up ? c : -c) || a.index - b.index;
  };
  function fill() {
    heads.forEach((h, i) => i === by ? h.setAttribute("aria-sort", up ? "ascending" : "descending") : h.removeAttribute("aria-sort"));
    body.textContent = "";
    const rows = [...data.trials].sort(compare), made = document.createDocumentFragment();
    for (const t of all ? rows : rows.slice(0, PAGE)) {
      const row = html(made, "tr", undefined, isBest(t) ? "best" : "");
      columns.forEach(([name, , text, n], i) => {
        const cell = html(row, "td", text(t), i === 1 ? t.outcome : n ? "n" : "");
        if (i === 1 && t.reason) cell.title = t.reason;
      });
    }
    body.appendChild(made);
    more.hidden = all;
    more.textContent = `Show all ${data.trials.length.toLocaleString("en")} trials`;
  }
  more.addEventListener("click", () => { all = true; fill(); });
  fill();
}

// ------------------------------------------------------------------------------------------------------------ page ----
const byEnd = data.trials.filter(t => t.seconds || t.value !== null).sort((a, b) => (a.finished ?? Infinity) - (b.finished ?? Infinity) || a.index - b.index);
const costs = new Map();
byEnd.reduce((sum, t) => { costs.set(t.index, sum + t.seconds); return sum + t.seconds; }, 0);
const total = Math.max(0, ...byEnd.slice(-1).map(t => costs.get(t.index)));
const unit = total > 7200 ? [3600, "hours"] : total > 180 ? [60, "minutes"] : [1, "seconds"];
const charts = {
  curves, parallel, importance, slices,
  overTrials: place => bestSoFar(place, data.trials, t => t.index + 1, "trials", v => v.toLocaleString("en")),
  overCost: place => bestSoFar(place, byEnd, t => costs.get(t.index) / unit[0], `${unit[1]} that trials ran`, figure),
};
let drawnAt = 0;
function drawAll() {
  drawnAt = document.documentElement.clientWidth;
  tip.hidden = true;
  for (const [name, draw] of Object.entries(charts)) {
    const place = document.querySelector(`#${name} .plot`);
    place.textContent = "";
    draw(place);
  }
}
drawAll();
table();
let waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  if (document.documentElement.clientWidth !== drawnAt) waiting = setTimeout(drawAll, 120);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
