// Which requests the queue shows, and in which order.

import { field, h, select } from "./dom.js";
import { VERDICTS } from "./format.js";

const ORDERS = [["value", "Highest value"], ["threshold", "Near the threshold"]];
const LABELLED = [["no", "not labelled"], ["yes", "labelled"], ["any", "all"]];
const TIMES = [["", "any time"], ["3600", "last hour"], ["86400", "last day"], ["604800", "last 7 days"], ["2592000", "last 30 days"]];
export const DEFAULTS = { order: "value", probe: "", verdicts: ["block", "flag", "escalate", "unmonitored"], key: "", time: "", labelled: "no" };

/** As the server's query has it. chosen.probe: "name/phase", or "" for whatever decided */
export function asQuery(chosen) {
  const cut = chosen.probe.lastIndexOf("/");
  const pair = cut < 0 ? {} : { probe: chosen.probe.slice(0, cut), phase: chosen.probe.slice(cut + 1) };
  const since = chosen.time ? Math.floor(Date.now() / 1000) - Number(chosen.time) : "";
  return { order: chosen.order, ...pair, verdict: chosen.verdicts, key: chosen.key, since, labelled: chosen.labelled };
}

/** pairs: the probes' "name/phase" that are known; changed: called with the new choice. */
export function filterBar(chosen, pairs, changed) {
  const put = (name) => (value) => changed({ ...chosen, [name]: value });
  const order = (value) => changed({ ...chosen, order: value, probe: value === "threshold" ? chosen.probe || pairs[0] || "" : chosen.probe });
  const key = h("input", { type: "search", name: "key", value: chosen.key, size: 9, placeholder: "any", spellcheck: "false", autocomplete: "off" });
  key.addEventListener("change", () => put("key")(key.value.trim()));
  const boxes = VERDICTS.map((name) => {
    const box = h("input", { type: "checkbox", name: `verdict-${name}`, checked: chosen.verdicts.includes(name) });
    box.addEventListener("change", () => {
      const left = VERDICTS.filter((v) => (v === name ? box.checked : chosen.verdicts.includes(v)));
      put("verdicts")(left.length ? left : DEFAULTS.verdicts);
    });
    return h("label", { class: "check" }, box, ` ${name}`);
  });
  const any = chosen.order === "threshold" ? [] : [["", "what decided"]];
  const isPlain = Object.keys(DEFAULTS).every((name) => name === "order" || String(chosen[name]) === String(DEFAULTS[name]));
  const known = [...new Set([...pairs, chosen.probe])].filter(Boolean); // also the chosen one that no row names just now
  return h("div", { class: "filters" },
    h("div", { class: "segments", role: "group", "aria-label": "Order" }, ORDERS.map(([value, words]) =>
      h("button", { type: "button", name: `order-${value}`, "aria-pressed": String(value === chosen.order), on: { click: () => order(value) } }, words))),
    h("details", { open: chosen.open || null, on: { toggle: (event) => { chosen.open = event.target.open; } } },
      h("summary", null, "Filters", isPlain ? null : h("span", { class: "dot", title: "some are set" }, " ●")),
      h("div", { class: "fields" },
        field("Probe", select([...any, ...known.map((p) => [p, p.replace("/", ", ")])], chosen.probe, put("probe"), { name: "probe" })),
        field("Time", select(TIMES, chosen.time, put("time"), { name: "time" })),
        field("Labels", select(LABELLED, chosen.labelled, put("labelled"), { name: "labelled" })),
        field("Key", key),
        h("fieldset", null, h("legend", null, "Verdict"), boxes))));
}
