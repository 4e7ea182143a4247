// The audit trail: who asked for what, and how it ended. Paths come from anybody who reaches the port: text only.

import { get, withQuery } from "./api.js";
import { button, h, table } from "./dom.js";
import { count, time } from "./format.js";
import { setKeys } from "./keys.js";

const PAGE = 200;

export function showAudit(place) {
  const out = h("div", { "aria-live": "polite" });
  const foot = h("p", { class: "foot soft" });
  const all = h("input", { type: "checkbox" });
  let rows = [];
  let asked = null;

  const draw = () => {
    const lines = rows.map((r) => [time(r.time, true), r.actor, h("code", null, r.method), h("code", { class: "path" }, r.path),
      r.refused ? h("span", { class: "bad" }, `refused: ${r.refused}`) : (r.result ?? "…"), r.peer, { n: r.unwritten ? count(r.unwritten) : "" }]);
    out.replaceChildren(table("Actions, the newest first", ["time", "who", "", "what", "result", "from", "uncounted before"], lines, { class: "stack" }));
  };

  /** more: the page behind what is shown */
  async function load(more = false) {
    asked?.abort();
    const own = (asked = new AbortController());
    const behind = more ? { before: rows.at(-1).id } : {};
    try {
      const found = await get(withQuery("/admin/audit", { limit: PAGE, reads: all.checked, ...behind }), own.signal);
      rows = more ? [...rows, ...found.rows] : found.rows;
      draw();
      const isAll = found.rows.length < PAGE;
      foot.replaceChildren(`${count(rows.length)} shown${isAll ? ", that is all" : ""}. `, isAll ? "" : button("More", () => load(true), { class: "quiet" }));
    } catch (error) {
      if (error.name !== "AbortError") foot.replaceChildren(h("span", { class: "bad", role: "alert" }, error.message));
    }
  }

  all.addEventListener("change", () => load());
  place.append(h("section", { class: "page", "aria-label": "Audit trail" },
    h("div", { class: "line" }, h("h1", null, "Audit trail"), h("span", { class: "spring" }), h("label", { class: "check" }, all, " reading too"), button(["Again ", h("kbd", null, "r")], () => load())), out, foot));
  setKeys([["r", "read again", () => load()]]);
  load();
  return { leave: () => asked?.abort() };
}
