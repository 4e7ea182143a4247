// The probes: which version serves, which runs beside it, how many labels the next one needs, and its training.

import { get, post } from "./api.js";
import { ask, button, h, say, table } from "./dom.js";
import { count, known, percent, time } from "./format.js";
import { setKeys } from "./keys.js";

const EVERY_MS = 1500;
const GATE = { 0: "PASS", 10: "THRESHOLD STALE", 11: "DEGRADED", 12: "INCONCLUSIVE" }; // of the training's exit code

export function showProbes(place) {
  const list = h("div", { class: "probes" });
  const training = h("section", { class: "training", "aria-label": "Training" });
  place.append(h("section", { class: "page", "aria-label": "Probes" }, h("h1", null, "Probes"), list, training));
  let timer = 0;
  let left = false;

  async function load() {
    try {
      const found = await get("/admin/probes");
      const had = list.contains(document.activeElement) ? document.activeElement.closest(".card")?.dataset.probe : null;
      list.replaceChildren(h("p", { class: "soft" }, `of ${found.model}`), ...found.probes.map((probe) => card(probe, load, follow, () => focus(probe.name))));
      if (had) focus(had);
    } catch (error) {
      list.replaceChildren(h("p", { class: "bad", role: "alert" }, error.message));
    }
  }

  function focus(name) {
    [...list.children].find((one) => one.dataset.probe === name)?.focus({ preventScroll: true });
  }

  function again() {
    clearTimeout(timer);
    timer = setTimeout(follow, EVERY_MS);
  }

  async function follow() {
    clearTimeout(timer);
    let state = null;
    try {
      state = await get("/admin/retrain");
    } catch (error) {
      if (left) return;
      training.replaceChildren(error.status === 404 ? "" : h("p", { class: "bad", role: "alert" }, error.message));
      if (error.status !== 404) again(); // one answer that is missing is not the end of a training
      return;
    }
    if (left) return;
    const was = training.dataset.state;
    training.dataset.state = state.state;
    training.replaceChildren(...progress(state));
    if (state.state === "running") again();
    else if (was === "running") {
      say(state.state === "done" ? "The training is done" : "The training failed", state.state !== "done");
      load();
    }
  }

  setKeys([["r", "read again", () => { load(); follow(); }]]);
  load();
  follow();
  return { leave: () => { left = true; clearTimeout(timer); } };
}

/** home: puts the focus on this card, once it is drawn again. */
function card(probe, load, follow, home) {
  const name = encodeURIComponent(probe.name);
  // words: of what is true now, by the server's reply
  const done = (act, words) => async () => {
    say(words(await act()));
    await load();
  };
  const told = (now) => ("live" in now ? `${now.probe} ${now.live} is live` : now.candidate ? `${now.probe} ${now.candidate} runs in shadow` : `${now.probe} has nothing in shadow`);
  // What is changed is what was seen here: where somebody else was faster, the server refuses and says so.
  const swap = (verb, words, path, body) => () => ask(`${verb}?`, words, verb, done(() => post(`/admin/probes/${name}/${path}`, { ...body, instead_of: probe.live }), told), home);
  const rollback = probe.previous && probe.previous !== probe.live ? button(`Roll back to ${probe.previous}`, swap(`Roll back to ${probe.previous}`,
    `${probe.name} ${probe.previous} serves again at once, without a restart; ${probe.live} stays in the store.`, "rollback", { to: probe.previous })) : null;
  const retrain = probe.live === null ? null : button("Retrain", () => ask("Retrain?", `A new version of ${probe.name} from the labels that ${probe.live} has not seen. Unless the gate calls it DEGRADED it becomes the candidate; it serves nothing before you promote it.`,
    "Retrain", done(() => begin(probe.name, follow), () => "The training has begun"), home));
  const rows = probe.versions.map((version) => versionRow(probe, version, swap));
  return h("article", { class: "card", tabindex: "-1", "data-probe": probe.name, "aria-label": probe.name },
    h("div", { class: "line" }, h("h2", null, probe.name), probe.serves ? h("span", { class: "tag" }, `${probe.serves} live`) : null, probe.live === null ? h("span", { class: "tag" }, "idle") : null,
      probe.tries ? h("span", { class: "tag shadow" }, `${probe.tries} in shadow`) : null, h("span", { class: "spring" }), rollback, retrain),
    unlike(probe), needed(probe), ...(probe.thresholds ?? []).map(standing),
    table(`Versions of ${probe.name}`, ["version", "state", "created", "kind", "layers", "labels", "gate", "figures", "sha256", ""], rows, { class: "stack" }));
}

/** Starts a training. Throws where it could not be started. */
async function begin(name, follow) {
  const now = await post("/admin/retrain", { probe: name });
  await follow();
  if (now.state === "failed") throw new Error(`The training failed: ${now.lines.at(-1) ?? "its output says why"}`);
}

/** Where what runs is not what live.json names: the server has refused it, or has not come to it yet. */
function unlike(probe) {
  const why = "this server has refused it, or is still loading it; its log says why";
  const serves = probe.serves ? `${probe.serves} serves here` : "nothing of it serves here";
  const words = [
    probe.serves === probe.live ? null : probe.missing ? `live.json names ${probe.live}, which is not in the store; ${serves}. Roll back, or promote another version.`
      : `live.json names ${probe.live}, but ${serves}: ${why}.`,
    probe.candidate && probe.tries !== probe.candidate ? `${probe.candidate} is chosen for shadow, but does not run: ${why}.` : null];
  return words.filter(Boolean).map((line) => h("p", { class: "bad standing" }, line));
}

