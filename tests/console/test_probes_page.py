"""The Probes page: an operator changes what he has seen, and is told what serves."""

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
