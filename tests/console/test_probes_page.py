"""The Probes page: an operator changes what he has seen, and is told what serves."""

import json

from .test_console import filled, in_queue, press_button


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
