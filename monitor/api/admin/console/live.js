// Traffic as it goes by: one line for each record, as soon as it is finished. No text.

import { button, h } from "./dom.js";
import { count, figure, known, verdict, VERDICTS } from "./format.js";
import { setKeys } from "./keys.js";

const ROWS = 200;

export function showLive(place) {
  const body = h("tbody");
  const totals = Object.fromEntries(VERDICTS.map((name) => [name, 0]));
  const sums = h("p", { class: "sums" });
  const state = h("span", { class: "soft", role: "status" }, "connecting …");
  const seen = { paused: false, waiting: [], missed: 0, over: null };
  const pause = button(["Pause ", h("kbd", null, "p")], () => toggle(), { "aria-pressed": "false" });
  const only = h("input", { type: "checkbox" });
  only.addEventListener("change", () => place.classList.toggle("notallowed", only.checked));
  place.append(h("section", { class: "page", "aria-label": "Live traffic" },
    h("div", { class: "line" }, h("h1", null, "Live traffic"), state, h("span", { class: "spring" }), h("label", { class: "check" }, only, " without allowed"), pause),
    sums,
    h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Records, the newest first" },
      h("table", { class: "stack" }, h("caption", { class: "aside" }, "Records, the newest first"),
        h("thead", null, h("tr", null, ["time", "verdict", "key", "route", "tokens", "probes: value / threshold", "ended", "request"].map((t) => h("th", { scope: "col" }, t)))), body))));

  const draw = () => sums.replaceChildren(...VERDICTS.map((name) => h("span", null, verdict(name), " ", h("b", null, count(totals[name])))),
    h("span", { class: "soft" }, `since you look${seen.missed ? `; ${count(seen.missed)} went by unseen` : ""}`));

  function toggle() {
    seen.paused = !seen.paused;
    pause.setAttribute("aria-pressed", String(seen.paused));
    if (!seen.paused) seen.waiting.splice(0).forEach(add);
    tell();
  }

  function tell() {
    const words = { [EventSource.CONNECTING]: "connecting …", [EventSource.OPEN]: seen.paused ? "paused" : "live", [EventSource.CLOSED]: "not connected; reload the page" };
    state.textContent = seen.over ?? words[source.readyState];
  }

  function add(record) {
    body.prepend(line(record));
    while (body.children.length > ROWS) body.lastElementChild.remove();
  }

  const source = new EventSource("/admin/live");
  source.addEventListener("open", tell);
  source.addEventListener("error", tell);
  source.addEventListener("message", (event) => {
    const record = JSON.parse(event.data);
    if (record.missed) seen.missed += record.missed;
    if (record.ended) {
      seen.over = record.ended;
      source.close();
      tell();
    }
    if (record.id) {
      if (!record.old) totals[record.verdict] = (totals[record.verdict] ?? 0) + 1;
      if (seen.paused) seen.waiting = [...seen.waiting, record].slice(-ROWS);
      else add(record);
    }
    draw();
  });
  draw();
  setKeys([["p", "pause, and go on", toggle]]);
  return { leave: () => { source.close(); place.classList.remove("notallowed"); } };
}

function line(record) {
  const values = record.readings.map((r) => h("span", { class: known(r.value) && known(r.threshold) && r.value > r.threshold ? "over" : null },
    `${r.probe} ${r.phase} ${figure(r.value)} / ${figure(r.threshold)}`));
  const cells = [new Date(record.time * 1000).toLocaleTimeString("sv-SE"), verdict(record.verdict), record.key || "–", record.route,
    `${count(record.prompt_tokens)} + ${count(record.response_tokens)}`, h("span", { class: "values" }, values), record.finish,
    h("a", { href: `#/request/${encodeURIComponent(record.id)}/${record.choice}` }, h("code", null, record.id.slice(0, 8)))];
  return h("tr", { class: record.verdict === "allow" ? "allowed" : null }, cells.map((cell) => h("td", null, cell)));
}
