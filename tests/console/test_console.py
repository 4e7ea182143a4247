"""The review console in a real Chromium: by keys alone, on a phone's width, and with hostile text that stays text."""

import json

import pytest

from monitor.api.admin.console import HOME
from monitor.traffic import find_labels
from monitor.types import Action

from ..console_port import ConsolePort


def ids(n):
    return [f"{i:032x}" for i in range(1, n + 1)]


def filled(port, n=6):
    for i, request_id in enumerate(ids(n)):
        verdict = (Action.BLOCK, Action.FLAG)[i % 2]
        port.say(request_id, f"question {i}", f"answer {i}", value=9.0 - i, verdict=verdict)
    port.written()


def in_queue(port, page):
    port.sign_in(page)
    page.until("document.querySelectorAll('.list a').length >= 6 && document.querySelector('.detail .tokens')")


def current(page):
    return page.run("document.querySelector('.list a[aria-current]')?.dataset.id")


def shows(page, text):
    page.until(f"document.querySelector('.detail').innerText.includes({json.dumps(text)})")


# --- signing in -----------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_said_and_a_right_one_opens(port, page):
    page.open(f"http://127.0.0.1:{port.port}{HOME}")
    page.until("document.activeElement.name === 'key'")
    page.write("not the admin key")
    page.press("Enter")
    page.until("document.querySelector('[role=alert]').innerText.includes('not the admin key')")
    filled(port)
    in_queue(port, page)
    assert page.text("#who") == "ann"
    stored = page.run("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert "the-admin-key" not in stored and "midstream_session" not in stored
    page.run("document.getElementById('leave').click()")
    page.until("document.activeElement.name === 'key'")
    assert [r["actor"] for r in port.rows() if r["method"] == "DELETE"] == ["admin:ann"]
    page.open(f"http://127.0.0.1:{port.port}{HOME}#/audit")
    page.until("document.activeElement.name === 'key'")


def test_a_session_that_has_ended_asks_for_the_key_again(port, page):
    filled(port)
    in_queue(port, page)
    port.clock.now += 1801
    page.press("r")
    page.until("document.querySelector('form.signin')?.innerText.includes('session has ended')")


def test_who_is_not_signed_out_is_not_told_so(port, page):
    """The cookie is still there, and whoever comes next would be this operator."""
    filled(port)
    in_queue(port, page)
    page.run("window.real = window.fetch; window.fetch = () => Promise.reject(new TypeError('no network'))")
    page.run("document.getElementById('leave').click()")
    page.until("document.querySelector('#toast .bad')?.innerText.includes('You are still signed in')")
    assert page.count(".signin") == 0 and page.text("#who") == "ann"
    page.run("window.fetch = window.real; document.getElementById('leave').click()")
    page.until("document.querySelector('form.signin')?.innerText.includes('You are signed out')")


# --- reviewing by keys ----------------------------------------------------------------------------------------------


def test_labels_by_keyboard(port, page):
    filled(port)
    in_queue(port, page)
    first, second, third = (f"{i}/0" for i in ids(3))
    assert (current(page), page.text("#waiting")) == (first, "6")
    page.press("j")
    shows(page, "question 1")
    page.press("k")
    shows(page, "question 0")
    page.press("h")
    shows(page, "question 1")
    assert current(page) == second
    page.press("s")
    shows(page, "question 2")
    page.press("u")
    shows(page, "question 3")
    page.until("document.getElementById('waiting').innerText === '3'")
    page.press("z")  # back to what was labelled last
    page.until(f"document.querySelector('.list a[aria-current]').dataset.id === {json.dumps(third)}")
    shows(page, "question 2")
    page.press("h")
    shows(page, "question 3")
    found = [[(row["label"], row["by"]) for row in find_labels(port.path, i, 0)] for i in ids(3)]
    assert found == [[("harmful", "ann")], [("harmless", "ann")], [("harmful", "ann"), ("unsure", "ann")]]
    page.press("k")
    shows(page, "earlier")
    rows = [(r["actor"], r["path"], r["result"]) for r in port.rows() if r["method"] == "POST"]
    words = (f"{first} harmful", f"{second} harmless", f"{third} unsure", f"{third} harmful, was unsure")
    said = [("admin:ann", "/admin/labels", f"200 labelled {w}") for w in words]
    assert rows == [("admin", "/admin/session", "200"), *said]


def test_without_a_mouse_everything_can_be_reached(port, page):
    """Every control has a name and takes the focus; keys that are typed into a field label nothing."""
    filled(port)
    in_queue(port, page)
    page.press("f")
    page.until("document.activeElement.tagName === 'SELECT'")
    nameless = page.run(
        "[...document.querySelectorAll('button, a, input, select, [tabindex=\"0\"]')].filter((e) =>"
        " e.checkVisibility() && !(e.getAttribute('aria-label') || e.innerText.trim() || e.labels?.[0]?.innerText"
        " || e.classList.contains('skip'))).map((e) => e.outerHTML)"
    )
    assert nameless == []
    page.run("document.querySelector('input[type=search]').focus()")
    page.press("h", "s", "j")
    assert page.run("document.querySelector('input[type=search]').value") == "hsj"
    assert find_labels(port.path, ids(1)[0], 0) == []
    page.run("document.activeElement.value = ''; document.activeElement.blur()")
    page.press("t")
    page.press("ArrowRight", "ArrowRight")
    assert page.text(".readout").startswith("prompt, token 2")
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.run("document.activeElement.innerText.slice(0, 12)"))
    assert {"Harmful h", "Harmless s", "Unsure u"} <= {r.replace("\n", " ") for r in reached}
    page.press("?")
    page.until("document.querySelector('dialog[open]')?.innerText.includes('label: harmful')")
    page.press("h", "Escape")
    page.until("!document.querySelector('dialog')")
    assert find_labels(port.path, ids(1)[0], 0) == []


