// The audit trail: who asked for what, and how it ended. Paths come from anybody who reaches the port: text only.

import { get } from "./api.js";
import { button, h, table } from "./dom.js";
import { count, time } from "./format.js";
import { setKeys } from "./keys.js";

const HIDDEN = new Set(["/admin/audit", "/admin/live", "/admin/session", "/admin/queue", "/admin/queue/counts", "/admin/retrain", "/admin/probes"]);

export function showAudit(place) {
  const out = h("div", { "aria-live": "polite" });
  const all = h("input", { type: "checkbox" });
  let rows = [];

  const isReading = (r) => r.method === "GET" && !r.refused && (HIDDEN.has(r.path) || r.path.startsWith("/admin/requests/"));
  const draw = () => {
    const shown = rows.filter((r) => all.checked || !isReading(r));
    const lines = shown.map((r) => [time(r.time, true), r.actor, h("code", null, r.method), h("code", { class: "path" }, r.path),
      r.refused ? h("span", { class: "bad" }, `refused: ${r.refused}`) : (r.result ?? "…"), r.peer, { n: r.unwritten ? count(r.unwritten) : "" }]);
    out.replaceChildren(table("Actions, the newest first", ["time", "who", "", "what", "result", "from", "uncounted before"], lines, { class: "stack" }));
  };

  async function load() {
    try {
      ({ rows } = await get("/admin/audit?limit=500"));
      draw();
    } catch (error) {
      out.replaceChildren(h("p", { class: "bad", role: "alert" }, error.message));
    }
  }

  all.addEventListener("change", draw);
  place.append(h("section", { class: "page", "aria-label": "Audit trail" },
    h("div", { class: "line" }, h("h1", null, "Audit trail"), h("span", { class: "spring" }), h("label", { class: "check" }, all, " reading too"), button(["Again ", h("kbd", null, "r")], load)), out));
  setKeys([["r", "read again", load]]);
  load();
}
