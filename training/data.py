"""Labelled texts: JSONL files in, rows out, split by group so that a pair never lies on both sides."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from monitor.errors import ConfigInvalid
from probes_store.card import DataFile

PAIRS = Path(__file__).parent / "pairs.jsonl"
"""Our own contrast pairs: harmful and harmless requests alike in form. Ships with the package."""
LOOKALIKES = Path(__file__).parent / "lookalikes.jsonl"
"""More of them, that share topic and words: figures of speech, history, fiction, the defender's side. A file of its
own, so that what was trained on the first one can still be trained again."""
TWINS = Path(__file__).parent / "twins.jsonl"
"""More again, whose halves differ in what is asked for and little else."""
CONTRASTS = Path(__file__).parent / "contrasts.jsonl"
"""More again: security work, pieces of work that are ordered, long messages; a harmful half often has the milder words.
In no shipped probe: they teach that the past tense is harmless (recipes/TRIED.md)."""
ANSWERS = Path(__file__).parent / "answers.jsonl"
"""What SmolLM2-135M-Instruct answered to harmless requests that look harmful: its own words, harmless, often wrong."""
OWN = {"pairs": PAIRS, "lookalikes": LOOKALIKES, "twins": TWINS, "contrasts": CONTRASTS, "answers": ANSWERS}
"""By the name that a recipe gives them."""

EVALUATE_ONLY = frozenset(
    ("jailbreakbench", "xstest", "strongreject", "mitre_frr", "tense_reformulations", "resp_xstest")
)
"""Public sets, by the names of their files. Never trained on, nor used to choose a layer, a threshold or a mix: only so
is a figure on them worth something."""
MAX_ROW_BYTES = 1 << 20
Part = Literal["fit", "calibrate", "test"]


@dataclass(frozen=True, slots=True)
class Row:
    """label: 1 harmful, 0 harmless; group: rows that must stay together; weight: in the fit

    answer: the label is about this answer to `text`; "": about `text` itself; split: what the file says it is for
    """

    text: str
    label: int
    source: str
    group: str
    weight: float = 1.0
    key: str = ""
    """Rows of one key and label weigh the same together as those of any other, under a recipe that balances."""
    answer: str = ""
    split: str = ""

    @property
    def identity(self) -> str:
        return identity(self.text, self.answer)


def read_jsonl(path: Path) -> tuple[list[Row], DataFile]:
    """One JSON object a line: `text` (string), `label` (0 or 1), optional `source`, `group`, `response`.

    raises: ConfigInvalid, naming file, line and what is wanted
    """
    data = read_bytes(path)
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigInvalid(f"{where}: not JSON ({error})") from error
            rows.append(row_of(item, where, path.stem, len(line)))
    if not rows:
        raise ConfigInvalid(f"data file {str(path)!r} is empty; one JSON object a line is wanted")
    return rows, describe(path.name, data, rows)


def read_bytes(path: Path) -> bytes:
    """raises: ConfigInvalid, naming the file"""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"data file {str(path)!r} can't be read: {error.strerror}") from error


def describe(file: str, data: bytes, rows: Sequence[Row]) -> DataFile:
    """What a card says of a file."""
    digest = hashlib.sha256(data).hexdigest()
    return DataFile(file=file, sha256=digest, rows=len(rows), positive=sum(r.label for r in rows))


def row_of(item: object, where: str, stem: str, size: int = 0) -> Row:
    """A decoded row, checked. where: for the message; size: bytes of the row as it was written"""
    text = item.get("text") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(text, str) or not text.strip() or size > MAX_ROW_BYTES:
        raise ConfigInvalid(f"{where}: `text` must be a non-empty string (below 1 MiB a row)")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigInvalid(f"{where}: `text` holds half a surrogate pair; write it as UTF-8")
    label = item.get("label")
    if label not in (0, 1):
        raise ConfigInvalid(f"{where}: `label` is {label!r}; write 1 for harmful, 0 for harmless")
    source = str(item.get("source") or stem)
    group = f"{stem}:{item['group']}" if item.get("group") not in (None, "") else text_hash(text)
    answer = item.get("response") or ""
    if not isinstance(answer, str):
        raise ConfigInvalid(f"{where}: `response` must be a string")
    return Row(text, int(label), source, group, answer=answer, split=str(item.get("split") or ""))


def about(rows: Iterable[Row], answers: bool, file: str) -> list[Row]:
    """Rows whose label is about the answer, if `answers` says so, or else about the text. raises: ConfigInvalid for a
    missing answer"""
    if not answers:
        return [replace(r, answer="") for r in rows]
    found = list(rows)
    for row in found:
        if not row.answer.strip():
            raise ConfigInvalid(f"{file}: no `response` beside {row.text[:40]!r}; the recipe has `answers: true`")
    return found


def unique(rows: Iterable[Row], before: Iterable[Row] = (), concept: bool = False) -> list[Row]:
    """The first row of each text, or text and answer, without those that stand in `before`.

    concept: texts that differ in case alone are two where their labels do: case may be all there is to a concept. What
    is harmful is so in capitals, too
    """
    seen = {key for row in before for key in _keys(row, concept)}
    kept = []
    for row in rows:
        keys = _keys(row, concept)
        if seen.isdisjoint(keys):
            kept.append(row)
            seen |= keys
    return kept


def _keys(row: Row, concept: bool) -> set[tuple[object, ...]]:
    if not concept:
        return {(row.identity,)}
    return {(row.identity, row.label), (" ".join(row.text.split()), " ".join(row.answer.split()))}


def identity(text: str, answer: str = "") -> str:
    """Spelling of case and space does not make another text, nor another answer to it."""
    return f"{same_text(text)}\0{same_text(answer)}" if answer else same_text(text)


def same_text(text: str) -> str:
    return " ".join(text.lower().split())


def sample(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows, whole groups, the same ones for the same seed."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    groups = _groups(rows, seed)
    taken: list[Row] = []
    for group in groups:
        if len(taken) + len(group) > limit:
            break
        taken += group
    return taken


def of_each_group(rows: Sequence[Row], most: int, seed: int) -> list[Row]:
    """At most `most` rows of each group and label, drawn by chance, in their order: many groups in place of a few."""
    cells: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault((row.group, row.label), []).append(i)
    chance = random.Random(seed)  # noqa: S311 - reproducible, not a secret
    kept = [i for cell in sorted(cells) for i in chance.sample(cells[cell], min(most, len(cells[cell])))]
    return [rows[i] for i in sorted(kept)]


def split(
    rows: Sequence[Row], shares: dict[Part, float], seed: int, placed: dict[str, Part] | None = None
) -> dict[Part, list[Row]]:
    """Rows by part, by group, stratified by source and label.

    shares: summing to 1; placed: groups that have their part already, and in the end all of these
    """
    placed = {} if placed is None else placed
    parts: dict[Part, list[Row]] = {part: [] for part in shares}
    strata: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        strata.setdefault((row.source, row.label), []).append(row)
    for key in sorted(strata):
        groups = _groups(strata[key], seed)
        total, done = sum(map(len, groups)), 0
        for group in groups:
            part = placed.get(group[0].group) or _part_at((done + 0.5 * len(group)) / total, shares)
            placed[group[0].group] = part
            parts[part] += group
            done += len(group)
    return parts


def _part_at(position: float, shares: dict[Part, float]) -> Part:
    edge = 0.0
    for part, share in shares.items():
        edge += share
        if position < edge:
            return part
    return part


def _groups(rows: Sequence[Row], seed: int) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)  # noqa: S311 - a reproducible split, not a secret
    return [groups[key] for key in keys]


def balanced(rows: Sequence[Row]) -> list[Row]:
    """Weights divided by the number of rows with the same key and label: a long file does not drown a short one."""
    counts = Counter((r.key, r.label) for r in rows)
    return [replace(r, weight=r.weight / counts[r.key, r.label]) for r in rows]


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
