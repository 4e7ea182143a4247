// One key, one act: what can be pressed, its help, and the switch that turns it off.

import { h } from "./dom.js";

const OFF = "midstream-keys-off";
const ALWAYS = [["?", "this help"], ["1 2 3 4", "queue, live, probes, audit"], ["Esc", "close; on a phone back to the queue"]];
let acts = {};
let words = [];
let held = new Set();

/** The keys of the view that is shown. list: [[key, words, act, held]]; held: held down, it acts again and again. */
export function setKeys(list) {
  held = new Set(list.filter(([, , , again]) => again).map(([key]) => key));
  acts = Object.fromEntries(list.map(([key, , act]) => [key, act]));
  words = list.filter(([, what]) => what).map(([key, what]) => [key === " " ? "Space" : key, what]);
}

function isOff() {
  return localStorage.getItem(OFF) === "1";
}

function writes(target) {
  return target instanceof Element && target.closest("input, textarea, select, [contenteditable]") !== null;
}

export function listen(always) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || writes(event.target)) return;
    if (document.querySelector("dialog[open]")) return; // even where the focus is not in it: nothing behind it acts
    const act = event.key === "?" ? showHelp : (acts[event.key] ?? always[event.key]);
    if (!act || (isOff() && !["?", "Escape"].includes(event.key))) return;
    // Space and Enter are the button's that has the focus.
    if ([" ", "Enter"].includes(event.key) && event.target.closest("button, a, summary")) return;
    event.preventDefault();
    if (!event.repeat || held.has(event.key)) act(); // a key that lies under a book labels no queue
  });
}

export function showHelp() {
  if (document.querySelector("dialog[open]")) return;
  const off = h("input", { type: "checkbox", checked: isOff() ? null : true });
  off.addEventListener("change", () => localStorage.setItem(OFF, off.checked ? "0" : "1"));
  const lines = [...words, ...ALWAYS].map(([key, what]) => [
    h("dt", null, key.split(" ").map((one) => h("kbd", null, one))),
    h("dd", null, what),
  ]);
  const dialog = h("dialog", { "aria-label": "Keys", class: "help" },
    h("form", { method: "dialog" },
      h("h2", null, "Keys"),
      h("dl", { class: "keys" }, lines),
      h("label", { class: "check" }, off, " Single keys do something"),
      h("p", { class: "soft" }, "Without them everything works by Tab, Enter and the buttons."),
      h("div", { class: "row" }, h("button", { class: "main", autofocus: true }, "Close"))));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
