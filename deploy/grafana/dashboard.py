"""Grafana's dashboard as code: `python -m deploy.grafana.dashboard` writes dashboards/midstream.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana import rows_service, rows_traffic
from deploy.grafana.panel import Panel

JSON_FILE = Path(__file__).parent / "dashboards" / "midstream.json"
UID = "midstream"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = {"lines": 8, "stat": 4, "heatmap": 9, "table": 8}

Rows = Sequence[tuple[str, Sequence[Panel]]]
ROWS: Rows = (
    ("Traffic and verdicts", rows_traffic.TRAFFIC),
    ("Scores and thresholds", rows_traffic.SCORES),
    ("Drift", rows_traffic.DRIFT),
    ("Overhead", rows_service.OVERHEAD),
    ("Coverage", rows_service.COVERAGE),
    ("Operation", rows_service.OPERATION),
)


def dashboard(rows: Rows = ROWS) -> dict[str, Any]:
    """As Grafana reads it from a file. Panels are numbered in their order, rows included."""
    board = (
        Dashboard("Midstream")
        .uid(UID)
        .description("Live safety monitoring: verdicts, scores, drift, overhead, coverage, operation.")
        .tags(["midstream", "llm", "safety"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("model", "Model", "label_values(midstream_requests_total, model)"))
        .with_variable(_choice("probe", "Probe", "label_values(midstream_probe_info, probe)"))
    )
    number = 0
    for title, panels in rows:
        number += 1
        board.with_row(Row(title).id(number))
        for panel in panels:
            number += 1
            board.with_panel(_shape(panel).id(number))
    built: dict[str, Any] = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    return built


def text(board: dict[str, Any]) -> str:
    """The file's content; keys in one order, so that a change of the code is a small change of the file."""
    return json.dumps(board, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _choice(name: str, label: str, query: str) -> QueryVariable:
    """A variable of several values, all of them at first."""
    return (
        QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _shape(panel: Panel) -> Any:
    """The SDK's builder of this kind of panel."""
    make = {"lines": _lines, "stat": _stat, "heatmap": _heatmap, "table": _table}[panel.kind]
    shape = make(panel).title(panel.title).description(panel.description).unit(panel.unit).datasource(DATASOURCE)
    for at, (expr, legend) in enumerate(panel.queries):
        query = (
            prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + at)).datasource(DATASOURCE)
        )
        if panel.kind == "table":
            query = query.format(PromQueryFormat.TABLE).instant()
        elif panel.kind == "heatmap":
            query = query.format(PromQueryFormat.HEATMAP).range()
        else:
            query = query.range()
        shape.with_target(query)
    return shape.thresholds(_thresholds(panel)).span(panel.width).height(HEIGHT[panel.kind])


def _thresholds(panel: Panel) -> ThresholdsConfig:
    steps = [Threshold(None, "green")]
    steps += [Threshold(panel.warn, "yellow")] if panel.warn is not None else []
    steps += [Threshold(panel.alarm, "red")] if panel.alarm is not None else []
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _lines(panel: Panel) -> timeseries.Panel:
    lined = GraphThresholdsStyleMode.OFF if panel.alarm is None else GraphThresholdsStyleMode.DASHED
    return (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(10)
        .min(0)
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(lined))
    )


def _stat(panel: Panel) -> stat.Panel:
    return stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _heatmap(panel: Panel) -> heatmap.Panel:
    # `le` is already a probability of our own buckets: Grafana must not bin them again.
    return (
        heatmap.Panel()
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .y_axis(heatmap.YAxisConfig().unit("percentunit"))
    )


def _table(panel: Panel) -> table.Panel:
    hidden = [DynamicConfigValue("custom.hidden", True)]
    return table.Panel().override_by_regexp("/^(Time|Value|__name__|job)$/", hidden)


if __name__ == "__main__":
    JSON_FILE.parent.mkdir(exist_ok=True)
    JSON_FILE.write_text(text(dashboard()))
