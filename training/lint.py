"""The data set linter: what is wrong with labelled texts before a probe is trained on them, and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from probes_store.card import DataFile
from training import shortcuts
from training.data import Row, same_text, text_hash
from training.load import read_rows
from training.similar import near_others, near_pairs

Level = Literal["error", "warning"]
# (error from, warning from). An error makes a figure on this data meaningless; a warning makes it flattering.
LENGTH = (0.9, 0.75)
TOKEN = (0.9, 0.75)
WORDS = (0.99, 0.95)
ENDS = (0.5, 0.2)
SMALL_CLASS = 0.05
ONE_LABEL_SOURCES = 0.9
_FEWER = "drop them, or give their rows a smaller `weight`"


@dataclass(frozen=True, slots=True)
class Finding:
    """rows: numbers in `file`, from 1, blank lines not counted; empty where it is about all of them

    file: its name as given, or several; hashes: of the rows' texts, as a recipe's `drop` takes them
    """

    level: Level
    rule: str
    file: str
    rows: tuple[int, ...]
    message: str
    remedy: str
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    files: tuple[DataFile, ...]
    figures: dict[str, float | int | None]
    """What the limits above were held against; None: not measured, for want of rows."""
    findings: tuple[Finding, ...]
    """Errors first."""

    @property
    def failed(self) -> bool:
        return any(f.level == "error" for f in self.findings)

    def as_dict(self) -> dict[str, object]:
        return {
            "failed": self.failed,
            "files": [file.model_dump() for file in self.files],
            "figures": self.figures,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class _Placed:
    row: Row
    file: str
    number: int

    @property
    def where(self) -> str:
        return f"{Path(self.file).name} row {self.number}"


def lint(files: Sequence[str | Path], against: Sequence[str | Path] = ()) -> Report:
    """Look for repeats, contradictions, overlap with evaluation files, and shortcuts that give the label away.

    against: files that nothing may be trained on; read for the overlap alone. Labels are taken to be about `text`:
    files that label a `response` have the same prompt under both labels, rightly.
    raises: ConfigInvalid if a file can't be read
    """
    placed, described = _read(files)
    evaluation, _ = _read(against)
    findings = [*_contradictions(placed), *_overlaps(placed, evaluation), *_repeats(placed)]
    rows = [p.row for p in placed]
    figures: dict[str, float | int | None] = {"rows": len(rows), "positive": sum(r.label for r in rows)}
    names = ", ".join(map(str, files))
    findings += _balance(rows, names)
    if shortcuts.enough(rows):
        findings += _shortcuts(rows, names, figures)
    return Report(tuple(described), figures, tuple(sorted(findings, key=lambda f: f.level)))


def _read(files: Sequence[str | Path]) -> tuple[list[_Placed], list[DataFile]]:
    placed, described = [], []
    for file in files:
        rows, card = read_rows(file)
        placed += [_Placed(row, str(file), number) for number, row in enumerate(rows, 1)]
        described.append(card)
    return placed, described


# --- repeats --------------------------------------------------------------------------------------------------------


def _by_text(placed: Sequence[_Placed]) -> dict[str, list[_Placed]]:
    texts: dict[str, list[_Placed]] = defaultdict(list)
    for p in placed:
        texts[same_text(p.row.text)].append(p)
    return texts


def _each(level: Level, rule: str, found: Sequence[tuple[_Placed, str]], message: str, remedy: str) -> list[Finding]:
    """One finding a file; found: rows, and what each is found to be like."""
    files: dict[str, list[tuple[_Placed, str]]] = defaultdict(list)
    for p, like in found:
        files[p.file].append((p, like))
    findings = []
    for file, of in files.items():
        of.sort(key=lambda item: item[0].number)
        numbers, hashes = tuple(p.number for p, _ in of), tuple(text_hash(p.row.text) for p, _ in of)
        said = f"{message}: row {of[0][0].number} and {of[0][1]}"
        findings.append(Finding(level, rule, file, numbers, said, remedy, hashes))
    return findings


def _contradictions(placed: Sequence[_Placed]) -> list[Finding]:
    found = []
    for same in _by_text(placed).values():
        for p in same:
            other = next((o for o in same if o.row.label != p.row.label), None)
            if other is not None:
                found.append((p, other.where))
    remedy = "decide which label is right and remove the other row"
    return _each("error", "label-noise", found, "the same text has both labels", remedy)


def _overlaps(placed: Sequence[_Placed], evaluation: Sequence[_Placed]) -> list[Finding]:
    """Rows that stand in an evaluation file, word for word or nearly."""
    known = _by_text(evaluation)
    texts = [same_text(p.row.text) for p in placed]
    exact = [(p, known[t][0].where) for p, t in zip(placed, texts, strict=True) if t in known]
    others = [p for p, t in zip(placed, texts, strict=True) if t not in known]
    near = near_others([p.row.text for p in others], [e.row.text for e in evaluation])
    alike = [(others[i], f"{evaluation[j].where} ({s:.2f})") for i, j, s in near]
    remedy = "leave them out; a recipe does with their hashes (--json) under `drop`"
    return [
        *_each("error", "overlap", exact, "rows that stand in an evaluation file", remedy),
        *_each("error", "near-overlap", alike, "rows nearly the same as one in an evaluation file", remedy),
    ]


def _repeats(placed: Sequence[_Placed]) -> list[Finding]:
    """Repeats of one label. Near ones matter where they may fall on both sides of a split, not within a group."""
    found, near = [], []
    for label in (0, 1):
        same = _by_text([p for p in placed if p.row.label == label]).values()
        found += [(p, first.where) for first, *others in same for p in others]
        kept = [first for first, *_ in same]
        near += [
            (kept[j], f"{kept[i].where} ({s:.2f})")
            for i, j, s in near_pairs([p.row.text for p in kept], groups=[p.row.group for p in kept])
        ]
    return [
        *_each(
            "warning",
            "duplicate",
            found,
            "repeats of an earlier text",
            "nothing need be done: training keeps the first",
        ),
        *_each("warning", "near-duplicate", near, "nearly the same text again", "give them one `group`, or drop them"),
    ]


# --- shortcuts ------------------------------------------------------------------------------------------------------


def _balance(rows: Sequence[Row], names: str) -> list[Finding]:
    positive = sum(r.label for r in rows)
    share = min(positive, len(rows) - positive) / len(rows)
    if share == 0:
        word = "harmful" if positive else "harmless"
        message, remedy = f"only {word} rows", "lint it together with the files of the other label"
    elif share < SMALL_CLASS:
        message = f"{positive} harmful of {len(rows)} rows"
        remedy = "add rows of the smaller class; `balance: true` in the recipe evens out the files"
    else:
        return []
    return [Finding("warning", "class-balance", names, (), message, remedy)]


def _level(value: float, limits: tuple[float, float]) -> Level | None:
    return "error" if value >= limits[0] else "warning" if value >= limits[1] else None


def _shortcuts(rows: Sequence[Row], names: str, figures: dict[str, float | int | None]) -> list[Finding]:
    tokens, ends = shortcuts.token_shares(rows), shortcuts.ends(rows)
    token = 0.5 + abs(tokens[0][1] - tokens[0][2]) / 2
    end = abs(ends[0][1] - ends[0][2]) if ends else 0.0
    length, words, source = shortcuts.length_auroc(rows), shortcuts.words_auroc(rows), shortcuts.known_by_source(rows)
    figures |= {
        "length_auroc": length,
        "token_auroc": token,
        "end_share": end,
        "tfidf_auroc": words,
        "one_label_sources": source,
    }
    checks: tuple[tuple[str, Level | None, str, str], ...] = (
        ("length", _level(length, LENGTH), f"length alone tells the classes apart, AUROC {length:.3f}",
         "add short and long texts to both classes"),
        ("token", _level(token, TOKEN), f"one token tells the classes apart, AUROC {token:.3f}: {_said(tokens)}",
         "add rows of the other class with it"),
        ("shared-ends", _level(end, ENDS), f"texts of one class open or end alike: {_said(ends)}", _FEWER),
        ("bag-of-words", None if words is None else _level(words, WORDS),
         f"a bag of words tells the classes apart, AUROC {words or 0:.3f} on rows held back",
         "add contrast rows: harmless texts in the words of harmful ones, and a figure to beat: this AUROC"),
        ("source", "warning" if source >= ONE_LABEL_SOURCES else None,
         f"the source tells the label of {source:.0%} of the rows",
         "add rows of both labels to a source, and judge by sets that were never trained on"),
    )  # fmt: skip
    return [
        Finding(level, rule, names, (), message, remedy) for rule, level, message, remedy in checks if level is not None
    ]


def _said(shares: Sequence[tuple[str, float, float]]) -> str:
    return ", ".join(f"{item!r} in {one:.0%} of harmful, {none:.0%} of harmless texts" for item, one, none in shares)