def test_single_keys_can_be_switched_off(port, page):
    filled(port)
    in_queue(port, page)
    page.press("?")
    page.run("document.querySelector('dialog input').click()")
    page.press("Escape", "h", "j")
    assert (current(page), find_labels(port.path, ids(1)[0], 0)) == (f"{ids(1)[0]}/0", [])


def test_filters_and_orders(port, page):
    filled(port)
    in_queue(port, page)
    page.run("document.querySelectorAll('.segments button')[1].click()")
    page.until("document.querySelector('.foot').innerText.includes('Distances from 2.00')")
    assert page.run("[...document.querySelectorAll('.list a')].map((a) => a.dataset.id)") == [
        f"{i}/0" for i in reversed(ids(6))
    ]
    page.press("f")
    page.run(
        "[...document.querySelectorAll('fieldset input')].find((e) => e.parentNode.innerText.includes('block')).click()"
    )
    page.until("document.querySelectorAll('.list a').length === 3")
    assert page.count(".list .verdict.flag") == 3


def test_the_text_is_coloured_where_the_probe_read_it(port, page):
    filled(port)
    in_queue(port, page)
    n = page.count(".tokens:first-of-type span")
    assert page.run("[...document.querySelectorAll('.tokens')].map((t) => t.innerText).join('|')").endswith("|answer 0")
    assert page.count(".tokens .crossed") == 1 and page.count(".tokens .heat4") > 3 and n > 20
    assert page.count(".trace .curve.series0") >= 1 and page.count(".trace circle.crossed") == 1
    assert "crossed at token" in page.run("document.querySelector('.trace').getAttribute('aria-label')")


def test_redacted_text_has_no_colours_and_no_text_is_said(port, page, tmp_path):
    port.say("a" * 32, "write to eve@example.com now", value=4.0)
    port.say("b" * 32, "short", value=3.0)
    port.written()
    port.sign_in(page)
    shows(page, "write to [mail] now")
    shows(page, "Without colours")
    other = ConsolePort(tmp_path / "other", texts=False)
    try:
        other.say("c" * 32, "a secret text", value=4.0)
        other.written()
        other.sign_in(page)
        shows(page, "Not kept")
        assert page.count(".trace svg") == 1 and "secret" not in page.text()
    finally:
        other.stop()


# --- traffic, probes, audit -----------------------------------------------------------------------------------------


def test_traffic_goes_by_without_text(port, page):
    filled(port)
    in_queue(port, page)
    page.press("2")
    page.until("document.querySelectorAll('.live tbody tr').length === 6")
    port.say("f" * 32, "a new question", value=5.0)
    page.until("document.querySelectorAll('.live tbody tr').length === 7")
    assert "question" not in page.text(".live")
    page.press("p")
    port.say("e" * 32, "another", value=5.0)
    page.until("document.querySelector('.sums').innerText.includes('flag 2')")
    assert page.count(".live tbody tr") == 7
    page.press("p")
    page.until("document.querySelectorAll('.live tbody tr').length === 8")


def press_button(page, words):
    page.run(
        f"[...document.querySelectorAll('button')].find((b) => b.innerText.startsWith({json.dumps(words)})).focus()"
    )
    page.press("Enter")


