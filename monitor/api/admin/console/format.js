// Numbers, times and verdicts as they are written everywhere in the console.

import { h, visible } from "./dom.js";

const SHAPES = { block: "■", flag: "▲", escalate: "◆", unmonitored: "◇", allow: "○" };
export const VERDICTS = ["block", "flag", "escalate", "unmonitored", "allow"];

export const known = (value) => value !== null && value !== undefined;
export const figure = (value, digits = 2) => (known(value) ? value.toFixed(digits).replace("-", "−") : "–");
export const difference = (value) => (value >= 0 ? "+" : "") + figure(value);
export const percent = (share) => (known(share) ? `${(100 * share).toFixed(share < 0.1 ? 2 : 0)} %` : "–");
export const count = (value) => (known(value) ? value.toLocaleString("en") : "–");

/** A verdict: its shape says it too, for who can't tell the colours. */
export function verdict(name) {
  return h("span", { class: `verdict ${name in SHAPES ? name : "allow"}` },
    h("span", { "aria-hidden": "true" }, SHAPES[name] ?? "·"), ` ${name}`);
}

/** seconds since the epoch -> how long ago, and when exactly. */
export function time(seconds, exact = false) {
  const date = new Date(seconds * 1000);
  if (Number.isNaN(date.getTime())) return h("span", null, "–");
  const whole = date.toLocaleString("sv-SE");
  return h("time", { datetime: date.toISOString(), title: whole }, exact ? whole : ago(Date.now() / 1000 - seconds));
}

function ago(seconds) {
  if (seconds < 60) return "now";
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return "";
}

/** One token on one line. */
export function word(text) {
  const shown = visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return shown.trim() === "" ? "␣".repeat(shown.length) || "∅" : shown;
}

/** How strong a token's colour is: −4 .. 4; `full` and more is full strength. */
export function heat(value, full) {
  if (!known(value)) return null;
  const steps = Math.round((4 * value) / full);
  return Math.max(-4, Math.min(4, steps));
}

/** What 95 % of a text's values stay below, and no less than the threshold: one peak must not hide the rest. */
export function fullHeat(threshold, values) {
  const sizes = values.filter(known).map(Math.abs).sort((a, b) => a - b);
  return Math.max(1, threshold ?? 0, sizes[Math.floor(0.95 * (sizes.length - 1))] ?? 0);
}
