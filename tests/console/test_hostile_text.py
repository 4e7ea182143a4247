"""Hostile text in the console: prompts, answers, names and paths that are markup elsewhere are text there."""

import http.client
import itertools
import json

import pytest

from monitor.api.admin.console import HOME
from monitor.types import Action

from ..test_records import reading
from .test_console import shows

CALL = "payload(1)"
PAYLOADS = [
    f"<script>{CALL}</script>",
    f"<ScRiPt>{CALL}</sCrIpT>",
    f"<script src=data:text/javascript,{CALL}></script>",
    f"<script type=module>{CALL}</script>",
    f"<<script>{CALL}//<</script>",
    f"</script><script>{CALL}</script>",
    f"<img src=x onerror={CALL}>",
    f"<img src=x:x onerror='{CALL}'/>",
    f'"><img src=x onerror="{CALL}">',
    f"'><img src=x onerror='{CALL}'>",
    f"<img/src=x/onerror={CALL}>",
    "<img src=x onerror=&#112;ayload(1)>",
    f"<image href=x onerror={CALL}>",
    f"<svg onload={CALL}>",
    f"<svg/onload={CALL}>",
    f"<svg><script>{CALL}</script></svg>",
    f"<svg><animate onbegin={CALL} attributeName=x dur=1s>",
    f"<svg><set onbegin={CALL} attributeName=x>",
    f"<svg><a xlink:href='javascript:{CALL}'><text x=20 y=20>x</text></a></svg>",
    f"<svg><use href='data:image/svg+xml,<svg id=x xmlns=http://www.w3.org/2000/svg onload={CALL}>#x'></svg>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={CALL}>",
    f"<math><maction actiontype=statusline xlink:href=javascript:{CALL}>x</maction></math>",
    f"<body onload={CALL}>",
    f"<body onpageshow={CALL}>",
    f"<input autofocus onfocus={CALL}>",
    f"<select autofocus onfocus={CALL}>",
    f"<textarea autofocus onfocus={CALL}>",
    f"<textarea></textarea><script>{CALL}</script>",
    f"<title></title><script>{CALL}</script>",
    f"<style></style><script>{CALL}</script>",
    "<style>@import 'http://evil.example/x.css';</style>",
    f"<noscript><p title='</noscript><img src=x onerror={CALL}>'>",
    f"<template><script>{CALL}</script></template>",
    f"<details open ontoggle={CALL}>",
    f"<marquee onstart={CALL}>",
    f"<video><source onerror={CALL}></video>",
    f"<video src=x onerror={CALL}></video>",
    f"<audio src=x onerror={CALL}></audio>",
    f"<iframe src='javascript:parent.{CALL}'></iframe>",
    f"<iframe srcdoc='<script>parent.{CALL}</script>'></iframe>",
    f"<object data='javascript:{CALL}'></object>",
    f"<object data='data:text/html,<script>{CALL}</script>'></object>",
    f"<embed src='javascript:{CALL}'>",
    f"<form action=javascript:{CALL}><button autofocus>x</button></form>",
    f"<form><button formaction=javascript:{CALL}>x</button></form>",
    f"<isindex action=javascript:{CALL} type=submit>",
    f"<a href=javascript:{CALL}>click</a>",
    f"<a href='&#106;avascript:{CALL}'>click</a>",
    f"<base href=javascript:{CALL}//>",
    f"<meta http-equiv=refresh content='0;url=javascript:{CALL}'>",
    "<meta http-equiv=refresh content='0;url=http://evil.example/'>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<link rel=import href=http://evil.example/>",
    f"<img src=http://evil.example/?{CALL}>",
    "<div style=\"background:url('http://evil.example/')\">",
    f"<div style=width:expression({CALL})>",
    f"<xss id=x tabindex=1 autofocus onfocus={CALL}></xss>",
    f"<p onpointerover={CALL} onmouseenter={CALL}>over</p>",
    f"<div popover id=x onbeforetoggle={CALL}></div><button popovertarget=x>x</button>",
    f"<x contenteditable autofocus onfocus={CALL}>",
    f"<!--><img src=x onerror={CALL}>-->",
    f"<![CDATA[<img src=x onerror={CALL}>]]>",
    f"<?xml version='1.0'?><x onclick={CALL}>",
    f"javascript:{CALL}",
    f"data:text/html,<script>{CALL}</script>",
    f"${{{CALL}}}",
    f"{{{{constructor.constructor('{CALL}')()}}}}",
    f"`-{CALL}-`",
    f"';{CALL}//",
    f'";{CALL}//',
    f"\\u003cimg src=x onerror={CALL}\\u003e",
    f"&lt;img src=x onerror={CALL}&gt;",
    f"%3Cimg src=x onerror={CALL}%3E",
    f"+ADw-script+AD4-{CALL}+ADw-/script+AD4-",
    f"[x](javascript:{CALL})",
    f"![x](x){{onerror={CALL}}}",
    f"\u202e<img src=x onerror={CALL}>\u202c",
    f"<img src=x\u0000 onerror={CALL}>",
    f"<scr\u0000ipt>{CALL}</scr\u0000ipt>",
]
_FOREIGN = (
    "main :is(script, iframe, object, embed, img, image, video, audio, form, meta, base, link, style, marquee, x, xss)"
)


def shown(text):
    """As the console writes signs that do not print."""
    return "".join("□" if (ord(c) < 32 and c != "\n") or c in "\u202e\u202c" else c for c in text)


