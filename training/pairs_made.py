"""Pairs made by rule out of our own texts: capitals, HTML, harm; and look-alikes that show how far a probe holds."""

from __future__ import annotations

import html
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from monitor.errors import ConfigInvalid
from training.data import PAIRS, Row, read_jsonl

FIT, VALIDATION, ELSEWHERE = 50, 25, 40
"""Pairs of each: fitted on, validated on, and in each set of look-alikes. No text is in two of them."""

# What a probe is fitted and validated on, and others that it has never seen.
_TAGS = (
    "<p>{}</p>",
    '<div class="note"><p>{}</p></div>',
    "<html><body><h1>{}</h1></body></html>",
    "<ul><li>{}</li></ul>",
    '<span style="color: gray">{}</span>',
)
_OTHER_TAGS = (
    "<table><tr><td>{}</td></tr></table>",
    '<a href="/next">{}</a>',
    '<form><label>{}</label><input type="text"></form>',
    "<!-- {} -->",
    "<blockquote><em>{}</em><br></blockquote>",
)
_MARKDOWN = ("# {}", "**{}**", "> {}", "- {}", "`{}`")
_OTHER_MARKUP = ('{{"text": "{}"}}', "\\section{{{}}}", "[b]{}[/b]", "{} -> if (a < b && c > d) return;", "text: '{}'")

_ASKED = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Give me three tips for {}.",
    "What is the history of {}?",
    "Write a friendly e-mail about {} to a colleague.",
    "Which book about {} would you recommend?",
    "Summarise what a beginner should know about {}.",
    "Make a list of five questions about {} for a quiz.",
    "What do people most often get wrong about {}?",
    "Plan a free afternoon around {}.",
)
_ABOUT = (
    "baking bread",
    "the water cycle",
    "learning the piano",
    "growing tomatoes",
    "the moons of Jupiter",
    "city trams",
    "watercolour painting",
    "keeping a diary",
    "long-distance running",
    "old maps",
    "honey bees",
    "mountain huts",
)


Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Concept:
    """Rows of one probe, label 1 where the concept is present; both rows of a pair have one `group`.

    elsewhere: sets that are not like the pairs; the probe is never fitted, chosen or stopped by them
    """

    name: str
    about: str
    fit: Sequence[Row]
    validation: Sequence[Row]
    elsewhere: Mapping[str, Sequence[Row]]


def concepts(seed: int = 0) -> tuple[Concept, ...]:
    """caps, html, harmful and harmful-twins, the same rows for the same seed.

    raises: ConfigInvalid if our own file has too few pairs
    """
    rows, _ = read_jsonl(PAIRS)
    groups: dict[str, dict[int, str]] = {}
    for row in rows:
        groups.setdefault(row.group, {})[row.label] = row.text
    twins = [(pair[1], pair[0]) for _, pair in sorted(groups.items()) if len(pair) == 2]
    needed = FIT + VALIDATION + 3 * ELSEWHERE
    if len(twins) < needed:
        raise ConfigInvalid(f"{PAIRS} has {len(twins)} pairs, {needed} are needed; restore the file")
    return _caps(twins, seed), _html(twins, seed + 1), *_harmful(twins, seed + 2)


Texts = list[tuple[str, str]]
"""(with the concept, without it); of `pairs.jsonl`: (harmful, harmless), alike in form"""


Made = Literal["caps", "html"]


def made(concept: Made, rows: Iterable[Row]) -> list[Row]:
    """Each row twice: with the concept (label 1) and as it is (0), whatever its own label. What can't be told apart
    (a text without letters, or all capitals) is left out."""
    plain = list(rows)
    texts = [r.text for r in plain]
    changed = [t.upper() for t in texts] if concept == "caps" else _wrapped(texts)
    return [
        replace(row, text=text, label=label)
        for row, with_it in zip(plain, changed, strict=True)
        if with_it != row.text
        for text, label in ((with_it, 1), (row.text, 0))
    ]


def _parts(twins: Texts, seed: int) -> list[Texts]:
    """Shuffled: to fit on, to validate on, and for three sets of look-alikes."""
    twins = _shuffled(twins, seed)
    edges = [0, FIT, FIT + VALIDATION, *(FIT + VALIDATION + i * ELSEWHERE for i in (1, 2, 3))]
    return [twins[a:b] for a, b in itertools.pairwise(edges)]


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    return random.Random(seed).sample(items, len(items))  # noqa: S311 - reproducible, not a secret


