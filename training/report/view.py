"""A report as one page: no network, no script, dark and light, and readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.page import Html, element, page, table, tile
from training.report import charts as charts
from training.report.charts import number, percent, section, soft
from training.report.view_requests import requests

Report = Mapping[str, Any]


def report_page(report: Report) -> str:
    """report: as `training.report.run.evaluate` returns it, or as it was read back from report.json"""
    probe = report["probe"]
    blocks = "block " + str(probe["layers"][0]) if len(probe["layers"]) == 1 else f"blocks {probe['layers']}"
    intro = (
        f"{probe['model']}, {blocks} of {probe['n_layers']}, {probe['aggregation']['prompt']} over a turn. One "
        f"threshold for every set, which the card certifies for {report['target_fpr']:.1%} of everyday requests; "
        "nothing was tuned on what is shown here. Intervals are 95 %."
    )
    sections = [
        _head(report),
        _bars(report),
        *([requests(report)] if report.get("sets") else []),
        *([_answers(report)] if report.get("answers") else []),
        *([_attacks(report)] if report.get("attacks") else []),
        _made(report),
    ]
    return page(
        f"{probe['name']} {probe['version']}", element("p", intro, class_="soft"), *sections, style=charts.STYLE
    )


# --- the head ---------------------------------------------------------------------------------------------------------


def _head(report: Report) -> Html:
    sets, macro = report.get("sets", {}), report.get("macro", {})
    tiles = []
    for figure, label in (("auroc", "AUROC"), ("recall", "recall at the threshold")):
        if figure in macro:
            of = macro[figure]
            note = f"lowest {of['minimum']:.3f}, {of['worst']}"
            tiles.append(tile(f"{label}, mean of {of['sets']} sets", f"{of['mean']:.3f}", note))
    if "everyday" in sets:
        fpr = sets["everyday"]["fpr"]
        note = f"95 % interval {100 * fpr['low']:.1f} to {100 * fpr['high']:.1f} %, {fpr['n']:,} requests"
        tiles.append(tile("everyday requests flagged", f"{100 * fpr['value']:.1f} %", note))
        day = sets["everyday"]["false_alarms_a_day"]
        note = f"{day['low']:,.0f} to {day['high']:,.0f}, of {report['requests_a_day']:,.0f} requests like these"
        tiles.append(tile("false alarms a day", f"{day['value']:,.0f}", note))
    if report.get("look_alikes"):
        fpr = report["look_alikes"]["fpr"]
        note = f"harmless requests that look harmful, {fpr['n']:,} of them"
        tiles.append(tile("look-alikes flagged", f"{100 * fpr['value']:.1f} %", note))
    for name, entry in report.get("answers", {}).items():
        if "auroc" in entry:
            note = f"95 % interval {entry['auroc']['low']:.3f} to {entry['auroc']['high']:.3f}"
            tiles.append(tile(f"answers of {name}, AUROC", f"{entry['auroc']['value']:.3f}", note))
    return element("div", *tiles, class_="row tiles")


def _bars(report: Report) -> Html:
    marks = {True: ("met", "met"), False: ("missed", "missed"), None: ("not measured", "soft")}
    rows = [
        (
            bar["what"],
            "–" if bar["value"] is None else f"{bar['value']:.3f}",
            bar["wanted"],
            element("span", marks[bar["met"]][0], class_=marks[bar["met"]][1]),
        )
        for bar in report["bars"]
    ]
    return section("Bars set beforehand", element("div", table(("what", "value", "wanted", ""), rows), class_="bars"))


# --- answers ----------------------------------------------------------------------------------------------------------


def _answers(report: Report) -> Html:
    rows = [
        (
            name,
            f"{e['harmful']:,} / {e['harmless']:,}",
            number(e.get("auroc")),
            percent(e.get("recall")),
            percent(e.get("fpr"), 1),
            *(
                e["floors"][f]["value"] if f in e["floors"] else None
                for f in ("words", "words_here", "request", "length")
            ),
            number(e["beats"].get("words"), "+"),
            e["by_tokens"]["first"].get("median"),
        )
        for name, e in report["answers"].items()
    ]
    head = ("set", "harmful / harmless", "AUROC", "recall", "flagged", "words", "words, this set", "request", "length",
            "AUROC over words", "tokens to the flag, median")  # fmt: skip
    lines = [
        charts.Line(name, e["auroc"], {k: f["value"] for k, f in e["floors"].items() if k in ("words", "words_here")})
        for name, e in report["answers"].items()
        if "auroc" in e
    ]
    order = charts.forest("AUROC; ○ words, and words of this set", lines, 0.4, 1.0) if lines else ""
    seen = charts.by_tokens(report["answers"])
    return section("Answers", soft(_ANSWERS), table(head, rows), element("div", seen, order, class_="row"))


_ANSWERS = (
    "Answers that are given, scored token by token as if the model had written them. Words, this set: TF-IDF fitted to "
    "the other answers of the same set, more than any probe gets. Request: the probe's value of the prompt; where it "
    "orders the answers as well, bad questions were told apart, not bad answers."
)


# --- attacks ----------------------------------------------------------------------------------------------------------


def _attacks(report: Report) -> Html:
    lines = [
        charts.Line(name, e["recall"], {"harmless": e["fpr"]["value"]} if "fpr" in e else {})
        for name, e in report["attacks"].items()
        if "recall" in e
    ]
    rows = [
        (n["tokens"], percent(n["fpr"]), *(percent(n["miss"][place]) for place in ("start", "middle", "end")))
        for n in report["needles"]
    ]
    head = ("tokens", "flagged as they are", "missed at the start", "in the middle", "at the end")
    needles = table(head, rows, "A harmful request in a long harmless text") if rows else ""
    title = "Recall when a request is written in another form; ○ short harmless ones flagged"
    return section(
        "Attacks",
        soft(_ATTACKS),
        element("div", charts.forest(title, lines, 0.0, 1.0, percent=True), needles, class_="row"),
    )


_ATTACKS = (
    "Requests of the probe's own files that nothing was fitted on, rewritten by rule. Whoever rewrites a request in a "
    "form with low recall gets past it; a form with many harmless rows flagged is read as noise, not understood."
)


# --- how it was made --------------------------------------------------------------------------------------------------


def _made(report: Report) -> Html:
    thresholds = [
        (phase, t["value"], f"{t['target_fpr']:.2%}", t["n"], t["conformal"], t["source"])
        for phase, t in report["thresholds"].items()
        if t is not None
    ]
    head = ("phase", "threshold", "certified for", "harmless rows", "conformal", "rows")
    found: Sequence[str] = report["notes"]
    known = report.get("cut_as_calibrated", True)
    cut = "as the calibration rows were" if known else "the card does not say where the calibration rows were"
    return section(
        "How it was made",
        table(head, thresholds),
        element("ul", *(element("li", note) for note in found)) if found else "",
        soft(
            f"Probe weights {report['probe']['sha256'][:16]}, canaries off by {report['probe']['canaries_off_by']:.2g} "
            f"logits. Texts are cut after {report['max_text_tokens']} tokens, {cut}. midstream "
            f"{report['code_version']}, {report['created']}, {report['seconds']:,} s."
        ),
    )