def test_promote_roll_back_shadow_and_retrain(port, page):
    filled(port)
    in_queue(port, page)
    page.press("3")
    page.until("document.querySelector('.card')?.innerText.includes('60 more requests are needed')")
    assert "damaged: its sha256 is another" in page.text(".card")
    stale, few = page.run("[...document.querySelectorAll('.card .standing')].map((p) => p.innerText)")
    assert "prompt, chat: 2.05 % of the newest 2,000 are above the threshold [1.48 %, 2.77 %]" in stale
    assert "certified for 0.50 %, PSI 0.31 · The threshold is stale: it flags more than it is certified for" in stale
    assert few == "response, chat: 12 values so far, too few to say how the threshold fits"
    assert page.run("[...document.querySelectorAll('.card button')].map((b) => b.innerText)") == [
        "Retrain", "Promote", "Stop shadow",
    ]  # fmt: skip
    press_button(page, "Promote")
    page.until("document.querySelector('dialog[open]')?.innerText.includes('Promote v2')")
    page.press("Escape")
    assert port.probes.asked == []
    press_button(page, "Promote")
    page.press("Enter")
    page.until("document.querySelector('.card').innerText.includes('v2 live')")
    press_button(page, "Roll back to v1")
    page.press("Enter")
    page.until("document.querySelector('.card').innerText.includes('v1 live')")
    press_button(page, "Shadow")
    page.press("Enter")
    page.until("document.querySelector('.card').innerText.includes('v2 in shadow')")
    press_button(page, "Retrain")
    page.press("Enter")
    page.until("document.querySelector('.training pre')?.innerText.includes('gate: PASS')")
    assert "<b>fitting</b>" in page.text(".training pre")
    assert port.probes.asked == [
        ("promote", "demo", "v2"), ("rollback", "demo", "v1"), ("shadow", "demo", "v2"), ("retrain", "demo"),
    ]  # fmt: skip
    page.until("!document.querySelector('dialog')")
    page.press("4")
    page.until("document.querySelector('.audit table')?.innerText.includes('/admin/probes/demo/rollback')")
    assert page.text(".audit table").count("admin:ann") >= 4
    for words in ("200 promoted v2, v1 is kept", "200 rolled back to v1, v2 is kept", "202 retrain demo"):
        assert words in page.text(".audit table")


# --- every width, both schemes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(port, page, width):
    filled(port)
    port.say("d" * 32, "x" * 3000 + " " + "long words " * 50, "y" * 500, value=20.0, key="k" * 64, model="m" * 90)
    port.written()
    page.size(width, 800)
    port.sign_in(page)
    page.until("document.querySelectorAll('.list a').length >= 7")
    for place in ("#/queue", "#/request/" + "d" * 32 + "/0", "#/live", "#/probes", "#/audit"):
        page.run(f"location.hash = {place!r}")
        page.until("[...document.querySelectorAll('.tokens, td, .card, .list a')].some((e) => e.checkVisibility())")
        wide = page.run("document.documentElement.scrollWidth")
        assert wide <= width, place


def test_a_phone_has_one_thing_at_a_time(port, page):
    filled(port)
    page.size(390, 800)
    port.sign_in(page)
    page.until("document.querySelectorAll('.list a').length >= 6")
    assert not page.run("document.querySelector('.detail').checkVisibility()")
    page.run("document.querySelector('.list a').click()")
    shows(page, "question 0")
    assert not page.run("document.querySelector('.side').checkVisibility()")
    page.run("document.querySelector('.say.harmful').click()")
    shows(page, "question 1")
    page.run("document.querySelector('.back').click()")
    page.until("document.querySelector('.side').checkVisibility()")


_CONTRAST = """((element) => {
  const paint = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  const painted = (layers) => {
    paint.clearRect(0, 0, 1, 1);
    for (const colour of layers) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
  };
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
  const light = (rgb) => rgb.map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [a, b] = [painted(layers), painted([getComputedStyle(element).color])].map(light).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
})(document.querySelector(SELECTOR))"""


def contrast(page, selector):
    """Of an element's text to what lies behind it, by WCAG."""
    return page.run(_CONTRAST.replace("SELECTOR", json.dumps(selector)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_both_schemes(port, page, scheme):
    filled(port)
    page.prefers(color_scheme=scheme, reduced_motion="reduce")
    in_queue(port, page)
    named = (
        ".verdict.block,.verdict.flag,.list .soft,.tokens .heat4,.frame,.say.harmful,.say.harmless,.head .soft,.legend"
    )
    found = {selector: contrast(page, selector) for selector in named.split(",") if page.count(selector)}
    print(f"\n{scheme}: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in found.items()))
    assert len(found) == 9 and min(found.values()) >= 4.5
    moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
    assert page.run(moving) == 0