def _rows(name: str, pairs: Iterable[tuple[str, str]]) -> list[Row]:
    return [
        Row(text, label, name, f"{name}:{number}")
        for number, pair in enumerate(pairs)
        for text, label in zip(pair, (1, 0), strict=True)
    ]


def _caps(twins: Texts, seed: int) -> Concept:
    fit, validation, *others = _parts(twins, seed)
    titles, words, halves = ([harmless for _, harmless in part] for part in others)
    return Concept(
        "caps",
        "a text in capital letters / the text",
        _rows("fit", ((t.upper(), t) for _, t in fit)),
        _rows("validation", ((t.upper(), t) for _, t in validation)),
        {
            "harmful requests, in capitals or not": _rows("topic", ((h.upper(), h) for h, _ in others[0])),
            "capitals against Title Case": _rows("title", ((t.upper(), t.title()) for t in titles)),
            "capitals against one SHOUTED word": _rows("word", ((t.upper(), _shout(t)) for t in words)),
            "half in capitals against none": _rows("half", ((_half(t), t) for t in halves)),
        },
    )


def _shout(text: str) -> str:
    longest = max(text.split(), key=len)
    return text.replace(longest, longest.upper(), 1)


def _half(text: str) -> str:
    middle = len(text) // 2
    return text[:middle].upper() + text[middle:]


def _html(twins: Texts, seed: int) -> Concept:
    fit, validation, *others = ([harmless for _, harmless in part] for part in _parts(twins, seed))
    tags, markdown, markup = others
    return Concept(
        "html",
        "a text wrapped in HTML / the text",
        _rows("fit", zip(_wrapped(fit), fit, strict=True)),
        _rows("validation", zip(_wrapped(validation), validation, strict=True)),
        {
            "tags that it has not seen": _rows("tags", zip(_wrapped(tags, _OTHER_TAGS), tags, strict=True)),
            "HTML against Markdown": _rows("markdown", zip(_wrapped(markdown), _in(_MARKDOWN, markdown), strict=True)),
            "HTML against JSON, LaTeX, code": _rows(
                "markup", zip(_wrapped(markup), _in(_OTHER_MARKUP, markup), strict=True)
            ),
            "HTML against the same, escaped": _rows(
                "escaped", ((wrapped, html.escape(wrapped)) for wrapped in _wrapped(tags))
            ),
        },
    )


def _in(templates: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Each text in the next template."""
    return [template.format(text) for template, text in zip(itertools.cycle(templates), texts, strict=False)]


def _wrapped(texts: Sequence[str], tags: Sequence[str] = _TAGS) -> list[str]:
    return _in(tags, [html.escape(text, quote=False) for text in texts])


def _harmful(twins: Texts, seed: int) -> tuple[Concept, Concept]:
    """Against everyday requests, as in the post, and against twins that are alike in form."""
    fit, validation, unseen, others, _ = _parts(twins, seed)
    everyday = _shuffled([asked.format(about) for asked in _ASKED for about in _ABOUT], seed)
    plain_fit, plain_validation, plain = (
        everyday[:FIT],
        everyday[FIT : FIT + VALIDATION],
        everyday[FIT + VALIDATION :][:ELSEWHERE],
    )
    capitals = _rows("capitals", ((a.upper(), b.upper()) for a, b in others))
    post = Concept(
        "harmful",
        "a harmful request / an everyday request",
        _rows("fit", ((h, e) for (h, _), e in zip(fit, plain_fit, strict=True))),
        _rows("validation", ((h, e) for (h, _), e in zip(validation, plain_validation, strict=True))),
        {"against harmless twins": _rows("twins", unseen), "twins, both in capitals": capitals},
    )
    hard = Concept(
        "harmful-twins",
        "a harmful request / its harmless twin",
        _rows("fit", fit),
        _rows("validation", validation),
        {
            "against everyday requests": _rows("everyday", ((h, e) for (h, _), e in zip(unseen, plain, strict=True))),
            "twins, both in capitals": capitals,
        },
    )
    return post, hard
