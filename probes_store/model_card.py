"""The model card: a probe's card as Markdown with the YAML header that model hubs read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from probes_store.card import Card, DataFile
from probes_store.describe import certified, figures
from probes_store.store import StoredProbe

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(r"hf://(?:datasets/)?([^/@]+/[^/@]+)@")
_TYPES = {"auroc": "roc_auc", "recall": "recall", "fpr": "false_positive_rate"}
"""Our metrics' names -> the hub's."""
_SETS = "evaluation.sets."


def model_card(probe: StoredProbe) -> str:
    """YAML header and Markdown body. Data files are listed with their hashes; no text of theirs is quoted."""
    card = probe.card
    header = yaml.safe_dump(_header(card), sort_keys=False, allow_unicode=True, width=10_000)
    parts = [
        f"---\n{header}---",
        f"# {card.name} {card.version}",
        _plain(card.description) or "A linear probe on the residual stream of a language model.",
        "A token's score is `sum over layers of (weight . stream) + bias`, computed in float32 by "
        "`midstream` in the forward pass that runs anyway; above 0 leans harmful.",
        "## What it belongs to",
        _table(("what", "value"), identity(card)),
        "## Thresholds",
        _thresholds(card),
        "## Measured",
        _metrics(card),
        "## Data",
        _table(
            ("file", "licence", "rows", "positive", "fitted / calibrated / held out", "sha256"), map(_file, card.data)
        )
        if card.data
        else "The card names no data.",
        "## Use",
        f"```\nmidstream probe pull OWNER/NAME@COMMIT\nmidstream probe promote {card.name} VERSION\n```",
        "## Limits",
        "Defensive use: it flags text for a policy or a person to act on. Whoever optimises a text against a probe "
        "gets past it. Its thresholds hold for traffic like the rows it was calibrated on; look-alikes of harmful "
        "requests are flagged more often. It fits this model, chat template and position rule only.",
    ]
    return "\n\n".join(parts) + "\n"


def _file(data: DataFile) -> tuple[object, ...]:
    used = " / ".join(str(data.used.get(part, 0)) for part in ("fit", "calibrate", "test")) if data.used else "-"
    return data.file, data.license or "-", data.rows, data.positive, used, data.sha256


def _header(card: Card) -> dict[str, Any]:
    header: dict[str, Any] = {"license": card.license.lower(), "library_name": "midstream"}
    # A folder's name is no hub id, and a path of this machine is nobody's business.
    if _HUB_ID.fullmatch(card.model.name):
        header["base_model"] = card.model.name
    header["tags"] = ["midstream", "linear-probe", "residual-stream", "safety-monitoring", card.kind]
    datasets = sorted({m[1] for d in card.data if (m := _HUB_FILE.match(d.file))})
    if datasets:
        header["datasets"] = datasets
    results = list(_results(card))
    if results:
        header["model-index"] = [{"name": f"{card.name}-{card.version}", "results": results}]
    return header


def _results(card: Card) -> Iterable[dict[str, Any]]:
    """One entry a set that was evaluated, with those of its figures that the hub has a name for."""
    evaluation = card.metrics.get("evaluation")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    for name, entry in sets.items() if isinstance(sets, dict) else ():
        metrics = [
            {"type": kind, "name": metric, "value": figure.get("rate", figure.get("auroc"))}
            for metric, kind in _TYPES.items()
            if isinstance(figure := entry.get(metric), dict)
        ]
        if metrics:
            task = {"type": "text-classification", "name": "harm detection" if card.kind == "harm" else "concept"}
            yield {"task": task, "dataset": {"name": name, "type": name}, "metrics": metrics}


def identity(card: Card) -> list[tuple[str, object]]:
    """What a probe belongs to and came from: (what, value)."""
    how = {phase: a["kind"] for phase, a in card.model_dump(mode="json")["aggregation"].items()}
    raw = "" if card.raw_prompt is None else f", {card.raw_prompt.kind} (prompt that is raw text)"
    return [
        ("model", card.model.name if _HUB_ID.fullmatch(card.model.name) else card.model.name.rsplit("/", 1)[-1]),
        ("fingerprint", card.model.fingerprint),
        ("dtype, quantisation", f"{card.model.dtype}, {card.model.quantization}"),
        ("layers (output of the block, from 0)", f"{', '.join(map(str, card.layers))} of {card.model.n_layers}"),
        ("width", card.d_model),
        ("chat template, sha256", card.template_hash),
        ("position rule", card.position_rule),
        ("token scores become a value by", f"{how['prompt']} (prompt), {how['response']} (response){raw}"),
        ("fitted by", card.fit.get("method", "not stated")),
        ("created", f"{card.created}, midstream {card.code_version}"),
        ("probe.safetensors, sha256", card.sha256),
    ]


def _thresholds(card: Card) -> str:
    rows = [
        (
            r.format,
            r.phase,
            f"{r.rate:.2%}",
            f"{r.threshold:.4f}",
            r.n,
            "-" if r.observed is None else f"{r.observed:.2%} [{r.low:.2%}, {r.high:.2%}] of {r.test_rows}",
        )
        for r in certified(card)
    ]
    if not rows:
        return "Not calibrated: it can shadow, and never block."
    intro = "Flagged strictly above; with 95 % confidence at most the stated share of benign requests is."
    columns = ("format", "phase", "certified rate", "threshold", "benign requests", "observed on others")
    return intro + "\n\n" + _table(columns, rows)


def _metrics(card: Card) -> str:
    rows = [(name.removeprefix(_SETS), figure) for name, figure in figures(card.metrics)]
    return _table(("figure", "value"), rows) if rows else "The card has no figures."


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_plain(str(cell)) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text of a card cannot make cells, lines or HTML of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
