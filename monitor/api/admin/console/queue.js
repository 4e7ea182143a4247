// The queue and, beside it, the request that is looked at. One key labels it and goes on to the next.

import { get, post, withQuery } from "./api.js";
import { button, h, s, say } from "./dom.js";
import { asQuery, DEFAULTS, filterBar } from "./filters.js";
import { difference, figure, known, time, verdict } from "./format.js";
import { setKeys } from "./keys.js";
import { openLens } from "./lens.js";
import { fill, showRequest, stopShowing } from "./record.js";

const SOON_MS = 90; // who holds j down is not served every request on the way
let chosen = { ...DEFAULTS };

const idOf = (entry) => `${entry.id}/${entry.choice}`;
const linkTo = (entry) => `#/request/${encodeURIComponent(entry.id)}/${entry.choice}`;

/** Where a value lies: the tick in the middle is the threshold. */
function gauge(entry) {
  if (!known(entry.value) || !known(entry.threshold)) return h("span", { class: "gauge none" });
  const margin = entry.value - entry.threshold;
  const x = 32 + 30 * Math.tanh(margin / 4);
  return s("svg", { class: `gauge ${margin > 0 ? "hot" : "cold"}`, viewBox: "0 0 64 12", width: 64, height: 12, "aria-hidden": "true" },
    s("line", { class: "rail", x1: 1, x2: 63, y1: 6, y2: 6 }), s("line", { class: "bar", x1: 32, x2: x, y1: 6, y2: 6 }),
    s("line", { class: "tick", x1: 32, x2: 32, y1: 1, y2: 11 }), s("circle", { cx: x, cy: 6, r: 3 }));
}

function row(entry) {
  const margin = known(entry.value) && known(entry.threshold) ? difference(entry.value - entry.threshold) : null;
  return h("li", null, h("a", { href: linkTo(entry), "data-id": idOf(entry) },
    h("span", { class: "line" }, verdict(entry.verdict), h("span", { class: "spring" }), gauge(entry),
      h("span", { class: "n" }, known(entry.value) ? figure(entry.value) : "no score"), h("span", { class: "n soft margin" }, margin)),
    h("span", { class: "line soft" }, h("span", { class: "cut" }, entry.probe ? `${entry.probe}, ${entry.phase}` : "no reading"),
      h("span", { class: "spring" }), h("span", { class: "mark" }, mark(entry.label)),
      h("span", { class: "cut" }, entry.key || "no key"), time(entry.time))));
}

function mark(label) {
  return label ? h("span", { class: `label ${label.label}` }, label.label) : null;
}

