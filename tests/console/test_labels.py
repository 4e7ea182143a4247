"""Which request a label goes to: the one that is drawn, whatever the hands do faster than the server answers."""

import json

from monitor.traffic import find_labels

from .test_console import current, filled, ids, in_queue, shows

# window.holds: a pattern of "METHOD path"; what fits it is sent when `letGo` is called.
_HOLD = """(() => {
  const [real, held] = [window.fetch, []];
  window.holds = null;
  window.held = () => held.length;
  window.letGo = () => { window.holds = null; held.splice(0).forEach((go) => go()); };
  window.fetch = (path, options) => {
    const hold = window.holds?.test(`${options.method} ${path}`);
    return hold ? new Promise((go) => held.push(go)).then(() => real(path, options)) : real(path, options);
  };
})()"""


def hold(page, pattern):
    page.run(f"{_HOLD}; window.holds = new RegExp({json.dumps(pattern)}); true")


def labels(port, n=6):
    return [[row["label"] for row in find_labels(port.path, i, 0)] for i in ids(n)]


def sent(page):
    """How many labels the page has sent."""
    page.run("1")
    return sum(url.endswith("/admin/labels") for url in page.asked)


def filter_key(page, name):
    field = "document.querySelector('[name=key]')"
    page.run(f"{field}.value = {json.dumps(name)}; {field}.dispatchEvent(new Event('change'))")


def test_while_the_next_request_opens_nothing_is_labelled(port, page):
    filled(port)
    in_queue(port, page)
    hold(page, "GET /admin/requests/")
    page.press("j")
    page.until("held() === 1")
    assert "question 0" in page.text(".detail")
    page.run("document.querySelector('.say.harmless').click()")
    page.press("h")
    page.until("document.getElementById('toast').innerText.includes('Not labelled')")
    page.run("letGo()")
    shows(page, "question 1")
    page.press("u")
    shows(page, "question 2")
    assert labels(port) == [[], ["unsure"], [], [], [], []]


def test_a_key_that_is_held_down_labels_one_request(port, page):
    filled(port)
    in_queue(port, page)
    page.hold("h")
    shows(page, "question 1")
    page.hold("h", again=True)
    page.hold("j")
    shows(page, "question 2")
    page.hold("j", again=True)  # going on may be held
    shows(page, "question 3")
    assert (labels(port), sent(page)) == ([["harmful"], [], [], [], [], []], 1)


def test_one_label_is_sent_at_a_time_and_who_goes_on_meanwhile_is_not_called_back(port, page):
    filled(port)
    in_queue(port, page)
    hold(page, "POST /admin/labels")
    page.press("h", "s")
    page.until("held() === 1 && document.getElementById('toast').innerText.includes('being sent')")
    page.press("j")
    shows(page, "question 1")
    page.run("letGo()")
    page.until("document.querySelector('.list li.done')")
    page.press("s")
    shows(page, "question 2")
    assert (current(page), labels(port)) == (f"{ids(3)[2]}/0", [["harmful"], ["harmless"], [], [], [], []])


def test_behind_the_last_request_that_is_loaded_comes_the_next_page(port, page):
    filled(port, 53)
    in_queue(port, page)
    page.until("document.querySelectorAll('.list a').length === 50")
    page.run("document.querySelectorAll('.list a')[49].click()")
    shows(page, "question 49")
    page.press("h")
    shows(page, "question 50")
    assert current(page) == f"{ids(51)[50]}/0"
    page.press("s")
    shows(page, "question 51")
    page.press("j")
    shows(page, "question 52")
    page.press("j")  # there is none
    page.press("u")
    page.until("document.querySelector('.say.unsure')?.getAttribute('aria-pressed') === 'true'")
    assert labels(port, 53)[48:] == [[], ["harmful"], ["harmless"], [], ["unsure"]]


def test_going_on_at_the_end_loads_once_and_goes_one_further(port, page):
    filled(port, 53)
    in_queue(port, page)
    page.run("document.querySelectorAll('.list a')[49].click()")
    shows(page, "question 49")
    hold(page, "GET /admin/queue\\?")
    page.press("j")
    page.until("held() === 1")
    page.press("k")
    shows(page, "question 48")
    page.run("letGo()")
    page.until("document.querySelectorAll('.list a').length === 53")
    assert current(page) == f"{ids(49)[48]}/0", "who went back meanwhile stays there"


def test_where_nothing_is_shown_nothing_is_labelled(port, page):
    filled(port)
    in_queue(port, page)
    filter_key(page, "nobody")
    shows(page, "Nothing waits for a label here")
    page.press("h", "s")
    filter_key(page, "")
    shows(page, "question 0")
    assert (labels(port), sent(page)) == ([[]] * 6, 0)


def test_the_focus_stays_where_it_was(port, page):
    """Labelling by the buttons, or from within the text, does not throw a keyboard back to the top of the page."""
    filled(port)
    in_queue(port, page)
    page.run("document.querySelector('.say.harmless').focus()")
    page.press("Enter")
    shows(page, "question 1")
    assert page.run("document.activeElement.matches('.detail .say.harmless')")
    page.press("t", "h")
    shows(page, "question 2")
    assert page.run("document.activeElement.matches('.detail')")
    page.run("document.querySelector('.list a').focus()")
    page.press("h")
    shows(page, "question 3")
    assert page.run("document.activeElement.matches('.list a')")


def test_a_choice_that_is_not_there_is_not_another_one(port, page):
    filled(port)
    in_queue(port, page)
    page.run(f"location.hash = '#/request/{ids(1)[0]}/7'")
    shows(page, "choice 7; it may be older")
    page.press("h")
    assert sent(page) == 0
