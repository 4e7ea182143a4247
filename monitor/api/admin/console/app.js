// The frame: who is signed in, which view is shown, and the keys that work everywhere.

import { get, signOut, whenEnded } from "./api.js";
import { showAudit } from "./audit.js";
import { say } from "./dom.js";
import { count } from "./format.js";
import { listen, setKeys, showHelp } from "./keys.js";
import { showLive } from "./live.js";
import { showProbes } from "./probes.js";
import { showQueue } from "./queue.js";
import { showSignIn } from "./signin.js";

const VIEWS = { queue: showQueue, request: showQueue, live: showLive, probes: showProbes, audit: showAudit };
const TITLES = { queue: "Queue", request: "Request", live: "Live", probes: "Probes", audit: "Audit" };
const main = document.getElementById("main");
let leave = () => {};
let shown = null;
const SEEN = "midstream-signed-in"; // a hint only: the session is a cookie that no script can read

/** "#/request/ID/0" -> ["request", "ID", "0"] */
function place() {
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  try {
    return parts.map(decodeURIComponent);
  } catch {
    return ["queue"];
  }
}

function show() {
  const [name, ...rest] = place();
  const view = name in VIEWS ? name : "queue";
  const tab = view === "request" ? "queue" : view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === tab) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} · Midstream`;
  if (shown?.view === tab && shown.move) {
    shown.move(rest); // the queue stays, another of its requests is opened
    return;
  }
  leave();
  setKeys([]);
  main.replaceChildren();
  main.className = tab;
  const kept = VIEWS[view](main, rest) ?? {};
  leave = kept.leave ?? (() => {});
  shown = { view: tab, move: kept.move };
}

export async function refreshCounts() {
  const place_ = document.getElementById("waiting");
  try {
    const { unlabelled } = await get("/admin/queue/counts");
    place_.textContent = count(unlabelled);
    place_.title = `${count(unlabelled)} requests wait for a label`;
  } catch {
    place_.textContent = ""; // the queue itself says what is wrong
  }
}

function started(name) {
  localStorage.setItem(SEEN, "1");
  document.getElementById("top").hidden = false;
  document.getElementById("who").textContent = name ?? "";
  shown = null;
  show();
  refreshCounts();
}

function signedOut(why) {
  localStorage.removeItem(SEEN);
  leave();
  leave = () => {};
  shown = null;
  setKeys([]);
  document.getElementById("top").hidden = true;
  document.querySelectorAll("dialog").forEach((dialog) => dialog.remove());
  main.className = "signin";
  showSignIn(main, why, started);
}

const signedIn = () => !document.getElementById("top").hidden;
const goTo = (hash) => () => signedIn() && (location.hash = hash);

async function start() {
  const why = "Safety monitoring of a language model, as it answers.";
  whenEnded(() => signedIn() && signedOut("Your session has ended. Sign in again; nothing is lost."));
  document.getElementById("help").addEventListener("click", showHelp);
  document.getElementById("leave").addEventListener("click", async () => {
    try {
      await signOut();
      signedOut("You are signed out.");
    } catch (error) {
      if (signedIn()) say(`You are still signed in: ${error.message}`, true); // no script can take the cookie away
    }
  });
  addEventListener("hashchange", () => signedIn() && show());
  document.addEventListener("midstream:labelled", refreshCounts);
  listen({ 1: goTo("#/queue"), 2: goTo("#/live"), 3: goTo("#/probes"), 4: goTo("#/audit") });
  if (localStorage.getItem(SEEN) !== "1") {
    signedOut(why); // asked without a session, the server would put a refusal on record
    return;
  }
  try {
    const session = await get("/admin/session");
    started(session.name);
  } catch (error) {
    signedOut(error.status === 401 ? why : error.message);
  }
}

start();
