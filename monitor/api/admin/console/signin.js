// The way in: the admin key, once, for a session that only this browser holds.

import { signIn } from "./api.js";
import { field, h } from "./dom.js";

/** why: what is said above the form; done: called with the session's name. */
export function showSignIn(place, why, done) {
  const key = h("input", { type: "password", name: "key", required: true, autocomplete: "current-password",
    spellcheck: "false", autofocus: true });
  const name = h("input", { name: "name", maxlength: 64, autocomplete: "username", placeholder: "how your labels are signed" });
  const wrong = h("p", { class: "bad", role: "alert" });
  const go = h("button", { class: "main" }, "Sign in");
  const form = h("form", { class: "signin", method: "post", "aria-label": "Sign in" },
    h("h1", null, "Midstream"),
    h("p", { class: "soft" }, why),
    field("Admin key", key), field("Your name (optional)", name), wrong, h("div", { class: "row" }, go));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    wrong.textContent = "";
    try {
      const session = await signIn(key.value, name.value.trim());
      key.value = "";
      done(session.name);
    } catch (error) {
      wrong.textContent = error.message;
      go.disabled = false;
      key.select();
    }
  });
  place.replaceChildren(form);
  key.focus();
}
