// What was said, each token coloured by what a probe read there. Hostile text: only ever text nodes.

import { h } from "./dom.js";
import { fullHeat, heat, known } from "./format.js";

const MAX_TOKENS = 8000;

/** The reading of a probe in a phase; {} if it has none. */
export function readingOf(record, probe, phase) {
  return record.readings.find((r) => r.probe === probe && r.phase === phase) ?? {};
}

export function isCounted(record, position) {
  return position >= record.coverage.prompt_tokens || record.counted.some(([from, to]) => position >= from && position < to);
}

export function conversation(one, noText, probe, shared) {
  const { record } = one;
  if (one.turns === null) {
    return h("section", null, h("h3", null, "Conversation"), h("p", { class: "soft" }, `Not kept: ${noText}. What the probes read is below.`));
  }
  const scores = record.token_scores[probe] ?? [];
  const n = record.coverage.prompt_tokens;
  const parts = [["prompt", one.tokens.prompt, 0, scores.slice(0, n)], ["response", one.tokens.answer, n, scores.slice(n)]];
  const spelled = parts.map(([phase, pieces, first, own]) => {
    const title = phase === "prompt" ? "Prompt" : "Answer";
    if (pieces === null) return plain(title, phase === "prompt" ? one.turns : answerTurn(one.answer, record), own.length > 0);
    return [h("h4", null, title), block(record, phase, pieces.slice(0, MAX_TOKENS), first, own, probe, shared), rest(record, phase, pieces)];
  });
  return h("section", null, h("h3", null, "Conversation", legend(scores, probe)), spelled);
}

function answerTurn(answer, record) {
  const held = record.coverage.response_tokens - record.released_tokens;
  const none = record.coverage.response_tokens ? "nothing was sent" : "there is none";
  return [{ role: answer ? "assistant" : "", content: answer || `(${none}${held > 0 ? `; ${held} tokens were held back` : ""})` }];
}

/** A text whose tokens can't be told apart any more. */
function plain(title, turns, scored) {
  const why = scored ? h("p", { class: "soft" }, "Without colours: this text was redacted, or read again it splits into other tokens than were scored.") : null;
  return [h("h4", null, title), scored && turns.some((t) => t.role) ? why : null,
    turns.map((t) => h("div", { class: "turn" }, t.role ? h("span", { class: "role" }, t.role) : null, h("div", { class: "text" }, t.content)))];
}

function rest(record, phase, pieces) {
  const cut = pieces.length - MAX_TOKENS;
  const held = phase === "response" ? record.coverage.response_tokens - record.released_tokens : 0;
  return [cut > 0 ? h("p", { class: "soft" }, `${cut} more tokens are not shown`) : null,
    held > 0 ? h("p", { class: "soft" }, `${held} more ${held === 1 ? "token was" : "tokens were"} held back from the client; their text is not kept.`) : null];
}

function block(record, phase, pieces, first, scores, probe, shared) {
  const reading = readingOf(record, probe, phase);
  const full = fullHeat(reading.threshold, scores.filter((_, i) => isCounted(record, first + i)));
  const tokens = pieces.map((piece, i) => token(piece, first + i, scores[i], full, reading, isCounted(record, first + i)));
  const box = h("div", { class: "tokens text", tabindex: "0", role: "group",
    "aria-label": `${phase === "prompt" ? "Prompt" : "Answer"}, ${pieces.length} tokens; arrow keys go from one to the next` }, tokens);
  const pick = (position) => shared.put(position);
  box.addEventListener("pointerover", (event) => event.target.dataset?.at && pick(Number(event.target.dataset.at)));
  box.addEventListener("focus", () => shared.at === null && pick(first));
  box.addEventListener("keydown", (event) => {
    const at = (shared.at ?? first) - first;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: pieces.length - 1 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    pick(first + Math.max(0, Math.min(pieces.length - 1, to)));
    tokens[shared.at - first].scrollIntoView({ block: "nearest" });
  });
  let lit = null;
  shared.told((position) => {
    lit?.classList.remove("lit");
    lit = position === null ? null : tokens[position - first];
    lit?.classList.add("lit");
  });
  return box;
}

function token(piece, position, score, full, reading, counted) {
  const step = counted ? heat(score, full) : null;
  const crossed = position === reading.crossed_at;
  const above = counted && known(score) && known(reading.threshold) && score > reading.threshold;
  const names = [step === null ? "" : `heat${step}`, counted ? "" : "frame", above ? "above" : "", crossed ? "crossed" : ""];
  return h("span", { class: names.filter(Boolean).join(" "), "data-at": position }, piece);
}

function legend(scores, probe) {
  if (!scores.length) return h("span", { class: "legend soft" }, "no token scores were kept: no probe crossed its threshold");
  const steps = [-4, -3, -2, -1, 0, 1, 2, 3, 4].map((step) => h("span", { class: `heat${step}` }, " "));
  return h("span", { class: "legend soft" }, `${probe}: `, "harmless ", h("span", { class: "scale", "aria-hidden": "true" }, steps),
    " harmful; ", h("span", { class: "above" }, "underlined"), " above the threshold");
}
