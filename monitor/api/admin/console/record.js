// One request: what was said, what the probes read in it, and what people have said of it.

import { get } from "./api.js";
import { conversation, isCounted, readingOf } from "./conversation.js";
import { button, h, table } from "./dom.js";
import { count, figure, known, time, verdict, word } from "./format.js";
import { lensSection } from "./lens.js";
import { traceChart } from "./trace.js";

const LABELS = [["harmful", "h", "Harmful"], ["harmless", "s", "Harmless"], ["unsure", "u", "Unsure"]];
let asked = null;

/** Other content for a place. Who had the focus there keeps it: on the same label's button, else on the place. */
export function fill(place, parts) {
  const had = place.contains(document.activeElement) ? document.activeElement : null;
  const same = LABELS.map(([word]) => `.say.${word}`).find((button) => had?.matches(button));
  place.replaceChildren(...parts);
  if (had) ((same && place.querySelector(same)) ?? place).focus({ preventScroll: true });
}

/** What is being asked for is not shown any more. */
export function stopShowing() {
  asked?.abort();
}

/** label: called with a word of LABELS. Says `midstream:shown` with "ID/choice" once it is drawn, or `midstream:failed`. */
export async function showRequest(place, id, choice, label) {
  asked?.abort();
  const own = (asked = new AbortController());
  try {
    const found = await get(`/admin/requests/${encodeURIComponent(id)}?choice=${choice}`, own.signal);
    fill(place, parts(found, found.choice, label));
    place.scrollTop = 0;
    place.dispatchEvent(new CustomEvent("midstream:shown", { detail: `${id}/${choice}` }));
  } catch (error) {
    if (error.name === "AbortError") return;
    fill(place, [h("p", { class: "empty bad", role: "alert" }, error.message)]);
    place.dispatchEvent(new CustomEvent("midstream:failed", { detail: `${id}/${choice}` }));
  }
}

function parts(found, one, label) {
  const { record } = one;
  const shared = cursor();
  const probe = leading(record);
  return [
    head(found, one),
    h("div", { class: "body" },
      conversation(one, found.no_text, probe, shared),
      traceChart(record, shared),
      readings(record), opinions(one.labels), escalations(record), facts(record),
      found.lens ? lensSection(found.id, record.index) : null),
    labelBar(one.labels, label, readout(one, shared)),
  ];
}

/** The probe whose reading decided: its scores colour the text. */
function leading(record) {
  const order = ["block", "unmonitored", "escalate", "flag", "allow"];
  const worst = [...record.readings].sort((a, b) => order.indexOf(a.action) - order.indexOf(b.action))[0];
  return worst?.probe ?? Object.keys(record.token_scores)[0] ?? null;
}

/** The position that is looked at, for the text and the chart alike. */
function cursor() {
  const listeners = [];
  return {
    at: null,
    put(position) {
      this.at = position;
      listeners.forEach((told) => told(position));
    },
    told: (act) => listeners.push(act),
  };
}

function head(found, { record, labels }) {
  const others = found.indices.filter((index) => index !== record.index);
  const c = record.coverage;
  return h("header", { class: "head" },
    h("a", { class: "back", href: "#/queue" }, "‹ Queue"),
    h("div", { class: "line" }, h("h2", null, verdict(record.verdict)), h("code", { class: "id" }, record.request_id),
      record.index || others.length ? h("span", null, `choice ${record.index}`) : null,
      labels[0] ? h("span", { class: `label ${labels[0].label}` }, labels[0].label) : null,
      others.map((o) => h("a", { href: `#/request/${encodeURIComponent(found.id)}/${o}` }, `choice ${o}`))),
    h("div", { class: "line soft" }, time(record.created, true), h("span", null, record.model), h("span", null, record.route),
      h("span", null, record.key ? `key ${record.key}` : "no key"), h("span", null, `policy ${record.policy}`),
      h("span", null, `${count(c.prompt_tokens)} + ${count(c.response_tokens)} tokens`), h("span", null, `ended: ${record.finish}`)));
}

