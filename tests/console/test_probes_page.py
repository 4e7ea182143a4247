"""The Probes page: an operator changes what he has seen, and is told what serves."""

import json

from .test_console import filled, in_queue, press_button
from .test_labels import hold


def on_probes(port, page):
    filled(port)
    in_queue(port, page)
    page.press("3")
    page.until("document.querySelector('.card')")


def test_two_operators_roll_back_once(port, page):
    on_probes(port, page)
    press_button(page, "Promote")
    page.press("Enter")
    page.until("document.querySelector('.card').innerText.includes('v2 live') && !document.querySelector('dialog')")
    press_button(page, "Roll back to v1")
    page.until("document.querySelector('dialog[open]')")
    port.probes.live, port.probes.previous = "v1", "v2"  # by somebody else, meanwhile
    page.press("Enter")
    page.until("document.querySelector('dialog [role=alert]').innerText.includes('v2 is not live any more, v1 is')")
    page.press("Escape")
    assert port.probes.live == "v1"
    page.press("r")
    page.until("document.querySelector('.card').innerText.includes('v1 live')")
    press_button(page, "Roll back to v2")
    page.press("Enter")
    page.until("document.getElementById('toast').innerText.includes('demo v2 is live')")


def card(page, words):
    page.until(f"document.querySelector('.card').innerText.includes({json.dumps(words)})")


def test_what_serves_is_told_apart_from_what_live_json_names(port, page):
    on_probes(port, page)
    card(page, "v1 live")
    port.probes.serves, port.probes.live, port.probes.previous = "v1", "v2", "v1"  # refused: its canaries are off
    port.probes.candidate = "v0"
    page.press("r")
    card(page, "live.json names v2, but v1 serves here")
    card(page, "v0 is chosen for shadow, but does not run")
    text = page.text(".card")
    assert "v1 live" in text and "v2 live" not in text and "in shadow" not in text.replace("shadow, but", "")
    rows = page.run("[...document.querySelectorAll('.card tbody tr')].map((r) => r.cells[1].innerText)")
    assert rows[:2] == ["chosen, does not serve", "live"]
    port.probes.live, port.probes.missing = "v9", True
    page.press("r")
    card(page, "live.json names v9, which is not in the store")
    port.probes.serves = None
    press_button(page, "Roll back to v1")
    page.press("Enter")
    card(page, "v1 live")


def focused(page):
    return page.run("document.activeElement.dataset.probe ?? document.activeElement.tagName")


def test_the_focus_comes_back_to_the_card(port, page):
    on_probes(port, page)
    press_button(page, "Promote")
    page.press("Escape")
    page.until("!document.querySelector('dialog')")
    assert page.run("document.activeElement.innerText") == "Promote", "nothing was changed, so it is where it was"
    page.press("Enter")
    page.press("Enter")
    card(page, "v2 live")
    page.until("!document.querySelector('dialog')")
    page.until("document.activeElement.dataset.probe === 'demo'")
    press_button(page, "Retrain")
    page.press("Escape")
    page.until("!document.querySelector('dialog')")
    port.probes.live = "v1"
    page.press("r")
    card(page, "v1 live")
    assert focused(page) == "demo"


def test_what_goes_wrong_behind_a_dialog_that_was_closed_is_said(port, page):
    on_probes(port, page)
    hold(page, "POST /admin/probes/demo/promote")
    press_button(page, "Promote")
    page.press("Enter")
    page.until("held() === 1")
    page.press("Escape")
    page.until("!document.querySelector('dialog')")
    port.probes.live = "v0"
    page.run("letGo()")
    page.until("document.querySelector('#toast .bad')?.innerText.includes('v1 is not live any more, v0 is')")


def training(port, state, **more):
    port.probes.training = port.probes.training | {"state": state, "probe": "demo", "lines": ["fitting"]} | more


def test_a_training_that_could_not_be_started_has_not_begun(port, page):
    port.probes.starts = False
    on_probes(port, page)
    press_button(page, "Retrain")
    page.press("Enter")
    page.until("document.querySelector('dialog [role=alert]').innerText.includes('the disk is full')")
    page.press("Escape")
    assert "has begun" not in page.text("#toast")


def test_behind_a_dialog_no_key_does_anything(port, page):
    """Wherever the focus is: after a click beside the dialog's buttons it is in no dialog."""
    on_probes(port, page)
    press_button(page, "Promote")
    page.until("document.querySelector('dialog[open]')")
    page.run("document.activeElement.blur()")
    page.press("2", "?")
    assert page.count("dialog") == 1 and page.count(".live") == 0
    page.press("Escape")
    page.until("!document.querySelector('dialog')")
    page.press("2")
    page.until("document.querySelector('.live')")


def test_a_training_that_is_left_has_not_failed(port, page):
    training(port, "running")
    on_probes(port, page)
    page.until("document.querySelector('.training pre')")
    hold(page, "GET /admin/retrain")
    page.until("held() === 1")
    page.press("2")
    page.until("document.querySelector('.live')")
    page.run("letGo()")
    page.press("3")
    page.until("document.querySelector('.training pre')")
    assert page.text("#toast") == ""
    training(port, "failed", exit_code=1)
    page.until("document.getElementById('toast').innerText.includes('The training failed')")


def test_one_poll_that_fails_does_not_end_the_polling(port, page):
    training(port, "running")
    on_probes(port, page)
    page.until("document.querySelector('.training pre')")
    page.run(
        "(real => { window.fetch = (path, options) => path === '/admin/retrain'"
        " ? (window.fetch = real, Promise.reject(new TypeError('no network'))) : real(path, options); })(window.fetch)"
    )
    page.until("document.querySelector('.training [role=alert]')?.innerText.includes('does not answer')")
    training(port, "done", exit_code=0)
    page.until("document.getElementById('toast').innerText.includes('The training is done')")


def test_a_probe_that_starts_idle_can_be_promoted(port, page):
    port.probes.live = port.probes.candidate = None
    on_probes(port, page)
    card(page, "In the store, and not served")
    words = page.run("[...document.querySelectorAll('.card button')].map((b) => b.innerText)")
    assert words == ["Promote", "Promote"], "there is nothing to retrain from, or to run beside"
    press_button(page, "Promote")
    page.until("document.querySelector('dialog[open]').innerText.includes('none has served before it')")
    page.press("Enter")
    card(page, "v2 live")
    assert "idle" not in page.text(".card")
