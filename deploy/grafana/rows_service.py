"""How the watching runs: overhead, coverage, operation. Names of metrics come from monitor/metrics/table.py."""

from __future__ import annotations

from deploy.grafana.panel import (
    COUNT,
    PER_MINUTE,
    PER_SECOND,
    PROBE,
    RATIO,
    SECONDS,
    last_hour,
    lines,
    minutely,
    quantiles,
    rate,
    table,
)

OVERHEAD = (
    lines(
        "Judging one step",
        "Time to judge one step of the engine, all its sequences.",
        SECONDS,
        *quantiles("score_seconds"),
    ),
    lines(
        "Share of time spent judging",
        "Seconds of judging for each second of the clock.",
        RATIO,
        (rate("score_seconds_sum", "instance"), "{{instance}}"),
    ),
    lines(
        "Hold-back, time",
        "Longest wait of a sampled token of a sequence until it was released.",
        SECONDS,
        *quantiles("holdback_seconds"),
    ),
    lines(
        "Hold-back, tokens",
        "Most tokens of a sequence held back at once.",
        COUNT,
        *quantiles("held_tokens"),
        width=12,
    ),
    lines(
        "Sequences in the engine",
        "Active, and prompts that wait in the embedded engine's queue.",
        COUNT,
        ("sum(midstream_active_sequences)", "active"),
        ("sum(midstream_waiting_prompts)", "waiting"),
        width=12,
    ),
)

COVERAGE = (
    lines(
        "Tokens scored", "Tokens with a judged score.", PER_SECOND, (rate("tokens_scored_total", "phase"), "{{phase}}")
    ),
    lines(
        "Unmonitored tokens",
        "Tokens whose score was missing or not finite, by cause. Should stay at 0.",
        PER_SECOND,
        (rate("unmonitored_tokens_total", "cause"), "{{cause}}"),
        alarm=1,
    ),
    lines(
        "Last tokens without a score",
        "The last sampled token of an answer is never fed back, so it has no score: one a sequence is normal.",
        PER_SECOND,
        (rate("final_unscored_tokens_total"), "final unscored"),
    ),
    lines(
        "Leaked tokens",
        "Tokens released at or after the one that blocked. Anything but 0 is a defect: see the runbook.",
        COUNT,
        (last_hour("leaked_tokens_total", "instance"), "{{instance}}, last hour"),
        width=12,
        alarm=0.5,
    ),
    lines(
        "Fail open",
        "Sequences served over missing scores of a blocking probe, because the policy says so.",
        PER_MINUTE,
        (minutely("fail_open_total"), "served unjudged"),
        width=12,
    ),
)

OPERATION = (
    lines(
        "Alerts firing",
        "By name and severity; deploy/runbook.md has a section for each.",
        COUNT,
        ('sum by (alertname, severity) (ALERTS{alertstate="firing"})', "{{alertname}} ({{severity}})"),
        width=12,
    ),
    lines(
        "Heartbeat",
        "Seconds since the monitor last looked at itself.",
        SECONDS,
        ("time() - max by (instance) (midstream_heartbeat_timestamp_seconds)", "{{instance}}"),
        width=12,
    ),
    lines(
        "Log",
        "Records not yet written; records and kept texts lost to a full or failing log.",
        COUNT,
        ("sum(midstream_record_queue_depth)", "queue"),
        (last_hour("records_dropped_total"), "lost, last hour"),
        (last_hour("texts_dropped_total"), "texts lost, last hour"),
    ),
    lines(
        "Feature log",
        "Kept sequences that wait to be read again, and those written and lost.",
        COUNT,
        ("sum(midstream_feature_queue_depth)", "queue"),
        (last_hour("features_kept_total"), "written, last hour"),
        (last_hour("features_dropped_total"), "lost, last hour"),
    ),
    lines(
        "Review backlog",
        "Kept records of flags and blocks that nobody has labelled.",
        COUNT,
        ("max(midstream_review_backlog)", "to review"),
        ("max by (probe) (midstream_calibration_rows_needed)", "{{probe}}: rows for a new threshold"),
    ),
    lines(
        "Notices",
        "Flags and blocks told to stdout and to the webhook.",
        PER_MINUTE,
        (minutely("notice_lines_total", "result"), "stdout {{result}}"),
        (minutely("webhook_total", "result"), "webhook {{result}}"),
    ),
    lines(
        "Policy, probes and admin",
        "Policy files read again, changes of the probes in service, and requests to the admin port.",
        PER_MINUTE,
        (minutely("policy_reloads_total", "result"), "policy {{result}}"),
        (minutely("probe_reload_total", "result"), "probes {{result}}"),
        (minutely("admin_requests_total", "outcome"), "admin {{outcome}}"),
        width=16,
    ),
    table(
        "Probes in service",
        "Version, hash of the weights and layers, by server. One name with two hashes is a half-finished change.",
        f"midstream_probe_info{{{PROBE}}}",
    ),
)
