"""The Live page: what went by since one looks, counted once, whatever becomes of the connection."""

import contextlib
import threading

from monitor.api.admin import review

from .test_console import filled, in_queue


def sums(page, words):
    page.until(f"document.querySelector('.sums').innerText.replaceAll('\\n', ' ').includes({words!r})")


def test_a_connection_that_breaks_counts_nothing_twice_and_misses_nothing(port, page, monkeypatch):
    broken, real = threading.Event(), review._events

    async def cut(*given):
        async with contextlib.aclosing(real(*given)) as events:
            async for event in events:
                if broken.is_set() and event is not None:
                    broken.clear()
                    return
                yield event

    monkeypatch.setattr(review, "_events", cut)
    filled(port)
    in_queue(port, page)
    page.press("2")
    page.until("document.querySelectorAll('.live tbody tr').length === 6")
    sums(page, "block 0 ▲ flag 0")
    port.say("a" * 32, "one more", value=5.0)
    sums(page, "flag 1")
    broken.set()
    port.say("b" * 32, "lost with the connection", value=5.0)
    port.say("c" * 32, "another", value=5.0)
    page.until("document.querySelectorAll('.live tbody tr').length === 9")
    sums(page, "block 0 ▲ flag 3")
    page.until("document.querySelector('.live [role=status]').innerText === 'live'")
    assert "unseen" not in page.text(".sums")


def test_what_is_over_is_not_called_live(port, page):
    filled(port)
    in_queue(port, page)
    page.press("2")
    page.until("document.querySelector('.live [role=status]')")
    state = "document.querySelector('.live [role=status]').innerText"
    page.until(f"{state} === 'live'")
    page.press("p")
    page.until(f"{state} === 'paused'")
    page.press("p")
    page.until(f"{state} === 'live'")
    port.clock.now += 1801
    page.until(f"{state}.includes('the session has ended')")
    page.press("p")
    page.press("p")
    assert "the session has ended" in page.run(state)
