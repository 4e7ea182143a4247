"""What is filtered for can be seen, and cleared."""

from .test_console import filled, in_queue


def choose(page, name, value):
    field = f"document.querySelector('[name={name}]')"
    page.run(f"{field}.value = {value!r}; {field}.dispatchEvent(new Event('change'))")


def test_a_probe_filter_is_seen_and_can_be_cleared(port, page):
    filled(port)
    in_queue(port, page)
    page.press("f")
    page.until("document.activeElement.name === 'probe'")
    assert page.count(".filters .dot") == 0, "nothing is set, whether the box is open or not"
    choose(page, "probe", "demo/prompt")
    page.until("document.querySelector('.filters .dot')")
    choose(page, "labelled", "yes")  # of which there are none: no row names the probe now
    page.until("document.querySelector('.foot').innerText.includes('Nothing here')")
    page.run("document.activeElement.blur()")  # in a field keys are what one writes
    page.press("2")
    page.until("document.querySelector('.live')")
    page.press("1")
    page.until("document.querySelector('.foot')?.innerText.includes('Nothing here')")
    assert page.run("document.querySelector('[name=probe]').value") == "demo/prompt"
    choose(page, "probe", "")
    choose(page, "labelled", "no")
    page.until("document.querySelectorAll('.list a').length === 6 && !document.querySelector('.filters .dot')")
