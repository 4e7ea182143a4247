"""The card: JSON beside a probe's weights that binds them to a model, a template and a calibration."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from monitor.aggregate import PLAIN_KINDS, Aggregation
from probes_store.calibration import Calibration

SCHEMA_VERSION = 1


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, z))))


Phase = Literal["prompt", "response"]
Format = Literal["chat", "raw"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelId(_Part):
    """fingerprint: hub commit, hash of the source file, or hash of the local files, as its prefix says"""

    name: str = Field(min_length=1)
    fingerprint: str = Field(min_length=8)
    dtype: str
    quantization: str
    n_layers: int = Field(ge=1)


class DataFile(_Part):
    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    positive: int = Field(ge=0)
    license: str = ""
    """Of its rows, as the recipe says; empty: it does not say."""
    used: dict[str, int] = Field(default_factory=dict)
    """How many of them were fitted on (`fit`), calibrated on and held out (`test`); the others were repeats, or left
    out. Older cards don't say."""


class Canary(_Part):
    """A conversation of one user turn, and the logits this probe must give at its counted positions: of several
    projections all those of a token, then the next token's."""

    text: str
    scores: tuple[float, ...] = Field(min_length=1)


class Platt(_Part):
    """A prompt's value in chat -> the probability that it is harmful, on rows that nothing was fitted to (Platt 1999).

    n, positive: those rows; their share of harmful ones is the prior that the probability holds for
    """

    slope: float = Field(gt=0, allow_inf_nan=False)
    intercept: float = Field(allow_inf_nan=False)
    n: int = Field(ge=2)
    positive: int = Field(ge=1)

    def probability(self, value: float) -> float:
        return sigmoid(self.slope * value + self.intercept)


class Threshold(_Part):
    """For reading: what a threshold did on benign rows that neither fitted nor calibrated it."""

    format: Format
    phase: Phase
    target_fpr: float
    threshold: float
    observed_fpr: float | None = None
    fpr_low: float | None = None
    fpr_high: float | None = None
    test_rows: int = 0


class Card(_Part):
    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = Field(pattern=r"^v[0-9]{1,6}$")
    kind: Literal["harm", "concept"] = "harm"
    """A concept (capital letters, HTML) is watched, and is never a category of harm."""
    starts: Literal["block", "shadow", "idle"] = "block"
    """What a shipped probe of harm does where no policy says; shadow: it is there to be compared first; idle: it is not
    served at all until somebody promotes it, and then it shadows."""
    description: str = ""
    created: str
    code_version: str
    license: str = "Apache-2.0"
    model: ModelId
    layers: tuple[int, ...] = Field(min_length=1)
    d_model: int = Field(ge=1)
    projections: int = Field(default=1, ge=1)
    """Scores a token: rows of a layer's weight. Cards from before there could be several don't say."""
    template_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    position_rule: str
    aggregation: dict[Phase, Aggregation]
    raw_prompt: Aggregation | None = None
    """Of prompts that are raw text, where it is another one: a projection for the template's last token says nothing of
    a text that has no template. Cards from before it could be another one don't say."""
    calibration: dict[Format, dict[Phase, Calibration]] = Field(default_factory=dict)
    platt: Platt | None = None
    thresholds: tuple[Threshold, ...] = ()
    data: tuple[DataFile, ...] = ()
    fit: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    canaries: tuple[Canary, ...] = Field(min_length=1)
    canary_tolerance: float = Field(default=0.02, gt=0, le=10, allow_inf_nan=False)
    """Largest difference of a canary's logit; wide enough for another CPU's float32, not for another model."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of probe.safetensors."""
    base_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Of base.safetensors, the moments of its training rows. Older probes have none."""

    def how(self, form: Format, phase: Phase) -> Aggregation:
        """What makes one value of the scores of a turn, or of an answer."""
        return (
            self.raw_prompt
            if self.raw_prompt is not None and (form, phase) == ("raw", "prompt")
            else self.aggregation[phase]
        )

    @property
    def blocks(self) -> str:
        """Its layers as a table shows them: `15`, `13,17`, and in a row `11-13`, or `11-19/2` for every
        second one."""
        first, last, n = self.layers[0], self.layers[-1], len(self.layers)
        step = (last - first) // (n - 1) if n > 2 else 0
        if step > 0 and self.layers == tuple(range(first, last + 1, step)):
            return f"{first}-{last}" + (f"/{step}" if step > 1 else "")
        return ",".join(map(str, self.layers))

    @property
    def retrained(self) -> dict[str, Any]:
        """What it was made of, if it went on from another version with labels of traffic; else empty."""
        found = self.fit.get("retrained")
        return found if isinstance(found, dict) else {}

    @property
    def seen_until(self) -> float:
        """Labels up to then are in it, in seconds since the epoch; 0 for one that was not made of traffic, or pulled:
        made of another deployment's."""
        return 0.0 if "pulled" in self.fit else float(self.retrained.get("until", 0.0))

    @property
    def of_answers(self) -> bool:
        """Whether it judges answers alone: nothing else is calibrated."""
        return self.calibration.get("chat", {}).keys() == {"response"}

    def probability(self, value: float) -> float:
        """Of a prompt's value, in chat: calibrated where the card can, else the logistic function of the logit."""
        return sigmoid(value) if self.platt is None else self.platt.probability(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Card:
        if set(self.aggregation) != {"prompt", "response"}:
            raise ValueError("aggregation must say how `prompt` and `response` are aggregated")
        hows = [*self.aggregation.values(), *([self.raw_prompt] if self.raw_prompt else [])]
        for how in hows:
            how.check(self.projections)
        kinds = {how.kind for how in hows}
        if self.projections > 1 and kinds & set(PLAIN_KINDS) and "mean_last" not in kinds:
            raise ValueError(f"{self.projections} projections need an aggregation that reads them, not {sorted(kinds)}")
        if len({how.first_value(self.projections) for how in hows}) > 1:
            raise ValueError("the aggregations take different projections for values")
        if any(len(canary.scores) % self.projections for canary in self.canaries):
            raise ValueError(f"a canary must have {self.projections} scores for each token")
        return self
