"""What a report reads. Sets marked `evaluate only` are opened here, for a report, and nowhere else (a test looks).

A set that the probe was trained on is left out, and so is every row whose text it was fitted or calibrated on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from monitor.errors import ConfigInvalid
from training.data import OWN, Row, identity, read_bytes, row_of, same_text, unique
from training.load import read_prompts, stem
from training.trained import Trained

_T = TypeVar("_T")
Kind = Literal["held-out", "look-alikes", "traffic", "attack", "everyday", "unseen"]
PROMPT_SETS: dict[str, Kind] = {
    "jailbreakbench": "held-out",
    "xstest": "held-out",
    "strongreject": "held-out",
    "malicious_instruct": "held-out",
    "llm_safeguard_pairs": "held-out",
    "mitre_frr": "look-alikes",
    "toxicchat_train": "traffic",
    "tense_reformulations": "attack",
}
ANSWER_SETS = ("resp_xstest", "resp_gptfuzz")
HELD_BACK = {"resp_gptfuzz": "evaluate"}
"""The split that is read of a set whose other half may be trained on."""
LOOK_ALIKES = frozenset(("coconot_safety", "benign_roleplay", *OWN))
"""Training files whose harmless rows are made to look harmful: no everyday traffic, though they are held back too."""
HELD_BACK_NAMES = ("everyday", "unseen look-alikes", "unseen harmful")
ALL = "all of them"
"""The name of the last row of a report's table."""
MOST_ROWS = 750
"""Of a set; more of them, drawn by chance, narrow no interval that matters and take minutes."""
MOST_ANSWERS = 320


@dataclass(frozen=True, slots=True)
class PromptSet:
    """kind: held-out: requests; look-alikes: harmless and hard; unseen, everyday: rows of the training files that
    nothing was fitted or calibrated on; seen: rows left out because the probe has seen their text"""

    name: str
    kind: Kind
    rows: Sequence[Row]
    seen: int = 0

    def of(self, label: int) -> list[int]:
        return [i for i, r in enumerate(self.rows) if r.label == label]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and an answer to it; label: of the answer, 1 harmful"""

    text: str
    response: str
    label: int
    group: str


def read_set(file: str | Path, folder: Path = Path(), concept: bool = False) -> tuple[list[Row], int]:
    """The rows of one set that are about a prompt, no text twice, and how many are not. raises: ConfigInvalid"""
    rows, left, _ = read_prompts(file, folder)
    return unique(rows, concept=concept), left


def prompt_sets(
    folder: Path | None, others: Sequence[str], trained: Collection[str], seen: Collection[str], most: int = MOST_ROWS
) -> tuple[list[PromptSet], list[str]]:
    """The known sets that lie in `folder` and `others`, which are files, and what there is to say of them.

    folder: None for a concept, which the known sets are not about; trained: stems of the files that the probe was
    trained on; seen: texts, as `same_text` writes them
    raises: ConfigInvalid if a file can't be read, or two have one name
    """
    found, notes = [], []
    known = [] if folder is None else [folder / f"{name}.jsonl" for name in PROMPT_SETS]
    files: list[str | Path] = [*(f for f in known if f.is_file()), *others]
    taken = {*HELD_BACK_NAMES, ALL}
    for file in files:
        name = stem(file)
        if name in trained:
            notes.append(f"{name} is left out: the probe was trained on it")
            continue
        if name in taken:
            raise ConfigInvalid(
                f"{file}: a report has a set {name!r} already, and figures go by that name; leave it out, or rename it"
            )
        taken.add(name)
        rows, left = read_set(file, concept=folder is None)
        if left:
            notes.append(f"{name}: {left} rows that label a `response` are left out, for prompts are judged")
        new = [r for r in rows if same_text(r.text) not in seen]
        if not new:
            raise ConfigInvalid(f"the probe was fitted or calibrated on every row of {name}; leave it out")
        chosen = drawn(new, most)
        found.append(PromptSet(name, PROMPT_SETS.get(name, "held-out"), chosen, len(rows) - len(new)))
        if len(chosen) < len(new):
            notes.append(f"{name}: {len(chosen)} of {len(new)} rows, drawn by chance")
    return found, notes


def answer_sets(
    folder: Path, trained: Trained, most: int = MOST_ANSWERS
) -> tuple[dict[str, list[Exchange]], list[str]]:
    """The known sets of answers that lie in `folder`, without what the probe has seen, and what there is to say of
    them. raises: ConfigInvalid if one can't be read"""
    found, notes, seen = {}, [], trained.answers
    for file in (folder / f"{name}.jsonl" for name in ANSWER_SETS):
        if not file.is_file():
            continue
        if trained.missing and file.stem in trained.files:
            notes.append(f"{file.stem} is left out: the probe was trained on it, and on which of its rows is not known")
            continue
        exchanges = read_exchanges(file, HELD_BACK.get(file.stem))
        new = [e for e in exchanges if identity(e.text, e.response) not in seen]
        if len(new) < len(exchanges):
            known = len(exchanges) - len(new)
            notes.append(f"{file.stem}: {known} of {len(exchanges)} answers left out, the probe was trained on them")
        if new:
            found[file.stem] = drawn(new, most)
    return found, notes


def read_exchanges(path: Path, split: str | None = None) -> list[Exchange]:
    """One JSON object a line: `text`, `response` and the `label` of the response; of one split, or all.

    raises: ConfigInvalid, naming file and line
    """
    found = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigInvalid(f"{where}: not JSON ({error})") from error
        row = row_of(item, where, path.stem, len(line))
        response = item.get("response")
        if not isinstance(response, str) or not response.strip():
            raise ConfigInvalid(f"{where}: `response` must be a text; a set of answers labels one a row")
        if split is None or item.get("split") == split:
            found.append(Exchange(row.text, response, row.label, row.group))
    if not found:
        raise ConfigInvalid(f"{path} has no answers" + (f" of the split {split!r}" if split else ""))
    return found


def held_back(rows: Sequence[Row], most: int = MOST_ROWS) -> list[PromptSet]:
    """The rows of the training files that nothing was fitted or calibrated on, by what they are; without those whose
    label is about an answer.

    most: of a set; of the everyday ones, whose rate is the smallest, twice as many
    """
    rows = [r for r in rows if not r.answer]
    alike = [r for r in rows if r.label == 0 and (r.key in LOOK_ALIKES or stem(r.source) in LOOK_ALIKES)]
    everyday = [r for r in rows if r.label == 0 and r not in alike]
    day, hard, harmful = HELD_BACK_NAMES
    sets = (
        PromptSet(day, "everyday", drawn(everyday, 2 * most)),
        PromptSet(hard, "look-alikes", drawn(alike, most)),
        PromptSet(harmful, "unseen", drawn([r for r in rows if r.label == 1], most)),
    )
    return [s for s in sets if s.rows]


def drawn(rows: Sequence[_T], most: int) -> list[_T]:
    """At most so many, in their order, the same ones each time."""
    if len(rows) <= most:
        return list(rows)
    chosen = random.Random(0).sample(range(len(rows)), most)  # noqa: S311 - a reproducible choice, not a secret
    return [rows[i] for i in sorted(chosen)]
