"""The recipe of a probe: which files, how they are shared out, how it is fitted and served. YAML, kept in its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from monitor.aggregate import Aggregation
from monitor.errors import ConfigInvalid
from monitor.heads import HEAD_KINDS
from monitor.types import Phase
from probes_store.card import DataFile
from training.data import (
    EVALUATE_ONLY,
    OWN,
    PAIRS,
    Part,
    Row,
    about,
    balanced,
    of_each_group,
    sample,
    split,
    text_hash,
    unique,
)
from training.forms import reformed
from training.heads import HeadRecipe
from training.load import is_hub, read_rows, stem
from training.pairs_made import Made, made


def _text(file: object) -> object:
    return str(file) if isinstance(file, Path) else file


File = Annotated[str, BeforeValidator(_text)]
"""A path, or an address on a hub, which a Path would spoil."""


ClosedForm = Literal["difference_of_means", "lda", "ridge"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Part):
    """file: as training.load reads it, or `pairs`, `lookalikes`, `twins`, `contrasts`, `answers`, which are our own
    label: only rows of that label; split: only rows of that split; each: rows of a group and label at most
    limit: rows taken; weight: of each row

    made: pairs made by rule out of each row, with the concept (label 1) and as it is (0)
    answers: the label is about each row's `response`, not about its `text`
    forms: copies of each fitted row in other forms (training.forms); form_weight: of all of them, a share of the row's
    calibrate, test: shares of the groups; the rest is fitted on. Harmful rows of the calibrate share are tested on.
    """

    file: File
    label: Literal[0, 1] | None = None
    split: str | None = None
    each: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0)
    license: str = ""
    """Of the file's rows, for the card's data sheet."""
    made: Made | None = None
    answers: bool = False
    forms: int = Field(0, ge=0, le=8)
    form_weight: float = Field(0.5, gt=0)
    by_source: bool = False
    """Balance the rows' own `source` fields against each other, instead of the file as one."""
    calibrate: float = Field(0.25, ge=0, lt=1)
    test: float = Field(0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_to_fit(self) -> Source:
        if self.calibrate + self.test > 1:
            raise ValueError(f"calibrate {self.calibrate} + test {self.test} must be at most 1")
        return self


class Recipe(_Part):
    sources: tuple[Source, ...] = Field(min_length=1)
    layers: tuple[int, ...] | None = None
    """Blocks whose activations are read side by side; None: the middle one."""
    seed: int = 0
    max_text_tokens: int = Field(512, ge=8)
    solver: Literal["best", "logistic", "adam"] | ClosedForm = "best"
    """`best`: of logistic and adam, by the rows held out."""
    c: float = Field(0.01, gt=0)
    shrinkage: float | None = Field(None, ge=0, le=1)
    """Of `lda`; None: estimated."""
    penalty: float | None = Field(None, gt=0)
    """Of `ridge`; None: the best of its path with data sets left out."""
    head: HeadRecipe | None = None
    """A probe with several projections a token, in place of `solver`; it says how it is served, too."""
    left_out: bool = False
    """Fit once more without each data set, for the card: how it holds on sources it has not seen. Not for a head."""
    epochs: int = Field(200, ge=1)
    prompt: Aggregation = Aggregation("mean")
    response: Aggregation = Aggregation("ema")
    peaks: int = Field(0, ge=0, le=10)
    """Rounds of training.peaks: answers are fitted where they look worst, as they are served."""
    answers: int = Field(0, ge=0)
    answer_tokens: int = Field(64, ge=2)
    evaluate: tuple[File, ...] = ()
    """Read after everything is fixed, never before."""
    balance: bool = False
    """Every key (a file, or a source within one) weighs the same in the fit, times `weight`."""
    drop: tuple[str, ...] = ()
    """Texts left out, by the first 16 digits of their sha256: near-duplicates of rows in an evaluation set."""
    kind: Literal["harm", "concept"] = "harm"
    starts: Literal["block", "shadow", "idle"] = "block"
    phases: tuple[Phase, ...] = tuple(Phase)
    """What it is calibrated for; elsewhere it can only be shadowed."""
    description: str = ""

    @property
    def aggregation(self) -> dict[Phase, Aggregation]:
        """What is served."""
        if self.head is not None:
            return dict.fromkeys(Phase, self.head.aggregation)
        return {Phase.PROMPT: self.prompt, Phase.RESPONSE: self.response}

    @property
    def raw_prompt(self) -> Aggregation | None:
        """What is served of prompts that are raw text, where it is not what chat is served by: their last token is not
        the template's, and its own projection would be noise."""
        return Aggregation("mean") if self.aggregation[Phase.PROMPT].kind == "mean_last" else None

    @model_validator(mode="after")
    def _sets_told_apart(self) -> Recipe:
        twice = [name for name, n in Counter(map(stem, self.evaluate)).items() if n > 1]
        if twice:
            raise ValueError(f"evaluate: two sets are called {twice[0]!r}; rename one, or leave it out")
        return self

    @model_validator(mode="after")
    def _served_by_its_head(self) -> Recipe:
        fields = type(self).model_fields
        clash = [name for name in ("solver", "prompt", "response") if getattr(self, name) != fields[name].default]
        if self.head is not None and clash:
            raise ValueError(f"a head is fitted and served in its own way; leave out {', '.join(clash)}")
        if self.left_out and (self.head is not None or self.peaks):
            raise ValueError(
                "left_out fits as often as there are data sets, too long for a head or peaks; leave it out"
            )
        return self

    @property
    def projections(self) -> int:
        """Scores a token, without a head: of `mean_last` one whose mean is taken, and one of the last position, which
        the other phase need not read."""
        return 2 if "mean_last" in (self.prompt.kind, self.response.kind) else 1

    @model_validator(mode="after")
    def _can_be_fitted(self) -> Recipe:
        for how in (self.prompt, self.response):
            if how.kind in HEAD_KINDS and how.kind != "mean_last":
                raise ValueError(f"{how.kind} is a head's way; write it under `head`, without `prompt` and `response`")
            how.check(self.projections)
        if self.peaks and (self.solver, self.projections) != ("logistic", 1):
            raise ValueError("peaks are for `solver: logistic` and one projection")
        if self.peaks and self.response.kind not in ("ema", "mean"):
            raise ValueError(f"peaks need a running mean for answers, `ema` or `mean`, not {self.response.kind}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_layer(cls, data: Any) -> Any:
        """`layer: 15` is short for `layers: [15]`."""
        if isinstance(data, dict) and "layer" in data:
            data = dict(data)
            layer = data.pop("layer")
            data.setdefault("layers", None if layer is None else [layer])
        return data


def read_recipe(path: Path) -> Recipe:
    """raises: ConfigInvalid, naming the key"""
    try:
        data = yaml.safe_load(path.read_text())
        return Recipe.model_validate(data)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"recipe {str(path)!r} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"recipe {str(path)!r} is not YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigInvalid(f"recipe {str(path)!r}: {where}: {first['msg']}") from error


def default_recipe(files: Sequence[str | Path], layer: int | None, epochs: int, answers: int) -> Recipe:
    """Every row of the given files, or of our pairs if there are none."""
    sources = tuple(Source(file=str(f)) for f in files or [PAIRS])
    return Recipe(sources=sources, layers=None if layer is None else (layer,), epochs=epochs, answers=answers)


def gather(recipe: Recipe, folder: Path) -> tuple[dict[Part, list[Row]], list[DataFile]]:
    """All rows by part, no text twice. folder: where relative files lie

    raises: ConfigInvalid if a class is missing, for a file that is there to evaluate on, or if two have one name
    """
    parts: dict[Part, list[Row]] = {"fit": [], "calibrate": [], "test": []}
    files: dict[str, DataFile] = {}
    seen: list[Row] = []
    placed: dict[str, Part] = {}
    reforms: dict[str, Source] = {}
    used: dict[str, Counter[str]] = {}
    named: dict[str, DataFile] = {}
    for source in recipe.sources:
        file = str(OWN.get(source.file, source.file))
        if stem(file) in EVALUATE_ONLY:
            raise ConfigInvalid(f"{file}: for evaluation only; take it out of the sources, or rename your own file")
        rows, described = read_rows(file, folder)
        before = files.get(described.file, described)
        # On a hub many files are called alike, and nobody can rename them: there the whole address tells them apart.
        if named.setdefault(file if is_hub(file) else stem(file), described).sha256 != described.sha256:
            raise ConfigInvalid(
                f"{file}: another source is called {stem(file)!r} too; rename one, rows go by that name"
            )
        files[described.file] = described.model_copy(update={"license": source.license or before.license})
        rows = about(rows, source.answers, described.file)
        rows = [r for r in unique(rows, seen, recipe.kind == "concept") if text_hash(r.text) not in recipe.drop]
        if source.split is not None:
            rows = [r for r in rows if r.split == source.split]
        if source.label is not None:
            rows = [r for r in rows if r.label == source.label]
        if source.each is not None:
            rows = of_each_group(rows, source.each, recipe.seed)
        rows = [
            replace(r, weight=source.weight, key=r.source if source.by_source else stem(file))
            for r in sample(rows, source.limit, recipe.seed)
        ]
        if source.made:
            rows = made(source.made, rows)
        seen += rows
        reforms |= {r.key: source for r in rows if source.forms}
        shares: dict[Part, float] = {
            "test": source.test,
            "calibrate": source.calibrate,
            "fit": 1 - source.test - source.calibrate,
        }
        for part, of_part in split(rows, shares, recipe.seed, placed).items():
            for row in of_part:
                own: Part = "test" if part == "calibrate" and row.label == 1 else part
                parts[own].append(row)
                used.setdefault(described.file, Counter())[own] += 1
    if recipe.balance:
        parts["fit"] = balanced(parts["fit"])
    for key, source in reforms.items():
        of_key = [r for r in parts["fit"] if r.key == key]
        parts["fit"] += reformed(of_key, source.forms, source.form_weight / source.forms, recipe.seed)
    for label, word in ((1, "harmful"), (0, "harmless")):
        if not any(r.label == label for r in parts["fit"]):
            raise ConfigInvalid(f"the data has no {word} rows (label {label}) to fit on; add a file that has some")
    return parts, [f.model_copy(update={"used": dict(used.get(f.file, {}))}) for f in files.values()]