export function showQueue(place, first) {
  const list = h("ol", { class: "list" });
  const foot = h("p", { class: "foot soft" });
  const heard = h("p", { class: "aside", role: "status" }); // where one is, for who does not see it
  const bar = h("div");
  const side = h("section", { class: "side", "aria-label": "Queue" }, h("h1", { class: "aside" }, "Queue"), heard, bar, list, foot);
  const detail = h("section", { class: "detail", "aria-label": "Request", tabindex: "-1" });
  place.append(side, detail);
  // wanted: the request that was asked for; shown: the one that is drawn, null while it is not the wanted one. Only
  // what is shown can be labelled, one at a time.
  const state = { entries: [], next: null, at: -1, open: null, pairs: [], last: null, load: null, opens: 0, wanted: null, shown: null, sending: false };
  detail.addEventListener("midstream:shown", (event) => { state.shown = event.detail; });
  // Forgotten, so that it is asked for again when it is chosen again, as by r.
  detail.addEventListener("midstream:failed", (event) => { if (state.wanted === event.detail) state.wanted = null; });

  function drawBar() {
    const name = bar.contains(document.activeElement) ? document.activeElement.name : null;
    bar.replaceChildren(filterBar(chosen, state.pairs, (changed) => {
      chosen = changed;
      drawBar();
      load();
    }));
    if (name) bar.querySelector(`[name="${name}"]`)?.focus(); // whoever is there by keyboard stays there
  }

  /** Returns whether it was drawn. */
  async function load(more = false) {
    state.load?.abort();
    const load_ = (state.load = new AbortController());
    if (!more) foot.textContent = "…";
    try {
      const after = more ? { after: state.next, around: state.around } : {};
      const page = await get(withQuery("/admin/queue", { ...asQuery(chosen), ...after }), load_.signal);
      if (!more) {
        Object.assign(state, { entries: [], at: -1 });
        list.replaceChildren();
      }
      state.entries.push(...page.entries);
      Object.assign(state, { next: page.next, around: page.around });
      list.append(...page.entries.map(row));
      learn(page.entries);
      const n = state.entries.length;
      foot.replaceChildren(n === 0 ? "Nothing here. " : `${n} shown${page.next ? "" : ", that is all"}. `,
        page.around !== null ? `Distances from ${figure(page.around)}. ` : "",
        page.next ? button("More", () => load(true), { class: "quiet" }) : "");
      select_(state.open ?? (wide() && n ? idOf(state.entries[0]) : null));
      if (!more && n === 0 && !state.open) showNothing();
      return true;
    } catch (error) {
      if (error.name !== "AbortError") foot.replaceChildren(h("span", { class: "bad", role: "alert" }, error.message));
      return false;
    }
  }

  function showNothing() {
    clearTimeout(state.opens);
    stopShowing();
    state.wanted = state.shown = null;
    fill(detail, [h("p", { class: "empty soft" }, "Nothing waits for a label here.")]);
  }

  function learn(entries) {
    const before = state.pairs.length;
    for (const e of entries) {
      const pair = `${e.probe}/${e.phase}`;
      if (e.probe && !state.pairs.includes(pair)) state.pairs.push(pair);
    }
    if (state.pairs.length > before) drawBar();
  }

  /** id: "ID/choice"; quiet: the address is left alone. */
  function select_(id) {
    for (const link of list.querySelectorAll("a[aria-current]")) link.removeAttribute("aria-current");
    state.at = state.entries.findIndex((entry) => idOf(entry) === id);
    const link = list.children[state.at]?.firstElementChild;
    link?.setAttribute("aria-current", "true");
    link?.scrollIntoView({ block: "nearest" });
    const entry = state.entries[state.at];
    heard.textContent = entry ? `${state.at + 1} of ${state.entries.length}: ${entry.verdict}, ${entry.probe} ${entry.phase} ${figure(entry.value)}` : "";
    if (id !== null && id !== state.wanted) openSoon(id);
  }

  function openSoon(id) {
    state.wanted = id;
    state.shown = null;
    clearTimeout(state.opens);
    stopShowing();
    const cut = id.lastIndexOf("/");
    state.opens = setTimeout(() => showRequest(detail, id.slice(0, cut), Number(id.slice(cut + 1)), label), SOON_MS);
  }

  /** Returns whether another request is wanted now. */
  async function go(steps) {
    const { wanted } = state;
    if (state.at + steps >= state.entries.length && state.next && !(await load(true))) return false;
    if (state.wanted !== wanted || !state.entries.length) return false; // somebody has gone elsewhere meanwhile
    const to = state.at < 0 ? 0 : Math.max(0, Math.min(state.entries.length - 1, state.at + steps));
    history.replaceState(null, "", linkTo(state.entries[to]));
    move(location.hash.split("/").slice(2));
    return state.wanted !== wanted;
  }

  async function label(word) {
    const id = state.shown;
    if (!wide() && !state.open) return;
    if (id === null || state.sending) {
      if (state.wanted !== null) say(`Not labelled: ${state.sending ? "the label before is being sent" : "the request is not on screen yet"}`);
      return;
    }
    const cut = id.lastIndexOf("/");
    state.sending = true;
    try {
      const done = await post("/admin/labels", { id: id.slice(0, cut), choice: Number(id.slice(cut + 1)), label: word });
      state.last = id;
      say(`${word}${done.before ? `; it was ${done.before}` : ""}. z goes back`);
      const at = state.entries.findIndex((entry) => idOf(entry) === id);
      if (at >= 0) {
        state.entries[at].label = { label: word, by: done.by };
        list.children[at].classList.add("done");
        list.children[at].querySelector(".mark").replaceChildren(mark(state.entries[at].label));
      }
      document.dispatchEvent(new CustomEvent("midstream:labelled"));
      const gone = at >= 0 && at === state.at && (await go(1));
      if (!gone && state.shown === id) openSoon(id); // drawn again, with its label
    } catch (error) {
      say(error.message, true);
    } finally {
      state.sending = false;
    }
  }

  function back() {
    if (state.last === null) {
      say("Nothing was labelled since this page was opened");
      return;
    }
    location.hash = `#/request/${state.last}`;
    say("Label it again: the newest label counts, every one is kept");
  }

  function move(rest) {
    state.open = rest.length === 2 ? `${decodeURIComponent(rest[0])}/${Number(rest[1])}` : null;
    place.classList.toggle("opened", state.open !== null);
    select_(state.open ?? (wide() && state.entries.length ? idOf(state.entries[0]) : null));
    if (state.open && !wide()) scrollTo(0, 0);
  }

  const wide = () => matchMedia("(min-width: 60rem)").matches;
  setKeys([
    ["j", "next request", () => go(1), true], ["k", "the one before", () => go(-1), true],
    ["h", "label: harmful", () => label("harmful")], ["s", "label: harmless (safe)", () => label("harmless")],
    ["u", "label: unsure", () => label("unsure")], ["z", "back to what was labelled last, to label it again", back],
    ["l", "logit lens of this request", () => openLens(detail)], ["t", "into the text; then ← → from token to token", () => detail.querySelector(".tokens, .trace")?.focus()],
    ["f", "filters", () => { chosen.open = true; drawBar(); bar.querySelector("select")?.focus(); }],
    ["r", "read the queue again", () => load()],
    ["Escape", "", () => { if (place.classList.contains("opened")) location.hash = "#/queue"; }],
  ]);
  drawBar();
  move(first);
  load();
  return { move, leave: () => { state.load?.abort(); clearTimeout(state.opens); stopShowing(); place.classList.remove("opened"); } };
}
