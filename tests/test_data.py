"""Training data: files are read strictly, splits keep groups together, and no row is there twice."""

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.errors import ConfigInvalid
from training import data
from training.data import PAIRS, Row, read_jsonl, sample, split, text_hash, unique

from .rows import jsonl as jsonl


def rows(n, label=0, source="s", prefix="t", per_group=1):
    return [Row(f"{prefix}{i}", label, source, f"{prefix}g{i // per_group}") for i in range(n)]


def test_rows_are_read_and_the_file_is_described(jsonl):
    path = jsonl({"text": "a", "label": 1}, b"", {"text": "b", "label": 0, "source": "x", "group": "g"}, b"  ")
    got, described = read_jsonl(path)
    assert got == [Row("a", 1, "rows", text_hash("a")), Row("b", 0, "x", "rows:g")]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (described.file, described.sha256, described.rows, described.positive) == ("rows.jsonl", digest, 2, 1)


@pytest.mark.parametrize("group", [0, "0", 7])
def test_any_group_keeps_its_rows_together(jsonl, group):
    got, _ = read_jsonl(jsonl(*({"text": t, "label": 0, "group": group} for t in "ab")))
    assert got[0].group == got[1].group


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"text": "a", "label": 1', "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, ""),
        (b"[]", "`text` must be a non-empty string"),
        (b"null", "`text`"),
        (b'"text"', "`text`"),
        (b'{"label": 1}', "`text`"),
        (b'{"text": 5, "label": 1}', "`text`"),
        (b'{"text": " \\n", "label": 1}', "`text`"),
        (json.dumps({"text": "x" * data.MAX_ROW_BYTES, "label": 1}).encode(), "1 MiB"),
        (b'{"text": "a"}', "`label` is None"),
        (b'{"text": "a", "label": 2}', "`label` is 2"),
        (b'{"text": "a", "label": "1"}', "`label` is '1'"),
        (b'{"text": "a", "label": [1]}', "`label`"),
        (b'{"text": "\\ud800", "label": 1}', ""),
    ],
    ids=lambda v: str(v[:30]),
)
def test_a_bad_line_names_file_and_line(jsonl, line, message):
    path = jsonl({"text": "fine", "label": 0}, line)
    with pytest.raises(ConfigInvalid, match=rf"rows\.jsonl, line 2: .*{message}"):
        read_jsonl(path)


def test_a_missing_and_an_empty_file_are_named(jsonl, tmp_path):
    with pytest.raises(ConfigInvalid, match=r"none\.jsonl' can't be read"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ConfigInvalid, match=r"rows\.jsonl' is empty"):
        read_jsonl(jsonl(b"", b" "))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 1), st.sampled_from("xyz")), min_size=1, max_size=60),
    st.integers(0, 99),
)
def test_splits_keep_groups_together_and_lose_nothing(drawn, seed):
    all_rows = [Row(f"t{i}", label, source, f"g{group}") for i, (group, label, source) in enumerate(drawn)]
    shares = {"test": 0.2, "calibrate": 0.3, "fit": 0.5}
    parts = split(all_rows, shares, seed)
    assert sorted(r.text for part in parts.values() for r in part) == sorted(r.text for r in all_rows)
    homes = [{r.group for r in part} for part in parts.values()]
    assert sum(map(len, homes)) == len(set().union(*homes))
    assert split(all_rows, shares, seed) == parts
    assert {p: sorted(r.text for r in part) for p, part in split(all_rows[::-1], shares, seed).items()} == {
        p: sorted(r.text for r in part) for p, part in parts.items()
    }


def test_splits_are_stratified_and_another_seed_is_another_split():
    all_rows = rows(200, 0, "a", "p") + rows(100, 1, "a", "q") + rows(100, 0, "b", "r")
    shares = {"test": 0.1, "calibrate": 0.3, "fit": 0.6}
    parts = split(all_rows, shares, 0)
    counts = {part: Counter((r.source, r.label) for r in of_part) for part, of_part in parts.items()}
    for part, share in shares.items():
        for key, total in {("a", 0): 200, ("a", 1): 100, ("b", 0): 100}.items():
            assert counts[part][key] == pytest.approx(share * total, abs=1)
    assert split(all_rows, shares, 1) != parts


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 50), st.integers(0, 9))
def test_samples_are_whole_groups_within_the_limit(n, per_group, limit, seed):
    all_rows = rows(n, per_group=per_group)
    taken = sample(all_rows, limit, seed)
    assert len(taken) <= limit
    assert len(taken) > min(n, limit) - per_group
    assert taken == sample(all_rows, limit, seed)
    whole = Counter(r.group for r in all_rows)
    assert all(count == whole[group] for group, count in Counter(r.group for r in taken).items())
    assert sample(all_rows, None, seed) == all_rows


def test_unique_ignores_case_and_space():
    first = Row("How  are\nYOU", 0, "s", "g1")
    assert unique([first, Row("how are you ", 1, "s", "g2"), *rows(1)]) == [first, *rows(1)]


def test_two_answers_to_one_question_are_two_rows():
    asked, one, other = (Row("Why?", 0, "s", "g", answer=a) for a in ("", "Because.", "So."))
    assert unique([asked, one, Row("why?", 1, "s", "g", answer=" because. "), other]) == [asked, one, other]


def test_balanced_keys():
    three, one = rows(3), [Row("b", 1, "s", "g", 2.0, "k")]
    assert [r.weight for r in data.balanced(three + one)] == [1 / 3] * 3 + [2.0]


def test_our_pairs():
    got, described = read_jsonl(PAIRS)
    groups = {}
    for row in got:
        groups.setdefault(row.group, []).append(row.label)
    assert {tuple(sorted(labels)) for labels in groups.values()} == {(0, 1)}
    assert len(groups) >= 300
    assert len(unique(got)) == len(got) == described.rows
    assert all(row.text == row.text.strip() and len(row.text) > 10 for row in got)
