"""What `midstream top` reads: scrapes made by hand, and a page of our own metrics."""

from prometheus_client import generate_latest

from monitor.aggregate import Aggregation
from monitor.metrics import Metrics
from monitor.policy.rule import Rule
from monitor.top.scrape import Scrape, parse
from monitor.types import Action, Mode, Phase

from .test_records import reading, record


def scrape(at, samples="", started=None):
    lines = "# TYPE midstream_requests counter\n" + samples
    one = parse(lines, at)
    return Scrape(one.at, started, one.series, one.counters)


def requests(at, **verdicts):
    return scrape(at, "".join(f'midstream_requests_total{{action="{v}"}} {n}\n' for v, n in verdicts.items()))


def page():
    """Our own metrics after some traffic, as text."""
    metrics = Metrics(model="tiny-llama")
    rules = [Rule("demo", "v1", 0, phase, Mode.BLOCK, 1.5, Aggregation("mean"), "closed") for phase in Phase]
    metrics.probes([("demo", "v1", "ab" * 32, "2", "harm")], {"chat": rules})
    for gauge, value in (
        ("target_fpr_ratio", 0.005), ("observed_flag_ratio", 0.012), ("observed_flag_ratio_low", 0.0081),
        ("observed_flag_ratio_high", 0.0171), ("drift_psi_ratio", 0.31),
    ):  # fmt: skip
        getattr(metrics, gauge).labels("demo", "prompt", "chat").set(value)
    metrics.record(record())
    metrics.record(record(verdict=Action.FLAG, readings=(reading(Action.FLAG),)))
    metrics.record(record(verdict=Action.BLOCK, readings=(reading(Action.BLOCK), reading(would_block=True))))
    metrics.scored(0.00002, 7)
    metrics.review_backlog.set(2)
    return generate_latest(metrics.registry).decode()
