// The logit lens, on demand: what each block would say next. The server runs it in a process of its own, one at a time.

import { post } from "./api.js";
import { button, h } from "./dom.js";
import { figure, known, word } from "./format.js";

export function lensSection(id, choice) {
  const out = h("div", { class: "lens", "aria-live": "polite" });
  const go = button(["Logit lens ", h("kbd", null, "l")], async () => {
    go.disabled = true;
    out.replaceChildren(h("p", { class: "soft" }, "Reading every block. The model is loaded again for this, which takes a while …"));
    try {
      out.replaceChildren(...grid(await post("/admin/lens", { id, choice })));
    } catch (error) {
      out.replaceChildren(h("p", { class: "bad", role: "alert" }, error.message));
    }
    go.disabled = false;
  }, { class: "lensgo" });
  return h("section", null, h("h3", null, "What each block would say next"), go, out);
}

/** What the key does. */
export function openLens(place) {
  const go = place.querySelector(".lensgo");
  go?.scrollIntoView({ block: "nearest" });
  go?.click();
}

function grid(found) {
  const layers = found.top.map((_, layer) => layer).reverse();
  const head = found.tokens.map((token, i) => h("th", { scope: "col", class: found.counts[i] ? "counts" : null }, word(token)));
  const words = layers.map((layer) => h("tr", null, h("th", { scope: "row" }, layer), found.top[layer].map((cell) => wordCell(cell))));
  const probes = Object.entries(found.probes).map(([name, probe]) => [
    h("tr", null, h("th", { scope: "row", colspan: found.tokens.length + 1, class: "name" }, `${name} reads block ${probe.reads.join(", ")}`)),
    probe.reads.map((layer) => h("tr", null, h("th", { scope: "row" }, layer), probe.values[layer].map(valueCell)))]);
  return [h("p", { class: "soft" }, `${found.model}: ${layers.length} blocks, the last ${found.tokens.length} tokens. ${found.verdicts.join(" · ")}`),
    h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Logit lens" },
      h("table", { class: "grid" }, h("thead", null, h("tr", null, h("th", { scope: "col" }, "block"), head)), h("tbody", null, words, probes)))];
}

function wordCell(cell) {
  const [text, probability] = cell[0];
  const all = cell.map(([w, p]) => `${(100 * p).toFixed(1)} %  ${word(w)}`).join("\n");
  return h("td", { class: `sure${Math.min(4, Math.floor(probability * 5))}`, title: all }, word(text));
}

function valueCell(value) {
  const step = known(value) ? Math.max(-4, Math.min(4, Math.round(value))) : null;
  return h("td", { class: step === null ? "n" : `n heat${step}` }, figure(value, 1));
}
