"""The recipe of a probe: which files, how they are shared out, how it is fitted and served. YAML, kept in its card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from monitor.aggregate import Aggregation
from monitor.errors import ConfigInvalid
from probes_store.card import DataFile
from training.data import PAIRS, Part, Row, balanced, read_jsonl, same_text, sample, split, text_hash, unique


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Part):
    """file: JSONL, or `pairs` for our own; label: only rows of that label; limit: rows taken; weight: of each row

    calibrate, test: shares of the groups; the rest is fitted on. Harmful rows of the calibrate share are tested on.
    """

    file: Path
    label: Literal[0, 1] | None = None
    limit: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0)
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
    layer: int | None = None
    seed: int = 0
    max_text_tokens: int = Field(512, ge=8)
    solver: Literal["best", "logistic", "adam"] = "best"
    c: float = Field(0.01, gt=0)
    epochs: int = Field(200, ge=1)
    prompt: Aggregation = Aggregation("mean")
    response: Aggregation = Aggregation("ema")
    answers: int = Field(0, ge=0)
    answer_tokens: int = Field(64, ge=2)
    evaluate: tuple[Path, ...] = ()
    """Read after everything is fixed, never before."""
    balance: bool = False
    """Every key (a file, or a source within one) weighs the same in the fit, times `weight`."""
    drop: tuple[str, ...] = ()
    """Texts left out, by the first 16 digits of their sha256: near-duplicates of rows in an evaluation set."""
    description: str = ""


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


def default_recipe(files: list[Path], layer: int | None, epochs: int, answers: int) -> Recipe:
    """Every row of the given files, or of our pairs if there are none."""
    sources = tuple(Source(file=f) for f in files or [PAIRS])
    return Recipe(sources=sources, layer=layer, epochs=epochs, answers=answers)


def gather(recipe: Recipe, folder: Path) -> tuple[dict[Part, list[Row]], list[DataFile]]:
    """All rows by part, no text twice. folder: where relative files lie

    raises: ConfigInvalid if a class is missing
    """
    parts: dict[Part, list[Row]] = {"fit": [], "calibrate": [], "test": []}
    files: dict[str, DataFile] = {}
    seen: list[Row] = []
    placed: dict[str, Part] = {}
    for source in recipe.sources:
        path = PAIRS if str(source.file) == "pairs" else folder / source.file
        rows, described = read_jsonl(path)
        files[described.file] = described
        known = {same_text(r.text) for r in seen}
        rows = [r for r in unique(rows) if same_text(r.text) not in known and source.label in (None, r.label)]
        rows = [r for r in rows if text_hash(r.text) not in recipe.drop]
        rows = [
            replace(r, weight=source.weight, key=r.source if source.by_source else path.stem)
            for r in sample(rows, source.limit, recipe.seed)
        ]
        seen += rows
        shares: dict[Part, float] = {
            "test": source.test,
            "calibrate": source.calibrate,
            "fit": 1 - source.test - source.calibrate,
        }
        for part, of_part in split(rows, shares, recipe.seed, placed).items():
            for row in of_part:
                parts["test" if part == "calibrate" and row.label == 1 else part].append(row)
    if recipe.balance:
        parts["fit"] = balanced(parts["fit"])
    for label, word in ((1, "harmful"), (0, "harmless")):
        if not any(r.label == label for r in parts["fit"]):
            raise ConfigInvalid(f"the data has no {word} rows (label {label}) to fit on; add a file that has some")
    return parts, list(files.values())
