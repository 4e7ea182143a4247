"""The part of a report that is about requests: every set, look-alikes beside everyday traffic, curves and floors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from training.page import Html, element, join, table
from training.report import charts as charts
from training.report.charts import number, percent, section, soft
from training.report.sets import ALL

_KINDS = {"held-out": "held out", "look-alikes": "look-alikes", "unseen": "held back", "everyday": "everyday"}


def requests(report: Mapping[str, Any]) -> Html:
    sets: dict[str, Any] = report["sets"]
    ordered = {name: e for name, e in sets.items() if "auroc" in e}
    pooled = {ALL: report["pooled"] | {"kind": "but attacks", "against": "own"}} if report.get("pooled") else {}
    return join(
        [
            section(
                "Requests",
                element("div", _order(ordered), _recall(sets), class_="row"),
                _sets(sets | pooled),
                soft(_AGAINST),
            ),
            section(
                "Everyday requests, and those that only look harmful",
                soft(_LOOK_ALIKES),
                element("div", _false_positives(sets), charts.by_length(report.get("by_length", {})), class_="row"),
            ),
            section("Curves", element("div", *charts.curves(report), class_="row"), _probabilities(report)),
            section("What a probe must beat", soft(_FLOORS), _floors(ordered)),
        ]
    )


_AGAINST = (
    "A set of harmful requests alone is ordered against the everyday ones (*). Held back: rows of the training files "
    "that nothing was fitted or calibrated on, so easier than a set that was held out whole. A dash: the rows can't "
    "support it."
)
_LOOK_ALIKES = (
    "The threshold is certified on everyday requests, and says nothing about harmless ones on the same topics as "
    "harmful ones: both rates belong together."
)
_FLOORS = (
    "AUROC on the same rows. Words: TF-IDF and logistic regression on the probe's own training rows. The others are "
    "one ridge regression on a sample of those rows: at the probe's blocks, at block 0, with shuffled labels (mean and "
    "95 % range of 100), along 1,000 random directions (their mean, and the one that is best on the training rows)."
)


def _order(sets: Mapping[str, Any]) -> Html:
    lines = [
        charts.Line(_starred(name, e), e["auroc"], {"words": e["floors"]["words"]["value"]} if _words(e) else {})
        for name, e in sets.items()
    ]
    return charts.forest("AUROC; ○ words alone", lines, 0.4, 1.0)


def _words(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = entry.get("floors", {}).get("words")
    return found


def _starred(name: str, entry: Mapping[str, Any]) -> str:
    return name + (" *" if entry["against"] == "everyday" else "")


def _recall(sets: Mapping[str, Any]) -> Html:
    lines = [
        charts.Line(name, e["recall"], {"words": w["value"]} if (w := e.get("words", {}).get("recall")) else {})
        for name, e in sets.items()
        if "recall" in e
    ]
    return charts.forest("Recall at the threshold; ○ words alone, at theirs", lines, 0.0, 1.0, percent=True)


def _false_positives(sets: Mapping[str, Any]) -> Html:
    lines = [
        charts.Line(name, e["fpr"], {"words": w["value"]} if (w := e.get("words", {}).get("fpr")) else {})
        for name, e in sorted(sets.items(), key=lambda item: item[1]["kind"] != "everyday")
        if "fpr" in e
    ]
    return charts.forest("Harmless requests flagged; ○ words alone", lines, 0.0, 0.6, percent=True)


def _sets(sets: Mapping[str, Any]) -> Html:
    rows = [
        (
            _starred(name, e),
            _KINDS.get(e["kind"], e["kind"]),
            f"{e['harmful']:,} / {e['harmless']:,}",
            number(e.get("auroc")),
            None if "auprc" not in e else e["auprc"]["value"],
            None if "log_auroc" not in e else e["log_auroc"]["value"],
            percent(e.get("recall")),
            percent(e.get("fpr"), 1),
            number(e.get("beats", {}).get("words"), "+"),
        )
        for name, e in sets.items()
    ]
    head = ("set", "kind", "harmful / harmless", "AUROC", "AUPRC", "log-AUROC", "recall", "flagged", "AUROC over words")
    return table(head, rows)


def _probabilities(report: Mapping[str, Any]) -> Html | str:
    """Three ways to make probabilities of the values, and what the card's own are worth, all on the same rows."""
    own = report.get("calibration", {})
    ways = {name: tuple(w[k] for k in ("brier", "ece")) for name, w in own.get("ways", {}).items()}
    rows = [(_WAYS[name], *figures) for name, figures in ways.items()]
    if own.get("platt") and own["brier"] is not None:
        rows.append((_WAYS["card"], own["brier"], own["ece"]))
    head = ("probabilities, rows of sets that are new to it", "Brier score", "calibration error, 15 bins of equal mass")
    return table(head, rows) if rows else ""


_WAYS = {
    "logit": "the logit as it is",
    "platt": "Platt's line, fitted on other fifths of these rows",
    "isotonic": "isotonic, fitted on other fifths of these rows",
    "card": "Platt's line of the card, as served",
}


def _floors(sets: Mapping[str, Any]) -> Html:
    def row(name: str, e: Mapping[str, Any]) -> Iterable[object]:
        floors, c = e.get("floors", {}), e.get("controls", {})
        yield name
        yield e["auroc"]["value"]
        yield from (floors[k]["value"] if k in floors else None for k in ("words", "length"))
        yield from (c.get(k) for k in ("same_blocks", "block_0"))
        yield (
            None
            if not c
            else f"{c['shuffled']['value']:.3f} ({c['shuffled']['low']:.2f} to {c['shuffled']['high']:.2f})"
        )
        yield from (c.get(k) for k in ("random", "best_random"))

    head = ("set", "probe", "words", "length", "ridge", "block 0", "shuffled labels", "random", "best random")
    return table(head, [tuple(row(name, e)) for name, e in sets.items()])
