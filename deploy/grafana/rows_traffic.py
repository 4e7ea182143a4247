"""What was seen: verdicts, scores and thresholds, drift. Names of metrics come from monitor/metrics/table.py."""

from __future__ import annotations

from deploy.grafana.panel import (
    BY_CARD,
    CARD,
    COUNT,
    EVENT,
    MODEL,
    NUMBER,
    PER_MINUTE,
    PER_SECOND,
    PROBE,
    RATIO,
    READING,
    heatmap,
    lines,
    minutely,
    quantiles,
    rate,
    stat,
)

FINISHED = rate("requests_total", where=MODEL)
BLOCKED = "(" + rate("requests_total", where=MODEL + ', action="block"') + " or vector(0))"
SCORED = rate("tokens_scored_total")
UNMONITORED = "(" + rate("unmonitored_tokens_total") + " or vector(0))"

TRAFFIC = (
    stat("Ready", "Servers that are ready to answer.", COUNT, "sum(midstream_ready)"),
    stat("Sequences", "Finished sequences, all verdicts.", PER_SECOND, FINISHED),
    stat("Blocked", "Share of finished sequences that were blocked.", RATIO, f"{BLOCKED} / {FINISHED}"),
    stat(
        "Unmonitored",
        "Share of tokens without a usable score. Should be 0.",
        RATIO,
        f"{UNMONITORED} / ({SCORED} + {UNMONITORED})",
        alarm=1e-4,
    ),
    stat(
        "Leaked, 24 h",
        "Tokens released at or after the one that blocked. Must be 0.",
        COUNT,
        "sum(increase(midstream_leaked_tokens_total[24h]))",
        alarm=0.5,
    ),
    stat("Alerts", "Alerts that fire now.", COUNT, 'count(ALERTS{alertstate="firing"}) or vector(0)', alarm=1),
    lines(
        "Verdicts",
        "Finished sequences by verdict.",
        PER_SECOND,
        (rate("requests_total", "action", MODEL), "{{action}}"),
    ),
    lines(
        "Traffic by model and policy",
        "Finished sequences, whatever the verdict.",
        PER_SECOND,
        (rate("requests_total", "model, policy", MODEL), "{{model}} {{policy}}"),
    ),
    lines(
        "Endings",
        "How sequences ended, by route.",
        PER_SECOND,
        (rate("finished_total", "route, finish"), "{{route}} {{finish}}"),
    ),
    lines(
        "Blocks",
        "Sequences that a probe blocked.",
        PER_MINUTE,
        (minutely("blocks_total", "probe, phase", EVENT), READING),
    ),
    lines(
        "Flags",
        "Sequences that a probe flagged.",
        PER_MINUTE,
        (minutely("flags_total", "probe, phase", EVENT), READING),
    ),
    lines(
        "Would block",
        "Sequences above the threshold of a probe that may not block: what it would do in mode `block`.",
        PER_MINUTE,
        (minutely("would_block_total", "probe, phase", EVENT), READING),
    ),
    lines(
        "Second judge",
        "Questions to the second judge, by what came of them.",
        PER_MINUTE,
        (minutely("escalations_total", "probe, phase, result", PROBE), READING + " {{result}}"),
    ),
    lines(
        "Refused",
        "Requests refused before generation, by status, and what a limit ended.",
        PER_MINUTE,
        (minutely("rejected_total", "status"), "status {{status}}"),
        (minutely("limited_total", "limit"), "limit {{limit}}"),
    ),
    lines(
        "Flags and blocks by key",
        "Keys that the settings allow as a label; every other one is `other`.",
        PER_MINUTE,
        (minutely("key_events_total", "key, action"), "{{key}} {{action}}"),
    ),
)

SCORES = (
    heatmap(
        "Request maximum, distribution",
        "Each sequence's value, as a probability: what is compared with the threshold.",
        "request_score",
    ),
    heatmap(
        "Token score, distribution",
        "Score of one token drawn from each sequence, as a probability.",
        "token_score",
    ),
    lines(
        "Request maximum, quantiles",
        "Median and 99th percentile of sequences' values. A p99 near the threshold means many close calls.",
        RATIO,
        *quantiles("request_score", "probe, phase", PROBE, READING),
    ),
    lines(
        "Thresholds",
        "In force, as a probability. A step is a new probe or a new policy.",
        RATIO,
        (f"{BY_CARD} (midstream_threshold_ratio{{{PROBE}}})", CARD),
    ),
    lines(
        "Thresholds, logits",
        "The same, as records and `midstream policy check` print them.",
        NUMBER,
        (f"{BY_CARD} (midstream_threshold_logit{{{PROBE}}})", CARD),
    ),
    lines(
        "Flag ratio against its target",
        "Share of the newest sequences above the threshold, its 95 % interval, and the false-positive rate that the "
        "threshold is certified for. The target outside the interval: harmful traffic, or a threshold that no longer "
        "fits. Nothing is shown of the first 200 sequences.",
        RATIO,
        (f"{BY_CARD} (midstream_target_fpr_ratio{{{PROBE}}})", CARD + " target"),
        (f"midstream_observed_flag_ratio{{{PROBE}}}", CARD + " observed ({{instance}})"),
        (f"midstream_observed_flag_ratio_low{{{PROBE}}}", CARD + " low ({{instance}})"),
        (f"midstream_observed_flag_ratio_high{{{PROBE}}}", CARD + " high ({{instance}})"),
        width=24,
    ),
)

DRIFT = (
    lines(
        "Population stability index",
        "The newest values against the reference in the probe's card: below 0.1 alike, above 0.25 drifted.",
        NUMBER,
        (f"{BY_CARD} (midstream_drift_psi_ratio{{{PROBE}}})", CARD),
        width=8,
        warn=0.1,
        alarm=0.25,
    ),
    lines(
        "Flag ratio over its target",
        "1 is as certified; 0 for long is a dead probe.",
        NUMBER,
        (
            f"{BY_CARD} (midstream_observed_flag_ratio{{{PROBE}}}) / {BY_CARD} (midstream_target_fpr_ratio{{{PROBE}}})",
            CARD,
        ),
        width=8,
        alarm=2,
    ),
    lines(
        "Shift of the mean activation",
        "Of sampled sequences (log_features), from the harmless training rows; 1 is what sampling alone gives. Where "
        "traffic is another one, it grows with the number of sequences.",
        NUMBER,
        (f"max by (probe, phase) (midstream_drift_mahalanobis_ratio{{{PROBE}}})", "{{probe}} {{phase}}"),
        width=8,
        warn=2,
    ),
)