/** What a promoted version comes in place of. */
function instead(probe) {
  return probe.live === null ? ", in shadow unless the policy asks for more; none has served before it" : `, in place of ${probe.live}, which is kept to roll back to`;
}

function needed(probe) {
  if (probe.live === null) return h("p", { class: "needed soft" }, "In the store, and not served: promote a version to have it scored.");
  if (!known(probe.needed)) return null;
  const words = probe.needed > 0 ? `${count(probe.needed)} more requests are needed to certify a threshold on this traffic` : "enough traffic to certify a threshold";
  return h("p", { class: "needed" }, h("span", null, h("b", null, `${count(probe.backlog)} labels`), " since the newest version"), h("span", { class: "soft" }, words),
    h("a", { href: "#/queue" }, "label more"));
}

/** How a threshold in force stands to the newest traffic, in words. */
function standing(t) {
  const where = `${t.phase}, ${t.format}: `;
  const seen = known(t.observed)
    ? `${percent(t.observed)} of the newest ${count(t.n)} are above the threshold [${percent(t.low)}, ${percent(t.high)}], certified for ${known(t.target_fpr) ? percent(t.target_fpr) : "no rate"}`
    : `${count(t.n)} values so far, too few to say how the threshold fits`;
  const stale = t.stale ? h("b", { class: "bad" }, t.low > t.target_fpr
    ? " · The threshold is stale: it flags more than it is certified for. Label these requests, then retrain."
    : " · The threshold is stale: it flags less than you allowed. Label harmless requests, then retrain.") : null;
  return h("p", { class: "standing soft" }, where, seen, known(t.psi) ? `, PSI ${t.psi.toFixed(2)}` : "", stale);
}

function versionRow(probe, version, swap) {
  const state = version.damaged ? h("span", { class: "bad" }, `damaged: ${version.damaged}`) : version.version === probe.serves ? "live" : version.version === probe.tries ? "in shadow"
    : version.live || version.candidate ? h("span", { class: "bad" }, `chosen, does not ${version.live ? "serve" : "run"}`) : "";
  const acts = version.live || version.damaged ? [] : [
    button("Promote", swap(`Promote ${version.version}`, `${probe.name} ${version.version} serves every new request at once${instead(probe)}.`,
      "promote", { version: version.version })),
    probe.live === null ? null : version.candidate
      ? button("Stop shadow", swap("Stop the shadow", `${version.version} is no longer scored beside ${probe.live}.`, "shadow", { version: null }), { class: "quiet" })
      : button("Shadow", swap(`Run ${version.version} in shadow`, `${version.version} is scored beside ${probe.live} and only counted: it flags and blocks nothing.`, "shadow", { version: version.version }), { class: "quiet" })];
  return [h("b", null, version.version), state, version.created ? created(version.created) : "–", version.kind ?? "–", (version.layers ?? []).join(", "), { n: known(version.labels) ? count(version.labels) : "–" },
    gate(version.gate), h("span", { class: "soft figures" }, figures(version.metrics)), h("code", { title: version.sha256 }, (version.sha256 ?? "").slice(0, 8)), h("span", { class: "acts" }, acts)];
}

function created(text) {
  const seconds = Date.parse(text) / 1000;
  return Number.isNaN(seconds) ? String(text ?? "–") : time(seconds, true);
}

function gate(result) {
  if (!result) return "–";
  const words = String(result.verdict ?? result.decision ?? "recorded");
  return h("span", { class: words.startsWith("PASS") ? "good" : "bad" }, words);
}

/** Two figures of a card: its AUROCs if it names any, else its first numbers; each with where it stands there. */
function figures(metrics) {
  const flat = numbers(metrics, []);
  const chosen = flat.filter(([path]) => path.at(-1) === "auroc");
  return (chosen.length ? chosen : flat).slice(0, 2).map(([path, value]) => `${path.join(" ").replaceAll("_", " ")} ${Number(value.toPrecision(3))}`).join(" · ");
}

function numbers(value, path) {
  if (typeof value === "number") return [[path, value]];
  if (value === null || typeof value !== "object" || Array.isArray(value)) return [];
  return Object.entries(value).flatMap(([name, inner]) => numbers(inner, [...path, name]));
}

function progress(state) {
  if (state.state === "idle") return [];
  const seconds = (state.ended ?? Date.now() / 1000) - (state.started ?? Date.now() / 1000);
  const words = { running: "is being trained", done: `is trained: ${state.candidate ? `${state.candidate} is new in the store` : "no new version"}, gate ${GATE[state.exit_code] ?? state.exit_code}`, failed: `failed (exit code ${state.exit_code})` }[state.state] ?? state.state;
  const out = h("pre", { tabindex: "0", "aria-label": "Output of the training", role: "log" }, (state.lines ?? []).join("\n"));
  requestAnimationFrame(() => { out.scrollTop = out.scrollHeight; });
  return [h("h2", null, "Training"), h("p", { class: state.state === "failed" ? "bad" : null, role: "status" }, `${state.probe} ${words}, ${Math.max(0, Math.round(seconds))} s`), out];
}