/** What the token says that is pointed at, in the text or in the trace. */
function readout({ record, tokens }, shared) {
  const place = h("p", { class: "readout", role: "status", "aria-live": "polite" });
  const n = record.coverage.prompt_tokens;
  const several = Object.keys(record.token_scores).length > 1;
  shared.told((at) => {
    const phase = at < n ? "prompt" : "response";
    const piece = at < n ? tokens.prompt?.[at] : tokens.answer?.[at - n];
    const values = Object.entries(record.token_scores).filter(([, scores]) => scores.length).map(([probe, scores]) => {
      const reading = readingOf(record, probe, phase);
      const limit = known(reading.threshold) ? ` of ${figure(reading.threshold)}` : "";
      return `${several ? `${probe} ` : ""}${known(scores[at]) ? figure(scores[at]) : "no score"}${limit}${at === reading.crossed_at ? ", crossed here" : ""}`;
    });
    place.replaceChildren(`${phase === "prompt" ? "prompt" : "answer"}, token ${at} `, piece === undefined ? "" : h("code", null, word(piece)),
      isCounted(record, at) ? " " : " (does not count) ", values.join(" · "));
  });
  return place;
}

function labelBar(labels, label, readout_) {
  const now = labels[0]?.label;
  return h("div", { class: "labelbar", role: "group", "aria-label": "Your label" }, LABELS.map(([word, key, words]) =>
    button([words, " ", h("kbd", null, key)], () => label(word), { class: `say ${word}`, "aria-pressed": String(word === now), "aria-keyshortcuts": key })), readout_);
}

function readings(record) {
  if (!record.readings.length) return h("p", { class: "soft" }, "No probe has read this request.");
  const rows = record.readings.map((r) => [`${r.probe} ${r.version}`, r.phase, { n: figure(r.value) }, { n: figure(r.threshold) },
    { n: known(r.peak_score) ? `${figure(r.peak_score)} at ${r.peak_position}` : "–" }, { n: known(r.crossed_at) ? r.crossed_at : "–" },
    r.mode, verdict(r.action), r.would_block ? "yes" : ""]);
  return h("section", null, h("h3", null, "Readings"),
    table("Readings of each probe", ["probe", "phase", "value", "threshold", "peak", "crossed at", "mode", "verdict", "would block"], rows));
}

function opinions(labels) {
  const rows = labels.map((l, i) => [h("span", { class: `label ${l.label}` }, l.label), l.by, time(l.created, true), i === 0 ? "counts" : "earlier"]);
  return h("section", null, h("h3", null, "Labels"), rows.length
    ? table("Labels so far, the newest first", ["label", "by", "when", ""], rows)
    : h("p", { class: "soft" }, "Nobody has labelled this yet. Every label is kept; the newest counts."));
}

function escalations(record) {
  if (!record.escalations.length) return null;
  const rows = record.escalations.map((e) => [e.probe, e.phase, { n: e.position }, { n: figure(e.value) }, { n: figure(e.second) }, e.result]);
  return h("section", null, h("h3", null, "Second judge"),
    table("Questions to the second judge", ["probe", "phase", "position", "value", "second", "result"], rows));
}

function facts(record) {
  const c = record.coverage;
  const pairs = [["scored", `${count(c.prompt_scored)} of ${count(c.prompt_tokens)} prompt, ${count(c.response_scored)} of ${count(c.response_tokens)} answer`],
    ["unmonitored", count(c.unmonitored) + Object.entries(c.causes).map(([cause, n]) => `, ${cause} ${n}`).join("")],
    ["final, unscored", count(c.final_unscored)], ["not computed", count(c.not_computed)],
    ["scored by", record.scored_by === "observer" ? "the observer, which read the same text" : "the model that answered"],
    ["sent to the client", `${count(record.released_tokens)} tokens, ${count(record.held_tokens)} held back`]];
  return h("details", null, h("summary", null, "Coverage"),
    h("dl", { class: "facts" }, pairs.map(([name, value]) => [h("dt", null, name), h("dd", null, value)])));
}
