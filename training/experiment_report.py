"""The residual-stream experiment as a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.lens_view import save_png
from training.page import Html, element, line_chart, page, table, tile


def write_report(results: dict[str, Any], out: Path) -> list[str]:
    """index.html, and curves.png where matplotlib is installed; returns the names written."""
    (out / "index.html").write_text(report_page(results), encoding="utf-8")
    if find_spec("matplotlib") is None:
        print("no curves.png: it needs matplotlib; pip install 'midstream[report]'")
        return ["index.html"]
    curves_png(results, out / "curves.png")
    return ["index.html", "curves.png"]


def report_page(results: dict[str, Any]) -> str:
    concepts: dict[str, Any] = results["concepts"]
    block, epochs = results["block"], results["epochs"]
    intro = (
        f"{results['model']}, block {block} of {results['n_layers']} (the middle one, fixed beforehand). Each probe is "
        f"one linear layer and a sigmoid, fitted to 50 pairs by Adam for {epochs} epochs on the residual stream, "
        "averaged over the tokens of the message. Validation pairs are never fitted on."
    )
    return page(
        "The residual stream, read by linear probes",
        element("p", intro, class_="soft"),
        element("div", *(_tile(name, c) for name, c in concepts.items()), class_="row"),
        element("h2", "Training and validation"),
        element("div", _curves(concepts, "accuracy", 1.0), _curves(concepts, "loss", None), class_="row"),
        element("h2", "Every block"),
        element("div", _sweep(concepts), _floors(concepts), class_="row"),
        element("h2", "The same probes off their distribution"),
        element("p", _CAVEAT, class_="soft"),
        _elsewhere(concepts),
        element("h2", "How it was made"),
        element("p", _recipe(results), class_="soft"),
    )


_CAVEAT = (
    "A perfect validation accuracy says that these pairs are easy to tell apart, not that the probe knows the concept. "
    "Here are the same probes on texts that are not like their pairs. Found and false alarms are at the probe's own "
    "threshold, logit 0; words is what TF-IDF and logistic regression reach from the same 50 pairs."
)


def _recipe(results: dict[str, Any]) -> str:
    return (
        f"Seed {results['seed']}; model weights {results['fingerprint'][:24]}. Pairs are made by rule out of the "
        "project's own texts (training/pairs_made.py). AdamW, learning rate 0.01, weight decay 0.01, all rows at once, "
        "standardised features. Block, epochs and threshold were fixed beforehand; public test sets were read once, "
        "for this page."
    )


def _tile(name: str, c: dict[str, Any]) -> Html:
    first = c["first_perfect_epoch"]
    when = f"1.0 first at epoch {first}" if first is not None else "never 1.0"
    note = f"{c['about']}; {c['n_validation']} rows, 95 % interval {c['low']:.3f} to {c['high']:.3f}; {when}"
    return tile(f"{name}: validation accuracy", f"{c['validation_accuracy']:.3f}", note)


def _curves(concepts: dict[str, Any], what: str, highest: float | None) -> Html:
    series = {
        f"{name}, {side}": list(enumerate(c["curves"][f"{side}_{what}"], 1))
        for name, c in concepts.items()
        for side in ("validation", "training")
    }
    return line_chart(f"{what.capitalize()} after each epoch", series, "epoch", what, _from_low(series, highest))


def _sweep(concepts: dict[str, Any]) -> Html:
    series = {name: list(enumerate(c["layers"])) for name, c in concepts.items()}
    return line_chart(
        "Validation accuracy of a probe at each block", series, "block", "accuracy", _from_low(series, 1.0)
    )


def _from_low(series: dict[str, list[tuple[int, float]]], highest: float | None) -> tuple[float, float] | None:
    """A range up to `highest` that begins at chance, or below it where a point lies there."""
    lowest = min(y for points in series.values() for _, y in points)
    return None if highest is None else (min(0.4, lowest), highest)


def _floors(concepts: dict[str, Any]) -> Html:
    rows = [
        (name, c["training_accuracy"], c["validation_accuracy"], c["floors"]["shuffled"], *_words(c["floors"]))
        for name, c in concepts.items()
    ]
    head = ("probe", "training", "validation", "shuffled labels", "words, AUROC", "length, AUROC")
    return element("figure", table(head, rows, "Accuracy, and what reaches it without a model (validation rows)"))


def _words(floors: dict[str, float]) -> Sequence[float]:
    return floors["words"], floors["length"]


def _elsewhere(concepts: dict[str, Any]) -> Html:
    rows = [
        (
            name,
            where,
            f"{e['n_positive']} / {e['n_negative']}",
            e["auroc"],
            None if e["auroc"] is None else f"{e['low']:.3f} to {e['high']:.3f}",
            _percent(e["found"]),
            _percent(e["false_alarms"]),
            e["words"],
        )
        for name, c in concepts.items()
        for where, e in c["elsewhere"].items()
    ]
    return table(("probe", "texts", "with / without", "AUROC", "95 %", "found", "false alarms", "words, AUROC"), rows)


def _percent(seen: dict[str, float] | None) -> str | None:
    return None if seen is None else f"{seen['rate']:.0%} ({seen['low']:.0%} to {seen['high']:.0%})"


def curves_png(results: dict[str, Any], path: Path) -> None:
    """Accuracy and loss by epoch, accuracy by block, AUROC off-distribution."""
    from matplotlib.figure import Figure

    concepts: dict[str, Any] = results["concepts"]
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    ((accuracy, loss), (sweep, elsewhere)) = figure.subplots(2, 2)
    colours = dict(zip(concepts, ("#1f6fd6", "#c4530c", "#0d8563", "#8244c4"), strict=False))
    for name, c in concepts.items():
        for axes, what in ((accuracy, "accuracy"), (loss, "loss")):
            epochs = range(1, results["epochs"] + 1)
            axes.plot(epochs, c["curves"][f"validation_{what}"], color=colours[name], label=name)
            axes.plot(epochs, c["curves"][f"training_{what}"], color=colours[name], linestyle="--", alpha=0.6)
        sweep.plot(c["layers"], color=colours[name], marker="o", markersize=3, label=name)
    for axes, title, label in (
        (accuracy, "accuracy (dashed: training)", "epoch"),
        (loss, "loss (dashed: training)", "epoch"),
        (sweep, "validation accuracy of a probe at each block", "block"),
    ):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    sweep.axvline(results["block"], color="#888", linewidth=0.8)
    bars = [
        (f"{name}: {where}", e["auroc"], colours[name])
        for name, c in concepts.items()
        for where, e in c["elsewhere"].items()
        if e["auroc"] is not None
    ][::-1]
    names, values, shades = zip(*bars, strict=True)
    elsewhere.barh(range(len(bars)), values, color=shades)
    elsewhere.set_yticks(range(len(bars)), names, fontsize=7)
    elsewhere.set_xlim(0, 1)
    elsewhere.axvline(0.5, color="#888", linewidth=0.8)
    elsewhere.set_title("AUROC off the probe's distribution")
    figure.suptitle(f"{results['model']}, block {results['block']}", parse_math=False)
    save_png(figure, path)