def test_payloads_are_text(port, page):
    """Each as a prompt or as an answer, and as all that a record names; opened one after the other."""
    pairs = list(itertools.zip_longest(PAYLOADS[::2], PAYLOADS[1::2], fillvalue=PAYLOADS[0]))
    names = [f"{i:032x}" for i in range(len(pairs))]
    for name, (text, answer) in zip(names, pairs, strict=True):
        port.say(name, text, answer, verdict=Action.BLOCK, key=text[:64], route=text[:20], model=text, policy=text)
    port.written()
    port.sign_in(page, "<img src=x onerror=payload(2)>")
    for name, texts in zip(names, pairs, strict=True):
        page.run(f"location.hash = '#/request/{name}/0'")
        page.until(f"document.querySelector('.detail .id')?.textContent === '{name}'")
        page.run("document.querySelectorAll('.detail span').forEach((e) => e.dispatchEvent(new Event('pointerover')))")
        # A redaction would be another text, so none of these may look like a secret.
        found = page.run("document.querySelector('.detail').textContent")
        assert all(shown(text) in found for text in texts), texts
        assert page.count(_FOREIGN) == 0, texts
    page.press("h")
    page.until("document.querySelector('.list .label')")
    page.press("2")
    page.until("document.querySelectorAll('.live tbody tr').length > 20")
    assert page.count(_FOREIGN) == 0
    assert not [url for url in page.asked if "evil" in url]
    print(f"\n{len(PAYLOADS)} payloads, {len(page.called)} executed, {len(page.dialogs)} dialogs, "
          f"{len(page.violations)} violations")  # fmt: skip
    assert len(PAYLOADS) >= 50


def test_what_strangers_ask_for_is_text_in_the_audit_trail(port, page):
    """Anybody who reaches the port writes there."""
    for text in PAYLOADS[:4]:
        connection = http.client.HTTPConnection("127.0.0.1", port.port)
        path = "".join(c if c.isascii() and c not in " %#?\u0000" else "+" for c in text)
        connection.request("GET", "/" + path, headers={"Host": "localhost"})
        assert connection.getresponse().status == 401
        connection.close()
    port.sign_in(page)
    page.run("location.hash = '#/audit'")
    page.until("document.querySelector('.audit table')?.textContent.includes('refused: no_key')")
    assert "<script>payload(1)</script>" in page.text(".audit table")
    assert page.count(_FOREIGN) == 0


def test_names_of_probes_are_text(port, page):
    name = "<img src=x onerror=payload(1)>"
    one = reading(Action.FLAG, probe=name, version=name, value=4.0)
    port.say("a" * 32, "hello", readings=(one,), token_scores={name: [1.0] * 40})
    port.written()
    port.sign_in(page)
    shows(page, f"{name}: harmless")
    page.press("f")
    page.until(f"[...document.querySelectorAll('option')].some((o) => o.textContent === '{name}, prompt')")
    assert page.count(_FOREIGN) == 0


HIDING = "\u00ad\u034f\u061c\u115f\u180b\u180e\u200d\u202e\u2065\u2069\u3164\ufe0f\uffa0\ufff9\U000e0041\U000e0100"
EMOJI = ["\u2764\ufe0f", "\U0001f469\U0001f3fd\u200d\U0001f680", "\U0001f3f3\ufe0f\u200d\U0001f308"]


def test_what_hides_in_text_is_a_box(port, page):
    port.say("a" * 32, "".join(f"x{c}" for c in HIDING))
    port.written()
    port.sign_in(page)
    shows(page, "x□" * len(HIDING))


def test_what_joins_signs_to_an_emoji_is_a_box_anywhere_else(port, page):
    page.open(f"http://127.0.0.1:{port.port}{HOME}")
    given = ["".join(EMOJI), "a\u200db", "\u2764\ufe0f\ufe0f\u200dx", "\u200d\U0001f680", "1\ufe0f", "tab\tand\nline"]
    made = page.run(f"import('{HOME}/dom.js').then(({{ visible }}) => {json.dumps(given)}.map(visible))")
    assert made == [given[0], "a□b", "\u2764\ufe0f□□x", "□\U0001f680", "1□", given[-1]]


@pytest.mark.parametrize("place", ["#/request/<img src=x onerror=payload(1)>/0", "#/%E0%A4%A", "#/queue/../x", "#x"])
def test_an_address_is_no_markup(port, page, place):
    port.sign_in(page)
    page.run(f"location.hash = {place!r}")
    page.open(f"http://127.0.0.1:{port.port}{HOME}{place.replace(' ', '%20')}")
    page.until("document.querySelector('.side')")
    assert page.count(_FOREIGN) == 0


def test_the_rules_hold_even_for_what_would_break_out(port, page):
    """If markup did get in, nothing would run: each attempt is a violation, and none calls."""
    port.sign_in(page)
    tried = page.run(
        """(async () => {
          document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=payload(1)><p style='color:red'>x</p>");
          for (const [name, value] of [["textContent", "payload(2)"], ["src", "data:text/javascript,payload(3)"],
                                       ["src", "http://127.0.0.1:9/x.js"]]) {
            const script = document.createElement("script"); script[name] = value; document.body.append(script);
          }
          const image = new Image(); image.src = "http://127.0.0.1:9/x.png";
          const refused = await fetch("http://127.0.0.1:9/").then(() => false, () => true);
          try { (0, window["ev" + "al"])("payload(4)"); } catch { /* forbidden */ }
          await new Promise((done) => setTimeout(done, 300));
          return [refused, violations.map((v) => v.split(" ")[0])];
        })()"""
    )
    refused, broken = tried
    assert refused and {"img-src", "connect-src", "script-src-elem", "script-src-attr", "style-src-attr"} <= set(broken)
    assert "script-src" in broken  # the text that was to be evaluated
    assert page.called == []
    page.run("window.violations = []")
    page.said.clear()
