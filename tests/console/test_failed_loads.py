"""A load that fails says so, can be tried again, and is never taken for an empty answer."""

import json

from .test_console import filled, ids, in_queue, shows

# window.faulty: what becomes of the answer to the next request for a path, by its beginning.
_FAULTY = """(() => {
  const real = window.fetch;
  window.alerts = [];
  new MutationObserver(() => window.alerts.push(...[...document.querySelectorAll(".detail [role=alert]")]
    .map((alert) => alert.innerText))).observe(document.querySelector(".detail"), { childList: true });
  window.faulty = null;
  window.fetch = (path, options) => {
    if (!window.faulty || !path.startsWith(window.faulty.path)) return real(path, options);
    const { body, status, error } = window.faulty;
    window.faulty = null;
    if (error) return Promise.reject(new TypeError(error));
    const answer = new Response(body, { status });
    const { signal } = options; // where there is one, the rest of the body never comes
    const hangs = () => new Promise((_, fails) => signal.addEventListener("abort", () => fails(signal.reason)));
    if (signal) answer.json = hangs;
    return Promise.resolve(answer);
  };
})()"""


def faulty(page, path, body="", status=200, error=""):
    fault = {"path": path, "body": body, "status": status, "error": error}
    page.run(f"window.alerts || {_FAULTY}; window.faulty = {json.dumps(fault)}; true")


def test_a_request_that_could_not_be_loaded_is_asked_for_again(port, page):
    filled(port)
    in_queue(port, page)
    faulty(page, "/admin/requests/", error="no network")
    page.press("j")
    shows(page, "does not answer")
    page.press("r")
    shows(page, "question 1")


def test_an_answer_that_is_not_whole_is_no_empty_one(port, page):
    filled(port)
    in_queue(port, page)
    faulty(page, "/admin/labels", body='{"id": "' + ids(1)[0])
    page.press("h")
    page.until("document.querySelector('#toast .bad')?.innerText.includes('was cut off')")
    faulty(page, "/admin/labels", body="<html>", status=502)
    page.press("h")
    page.until("document.querySelector('#toast .bad')?.innerText.includes('The server answered 502')")


def test_who_goes_on_while_an_answer_comes_sees_no_error(port, page):
    filled(port)
    in_queue(port, page)
    faulty(page, "/admin/requests/", body='{"id"')
    page.press("j")
    page.until("!window.faulty")
    page.press("j")
    shows(page, "question 2")
    assert page.run("window.alerts") == []
