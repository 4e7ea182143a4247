// The trace: a probe's score at every token, its thresholds, where the answer begins and where it crossed.

import { h, s } from "./dom.js";
import { isCounted, readingOf } from "./conversation.js";
import { figure, known } from "./format.js";

const HEIGHT = 190;
const EDGE = { left: 40, right: 14, top: 16, bottom: 26 };

export function traceChart(record, shared) {
  // Position 0 is a sink with a huge score: what does not count is a gap here, or it would flatten all the rest.
  const probes = Object.entries(record.token_scores).filter(([, scores]) => scores.length)
    .map(([name, scores]) => [name, scores.map((score, at) => (isCounted(record, at) ? score : null))]);
  if (!probes.length) return h("section", null, h("h3", null, "Trace"), h("p", { class: "soft" }, "No trace was kept: no probe crossed its threshold or broke."));
  const box = h("div", { class: "trace", tabindex: "0", role: "group", "aria-label": `${summary(record, probes)} Arrow keys go from token to token.` });
  const length = Math.max(...probes.map(([, scores]) => scores.length));
  let drawn = null;

  const draw = () => {
    const width = Math.max(260, Math.floor(box.clientWidth));
    if (drawn?.width === width) return;
    drawn = { width, ...plot(record, probes, length, width) };
    box.replaceChildren(drawn.svg);
    drawn.mark(shared.at);
  };
  new ResizeObserver(draw).observe(box);

  box.addEventListener("pointermove", (event) => {
    const x = event.clientX - box.getBoundingClientRect().left;
    if (drawn) shared.put(drawn.positionAt(x));
  });
  box.addEventListener("keydown", (event) => {
    const at = shared.at ?? -1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    shared.put(Math.max(0, Math.min(length - 1, to)));
  });
  shared.told((position) => drawn?.mark(position));
  return h("section", null, h("h3", null, "Trace", keyOf(probes)), box);
}

function summary(record, probes) {
  const lines = record.readings.filter((r) => probes.some(([name]) => name === r.probe)).map((r) =>
    `${r.probe}, ${r.phase}: value ${figure(r.value)}, threshold ${figure(r.threshold)}${known(r.crossed_at) ? `, crossed at token ${r.crossed_at}` : ""}.`);
  return `Scores over ${probes[0][1].length} tokens. ${lines.join(" ")}`;
}

function keyOf(probes) {
  return h("span", { class: "legend soft" }, probes.map(([name], i) => h("span", { class: `series${i % 3}` },
    s("svg", { width: 18, height: 8, "aria-hidden": "true" }, s("line", { class: "curve", x1: 0, x2: 18, y1: 4, y2: 4 })), ` ${name} `)),
  "- - threshold");
}

function plot(record, probes, length, width) {
  const n = record.coverage.prompt_tokens;
  const limits = probes.flatMap(([name]) => ["prompt", "response"].map((phase) => [name, phase, readingOf(record, name, phase).threshold])).filter(([, , t]) => known(t));
  const all = [...probes.flatMap(([, scores]) => scores), ...limits.map(([, , t]) => t), 0].filter(known);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const pad = 0.08 * (high - low || 1);
  const x = (position) => EDGE.left + ((width - EDGE.left - EDGE.right) * (position + 0.5)) / length;
  const y = (value) => EDGE.top + ((HEIGHT - EDGE.top - EDGE.bottom) * (high + pad - value)) / (high - low + 2 * pad);
  const edge = EDGE.left + ((width - EDGE.left - EDGE.right) * Math.min(n, length)) / length;
  const cursor = s("line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, x1: -9, x2: -9 });
  const svg = s("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" },
    record.counted.map(([from, to]) => s("rect", { class: "counted", x: x(from - 0.5), width: Math.max(0, x(Math.min(to, length) - 0.5) - x(from - 0.5)), y: HEIGHT - EDGE.bottom, height: 3 })),
    ticks(low, high).map((value) => [s("line", { class: value === 0 ? "grid zero" : "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      s("text", { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, figure(value, 0))]),
    length > n ? [s("line", { class: "edge", x1: edge, x2: edge, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      s("text", { x: edge + 4, y: HEIGHT - 8 }, "answer")] : null,
    s("text", { x: EDGE.left, y: HEIGHT - 8 }, "prompt"), s("text", { x: width - EDGE.right, y: HEIGHT - 8, "text-anchor": "end" }, `token ${length - 1}`),
    limits.map(([name, phase, value]) => s("line", { class: `limit series${probes.findIndex(([p]) => p === name) % 3}`,
      x1: phase === "prompt" ? EDGE.left : edge, x2: phase === "prompt" ? edge : width - EDGE.right, y1: y(value), y2: y(value) })),
    probes.map(([, scores], i) => s("path", { class: `curve series${i % 3}`, d: path(scores, x, y) })),
    probes.map(([name, scores], i) => crossings(record, name, scores, x, y, i, width)), cursor);
  return {
    svg,
    positionAt: (px) => Math.max(0, Math.min(length - 1, Math.floor(((px - EDGE.left) * length) / (width - EDGE.left - EDGE.right)))),
    mark: (position) => ["x1", "x2"].forEach((name) => cursor.setAttribute(name, position === null ? -9 : x(position))),
  };
}

/** Missing scores are gaps. */
function path(scores, x, y) {
  let pen = "M";
  return scores.map((score, i) => {
    if (!known(score)) {
      pen = "M";
      return "";
    }
    const step = `${pen}${x(i).toFixed(1)} ${y(score).toFixed(1)}${pen === "M" ? "h.01" : ""}`;
    pen = "L";
    return step;
  }).join("");
}

/** A prompt's words stand before its point and an answer's behind it, where there is room: two that are close don't meet. */
function crossings(record, probe, scores, x, y, i, width) {
  const isBefore = (r) => (r.phase === "prompt" ? x(r.crossed_at) > 110 : x(r.crossed_at) > width - 110);
  return ["prompt", "response"].map((phase) => readingOf(record, probe, phase)).filter((r) => known(r.crossed_at) && known(scores[r.crossed_at])).map((r) => [
    s("circle", { class: `crossed series${i % 3}`, cx: x(r.crossed_at), cy: y(scores[r.crossed_at]), r: 4.5 }),
    s("text", { class: "said", x: x(r.crossed_at) + (isBefore(r) ? -7 : 7), y: Math.max(11, y(scores[r.crossed_at]) - 6),
      "text-anchor": isBefore(r) ? "end" : "start" }, `crossed at ${r.crossed_at}`)]);
}

function ticks(low, high) {
  const step = [1, 2, 5, 10, 20, 50, 100, 1000].find((size) => (high - low) / size <= 5) ?? (high - low) / 4;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, i) => (first + i) * step);
}
