"""One reading of `midstream top`'s, and what grew between two: series, restarts and quantiles by value."""

import math

import pytest

from monitor.top.scrape import Unreachable, grown, grown_buckets, parse, quantile

# --- one reading ------------------------------------------------------------------------------------------------------


def test_series_are_found_and_summed_by_label():
    one = parse(
        "# TYPE midstream_blocks counter\n"
        'midstream_blocks_total{model="a",probe="p",phase="prompt"} 1\n'
        'midstream_blocks_total{model="b",probe="p",phase="prompt"} 2\n'
        'midstream_blocks_total{model="b",probe="p",phase="response"} 4\n'
        "# TYPE midstream_ready gauge\nmidstream_ready 1\n"
        'other_blocks_total{model="b"} 8\n',
        5.0,
    )
    assert one.total("blocks_total") == 7
    assert one.total("blocks_total", model="b") == 6
    assert one.by("phase", "blocks_total") == {"prompt": 3, "response": 4}
    assert (one.total("ready"), one.at, one.started) == (1, 5.0, None)


def test_what_is_not_there_is_not_known_and_what_did_not_happen_is_0():
    one = parse("# TYPE midstream_blocks counter\n# TYPE midstream_drift_psi_ratio gauge\n", 0.0)
    assert one.total("blocks_total", probe="p") == 0  # a counter with labels has no series before its first event
    assert one.total("drift_psi_ratio") is None
    assert one.total("flags_total") is None


def test_a_value_that_is_not_finite_is_not_known():
    one = parse("midstream_ready NaN\nmidstream_active_sequences +Inf\nmidstream_waiting_prompts 3\n", 0.0)
    assert [one.total(n) for n in ("ready", "active_sequences", "waiting_prompts")] == [None, None, 3]


def test_the_start_is_the_process_or_the_oldest_counter():
    text = "midstream_a_created 70\nmidstream_b_created 60\n"
    assert parse(text + "midstream_ready 1\n", 100.0).started == 60
    assert parse(text + "midstream_ready 1\nprocess_start_time_seconds 50\n", 100.0).started == 50


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<html><body>hello</body></html>", "not Prometheus' text"),
        ("midstream_ready one\n", "not Prometheus' text"),
        ("", "no metrics of Midstream's"),
        ("# TYPE vllm:num_requests gauge\nvllm:num_requests 4\n", "no metrics of Midstream's"),
    ],
)
def test_another_page_is_told(text, says):
    with pytest.raises(Unreachable, match=says):
        parse(text, 0.0)


# --- what grew --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "more"),
    [(7, 5, 2), (5, 5, 0), (3, 5, 3), (0, 5, 0), (4, None, 4), (None, 4, None), (None, None, None)],
)
def test_a_counter_that_fell_began_again(new, old, more):
    assert grown(new, old) == more


def test_a_histogram_that_fell_began_again_as_one():
    old = {0.1: 2.0, 1.0: 9.0, math.inf: 10.0}
    assert grown_buckets({0.1: 2.0, 1.0: 10.0, math.inf: 12.0}, old) == {0.1: 0, 1.0: 1, math.inf: 2}
    again = {0.1: 5.0, 1.0: 6.0, math.inf: 7.0}  # its first bucket did not fall
    assert grown_buckets(again, old) == again
    assert grown_buckets(again, {}) == again


def test_quantiles_are_lines_within_a_bucket():
    buckets = {1.0: 10.0, 2.0: 30.0, 4.0: 40.0, math.inf: 40.0}
    assert quantile(0.25, buckets) == 1.0
    assert quantile(0.5, buckets) == 1.5
    assert quantile(0.875, buckets) == 3.0
    assert quantile(1.0, buckets) == 4.0


def test_a_quantile_above_the_last_bound_is_that_bound():
    assert quantile(0.99, {1.0: 1.0, 2.0: 2.0, math.inf: 100.0}) == 2.0


def test_nothing_observed_has_no_quantile():
    assert quantile(0.5, {}) is None
    assert quantile(0.5, {1.0: 0.0, math.inf: 0.0}) is None
