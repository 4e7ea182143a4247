// Elements from data. Text is only ever a text node whose signs can be seen: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";
const FORBIDDEN = /^(on|style$|srcdoc$|innerhtml$|outerhtml$)/i;

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    } else if (FORBIDDEN.test(name)) {
      throw new Error(`attribute ${name} is not set from data`);
    } else if (name === "href" && !String(value).startsWith("#")) {
      throw new Error("links stay on this page");
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false).map(node));
  return element;
}

function node(child) {
  return child instanceof Node ? child : document.createTextNode(visible(String(child)));
}

// U+FE0F behind an emoji and U+200D between two of them hide nothing.
const HIDDEN = new RegExp([
  String.raw`(?![\t\n\u200d\ufe0f])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]`,
  String.raw`(?<!\p{Extended_Pictographic})\ufe0f`,
  String.raw`(?<![\p{Extended_Pictographic}\p{Emoji_Modifier}]\ufe0f?)\u200d`,
  String.raw`\u200d(?!\p{Extended_Pictographic})`,
].join("|"), "gu");

/** What does not print, turns text around or hides in it becomes a box; line ends and tabs stay. */
export function visible(text) {
  return text.replace(HIDDEN, "□");
}

/** h("td", {class: "n"}, value, [more]): children that are null are left out. */
export function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function s(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

export function button(label, act, attributes) {
  return h("button", { type: "button", ...attributes, on: { click: act } }, label);
}

/** A labelled control: the words stand before it, and belong to it. */
export function field(words, control, attributes) {
  return h("label", { class: "field", ...attributes }, h("span", null, words), control);
}

/** A select; choices: [[value, words]]. */
export function select(choices, chosen, act, attributes) {
  const options = choices.map(([value, words]) => h("option", { value, selected: value === chosen }, words));
  return h("select", { ...attributes, on: { change: (event) => act(event.target.value) } }, options);
}

/** A table that scrolls by itself where it is too wide. rows: arrays of cells; a cell is a node, a text or {n: text}. */
export function table(caption, head, rows, attributes) {
  const cells = (tag, row) => row.map((cell, i) => {
    const number = cell !== null && typeof cell === "object" && !(cell instanceof Node) && "n" in cell;
    const label = tag === "td" ? { "data-label": head[i] } : { scope: "col" };
    return h(tag, { ...label, class: number ? "n" : null }, number ? cell.n : cell);
  });
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    h("table", attributes, h("caption", { class: "aside" }, caption),
      h("thead", null, h("tr", null, cells("th", head))),
      h("tbody", null, rows.map((row) => h("tr", null, cells("td", row))))));
}

let forgets = 0;

/** Said to everybody: shown for a moment, and read out. */
export function say(words, bad = false) {
  const place = document.getElementById("toast");
  place.replaceChildren(h("span", { class: bad ? "bad" : null }, words));
  clearTimeout(forgets);
  forgets = setTimeout(() => place.replaceChildren(), bad ? 9000 : 4000);
}

/** Asks before something is done. act: awaited; what goes wrong is said in the dialog, which stays. home: puts the focus
 * somewhere, where what had it before is gone. */
export function ask(title, words, verb, act, home) {
  const wrong = h("p", { class: "bad", role: "alert" });
  const go = h("button", { class: "main" }, verb);
  const form = h("form", { method: "dialog" }, h("h2", null, title), h("p", null, words), wrong,
    h("div", { class: "row" }, go, button("Cancel", () => dialog.close(), { class: "quiet" })));
  const dialog = h("dialog", { "aria-label": title }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    try {
      await act();
      dialog.close();
    } catch (error) {
      if (dialog.open) wrong.textContent = error.message;
      else say(error.message, true); // it was closed meanwhile
      go.disabled = false;
    }
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (document.activeElement === document.body) home();
  });
  document.body.append(dialog);
  dialog.showModal();
}
