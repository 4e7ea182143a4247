"""Every metric, in one table: README's, the alert rules', the dashboard's and the code's all come from here.

Labels are closed sets (probes, phases, actions, causes) or chosen by the operator (policies, keys on an allow-list);
never a client's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["livesum", "livemax", "livemin", "livemostrecent"]
PREFIX = "midstream"

SECONDS = (1e-5, 2.5e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0)
HOLD_SECONDS = (1e-3, 2.5e-3, 1e-2, 2.5e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
PROBABILITY = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
TOKENS = (0, 1, 2, 4, 8, 16, 64)


@dataclass(frozen=True, slots=True)
class Metric:
    """name: without the prefix, and a counter's without `_total`

    buckets: upper bounds of a histogram's; merge: what several API processes' values of a gauge become
    """

    kind: Kind
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = "livesum"

    @property
    def exposed(self) -> str:
        """As Prometheus knows it; a histogram also has _bucket, _sum and _count."""
        return f"{PREFIX}_{self.name}" + ("_total" if self.kind == "counter" else "")


_EVENT = ("model", "probe", "phase")
_CARD = ("probe", "phase", "format")

TABLE = (
    # traffic and verdicts
    Metric("counter", "requests", "Finished sequences by verdict.", ("model", "policy", "action")),
    Metric("counter", "finished", "Finished sequences by route and how they ended.", ("route", "finish")),
    Metric("counter", "flags", "Sequences that a probe flagged.", _EVENT),
    Metric("counter", "blocks", "Sequences that a probe blocked.", _EVENT),
    Metric("counter", "would_block", "Sequences above the threshold of a probe that may not block.", _EVENT),
    Metric(
        "counter",
        "escalations",
        "Questions to the second judge, by what came of them.",
        ("probe", "phase", "result"),
    ),
    Metric("counter", "rejected", "Requests refused before generation.", ("status",)),
    Metric("counter", "limited", "Requests and connections that a limit ended.", ("limit",)),
    Metric("counter", "key_events", "Flags and blocks of the keys that may be a label.", ("key", "action")),
    # coverage
    Metric("counter", "tokens_scored", "Tokens with a judged score.", ("phase",)),
    Metric("counter", "final_unscored_tokens", "Last sampled tokens: never fed, so never scored."),
    Metric("counter", "unmonitored_tokens", "Tokens whose score was missing or not finite.", ("cause",)),
    Metric("counter", "fail_open", "Sequences served over missing scores of a blocking probe."),
    Metric("counter", "leaked_tokens", "Tokens released at or after the one that blocked. Must stay 0."),
    # scores and thresholds
    Metric(
        "histogram",
        "token_score",
        "Score of one token drawn from each sequence, as a probability.",
        ("probe", "phase"),
        PROBABILITY,
    ),
    Metric("histogram", "request_score", "Value of a sequence, as a probability.", ("probe", "phase"), PROBABILITY),
    Metric("gauge", "threshold_logit", "Threshold in force.", _CARD, merge="livemostrecent"),
    Metric("gauge", "threshold_ratio", "Threshold in force, as a probability.", _CARD, merge="livemostrecent"),
    Metric(
        "gauge",
        "target_fpr_ratio",
        "False-positive rate that the threshold is certified for.",
        _CARD,
        merge="livemostrecent",
    ),
    Metric(
        "gauge",
        "observed_flag_ratio",
        "Share of the newest sequences above the threshold.",
        _CARD,
        merge="livemostrecent",
    ),
    Metric(
        "gauge",
        "observed_flag_ratio_low",
        "Lower end of its 95 % interval (Clopper, Pearson).",
        _CARD,
        merge="livemostrecent",
    ),
    Metric("gauge", "observed_flag_ratio_high", "Upper end of it.", _CARD, merge="livemostrecent"),
    Metric(
        "gauge",
        "drift_psi_ratio",
        "Population stability index of the newest values against the card's reference.",
        _CARD,
        merge="livemostrecent",
    ),
    Metric(
        "gauge",
        "drift_mahalanobis_ratio",
        "Distance of the mean of sampled activations from the harmless training rows; 1 is sampling noise.",
        ("probe", "phase"),
        merge="livemostrecent",
    ),
    Metric(
        "gauge",
        "probe_info",
        "1 for each probe in service.",
        ("probe", "version", "sha256", "layers", "kind"),
        merge="livemax",
    ),
    # overhead
    Metric("histogram", "score_seconds", "Judging one step of the engine, all its sequences.", (), SECONDS),
    Metric("histogram", "holdback_seconds", "Longest wait of a sampled token of a sequence.", (), HOLD_SECONDS),
    Metric("histogram", "held_tokens", "Most tokens of a sequence held back at once.", (), TOKENS),
    Metric("gauge", "active_sequences", "Sequences in the engine."),
    Metric("gauge", "waiting_prompts", "Prompts in the embedded engine's queue."),
    # the log, notices, operation
    Metric("gauge", "record_queue_depth", "Records not yet written."),
    Metric("counter", "records_dropped", "Records lost to a full or failing log."),
    Metric("counter", "texts_dropped", "Texts of choices lost to a full or failing log, or to a lost record."),
    Metric(
        "gauge", "review_backlog", "Kept records of flags and blocks that nobody has labelled.", merge="livemostrecent"
    ),
    Metric("gauge", "feature_queue_depth", "Kept sequences that wait to be read again for their features."),
    Metric("counter", "features_kept", "Sequences whose features were written, by why they were kept.", ("reason",)),
    Metric("counter", "features_dropped", "Kept sequences whose features were lost.", ("cause",)),
    Metric(
        "gauge",
        "calibration_rows_needed",
        "Rows of everyday traffic, or labels of them, that a retrained threshold at the target rate still lacks.",
        ("probe",),
        merge="livemostrecent",
    ),
    Metric("counter", "notice_lines", "Flags and blocks written to stdout.", ("result",)),
    Metric("counter", "webhook", "Notices to the webhook.", ("result",)),
    Metric("counter", "policy_reloads", "Policy files read again.", ("result",)),
    Metric("counter", "probe_reload", "Changes of the probes in service, and candidates left out.", ("result",)),
    Metric("counter", "admin_requests", "Requests to the admin port.", ("outcome",)),
    Metric("gauge", "ready", "1 while the server is ready.", merge="livemin"),
    Metric("gauge", "heartbeat_timestamp_seconds", "When the monitor last looked at itself.", merge="livemax"),
)


def series() -> frozenset[str]:
    """Every name that a query may ask for."""
    found = set()
    for metric in TABLE:
        found.add(metric.exposed)
        if metric.kind == "histogram":
            found |= {f"{metric.exposed}_{part}" for part in ("bucket", "sum", "count")}
    return frozenset(found)


def markdown() -> str:
    """README's table."""
    lines = ["| metric | labels | what it says |", "|---|---|---|"]
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.exposed}` | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"
