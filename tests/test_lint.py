"""The linter: each fault is found where it was planted, a sound data set has none, and the exit code says which."""

import json
import random
import sys
from dataclasses import replace

import pytest

from monitor.cli import main
from monitor.errors import ConfigInvalid
from training import shortcuts
from training.data import PAIRS, Row, same_text, text_hash
from training.lint import lint
from training.similar import SHINGLE, jaccard, near_others, near_pairs, shingles

WORDS = [f"{a}{b}n" for a in "bdfhklmp" for b in "aeiou"]


def texts(n, seed=0, words=12):
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=words + chance.randint(-3, 3))) for _ in range(n)]


def rows(n=60, seed=0):
    """Random words under random labels of one source: nothing to find."""
    return [{"text": text, "label": i % 2, "source": "s"} for i, text in enumerate(texts(n, seed))]


@pytest.fixture
def write(tmp_path):
    def go(name, items):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, items)))
        return path

    return go


def found(report):
    return {(f.level, f.rule): f for f in report.findings}


def test_a_sound_set_has_no_finding(write):
    report = lint([write("a.jsonl", rows())], [write("e.jsonl", rows(seed=1))])
    assert report.findings == () and not report.failed
    assert report.figures["rows"] == 60 and report.figures["positive"] == 30
    assert (report.files[0].file, report.files[0].rows) == ("a.jsonl", 60)


def test_our_own_pairs_have_no_finding():
    """Contrast pairs: alike in length, form and words. What ships must pass what we ask of others."""
    report = lint([PAIRS])
    assert report.findings == ()
    assert report.figures["tfidf_auroc"] < 0.7 and report.figures["length_auroc"] < 0.6


# --- repeats --------------------------------------------------------------------------------------------------------


def test_one_text_under_both_labels_is_an_error_at_both_places(write):
    a, b = rows(), rows(seed=1)
    b[4] = {"text": "  " + a[7]["text"].upper(), "label": 1 - a[7]["label"]}
    paths = write("a.jsonl", a), write("b.jsonl", b)
    errors = [f for f in lint(paths).findings if f.rule == "label-noise"]
    assert [(f.level, f.file, f.rows) for f in errors] == [
        ("error", str(paths[0]), (8,)),
        ("error", str(paths[1]), (5,)),
    ]
    assert "row 8 and b.jsonl row 5" in errors[0].message


def test_repeats_of_one_label_are_a_warning(write):
    a = rows()
    report = lint([write("a.jsonl", [*a, a[3], a[3], a[10]])])
    (one,) = report.findings
    assert (one.level, one.rule, one.rows) == ("warning", "duplicate", (61, 62, 63)) and "a.jsonl row 4" in one.message


def longer(text):
    return text + " " + " ".join(WORDS[:8])


def test_near_repeats_are_found_unless_they_share_a_group_or_differ_in_label(write):
    a = rows()
    long = [longer(row["text"]) for row in a[:4]]
    a += [{"text": t, "label": 0, "source": "s"} for t in long[:1]]
    a += [{"text": t + "!", "label": 0, "source": "s"} for t in long[:1]]  # 62: near 61
    a += [{"text": t, "label": 1, "source": "s", "group": 5} for t in (long[2], long[2] + "!")]  # one group
    a += [
        {"text": long[3], "label": 1, "source": "s"},
        {"text": long[3] + "!", "label": 0, "source": "s"},
    ]  # a contrast
    (one,) = lint([write("a.jsonl", a)]).findings
    assert (one.level, one.rule, one.rows) == ("warning", "near-duplicate", (62,)) and "a.jsonl row 61" in one.message


def test_overlap_with_an_evaluation_file_is_an_error(write):
    a, evaluation = rows(), rows(seed=1)
    a[5]["text"] = evaluation[9]["text"].title()
    a[6]["text"] = longer(evaluation[11]["text"]) + "."
    evaluation[11]["text"] = longer(evaluation[11]["text"])
    report = lint([write("a.jsonl", a)], [write("e.jsonl", evaluation)])
    by = found(report)
    exact, near = by["error", "overlap"], by["error", "near-overlap"]
    assert (exact.rows, exact.hashes) == ((6,), (text_hash(a[5]["text"]),)) and "e.jsonl row 10" in exact.message
    assert near.rows == (7,) and "e.jsonl row 12 (0.9" in near.message and "drop" in near.remedy
    assert report.failed and len(report.findings) == 2


def test_a_near_copy_of_any_evaluation_row_is_found_though_these_repeat_each_other():
    """Evaluation rows in a chain, each near the next: the last is near a training row, the first is not."""
    base = " ".join(texts(1, words=40))
    chain = [base + "".join(f" {w}" for w in WORDS[: 4 * i]) for i in range(4)]
    train = base + "".join(f" {w}" for w in WORDS[:15])
    assert near_others([train], chain[:1]) == []
    assert [(i, j) for i, j, _ in near_others([train], chain)] in ([(0, 1)], [(0, 2)], [(0, 3)])


# --- similarity -----------------------------------------------------------------------------------------------------


def naive(text):
    data = same_text(text).encode().ljust(SHINGLE, b"\0")
    return {data[i : i + SHINGLE] for i in range(len(data) - SHINGLE + 1)}


def test_similarity_is_jaccard_of_the_windows():
    for a, b in zip(texts(30, 3), texts(30, 4), strict=True):
        assert len(shingles(a)) == len(naive(a))
        assert jaccard(shingles(a), shingles(a + " " + b)) == pytest.approx(
            len(naive(a) & naive(a + " " + b)) / len(naive(a) | naive(a + " " + b))
        )
    assert jaccard(shingles("Hello  World"), shingles("hello world")) == 1.0
    assert jaccard(shingles("hi"), shingles("ho")) == 0.0


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_no_pair_is_missed_by_looking_only_where_rare_shingles_meet(threshold):
    chance = random.Random(5)
    some = texts(25, 6, words=20)
    changed = [
        " ".join(w if chance.random() > 0.06 else "xyz" for w in text.split()) for text in some for _ in range(3)
    ]
    every = [*some, *changed]
    sets = [naive(text) for text in every]
    alike = [
        (i, j)
        for j in range(len(every))
        for i in range(j)
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
    ]
    pairs = near_pairs(every, threshold)
    assert {(i, j) for i, j, _ in pairs} <= set(alike)
    # Each text that is near an earlier one that was kept is paired, with the first such.
    dropped = {j for _, j, _ in pairs}
    for j in range(len(every)):
        kept = [i for i, k in alike if k == j and i not in dropped]
        assert [i for i, k, _ in pairs if k == j] == kept[:1]
    others = {(i, j) for i, j, _ in near_others(changed, some, threshold)}
    first = {}
    for i, j in alike:
        if i < len(some) <= j:
            first.setdefault(j - len(some), i)
    assert others == set(first.items())


def test_a_near_text_of_another_group_is_found_behind_one_of_the_same_group():
    (base,) = texts(1, 7, words=40)
    every = [base + end for end in ("", " .", " !", " ?", " ;")]
    pairs = near_pairs(every, groups=["a", "b", "a", "b", "a"])
    assert [(i, j) for i, j, _ in pairs] == [(0, 1), (1, 2), (0, 3), (1, 4)]
    assert [(i, j) for i, j, _ in near_pairs(every, groups=["a", "a", "a", "b", "c"])] == [(0, 3), (0, 4)]
    assert near_pairs(every, groups=["a"] * 5) == []
    assert [(i, j) for i, j, _ in near_pairs(every)] == [(0, j) for j in range(1, 5)]


def test_no_texts_have_no_pairs():
    assert near_pairs([]) == [] and near_others([], ["a"]) == [] and near_others(["a"], []) == []


# --- shortcuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "level", "change"),
    [
        ("length", "error", lambda text, label: text + " sea" * 20 * label),
        ("length", "warning", lambda text, label: text + " sea oak tea" * label),
        ("token", "error", lambda text, label: text + " ###" * label),
        ("shared-ends", "error", lambda text, label: ("please tell me " if label else "") + text),
        ("shared-ends", "error", lambda text, label: text + (" in great detail" if label else "")),
        ("bag-of-words", "error", lambda text, label: text + " secret hidden covert" * label),
    ],
)
def test_what_gives_the_label_away_is_found(write, rule, level, change):
    items = [row | {"text": change(row["text"], row["label"])} for row in rows(400)]
    one = found(lint([write("a.jsonl", items)]))[level, rule]
    assert one.file.endswith("a.jsonl") and one.remedy


def test_shortcuts_work_in_either_direction():
    def labelled(items):
        return [Row(text, label, "s", f"g{i}") for i, (text, label) in enumerate(items)]

    for label in (0, 1):
        made = labelled([("short", label)] * 20 + [("much longer ...", 1 - label)] * 20)
        assert shortcuts.length_auroc(made) == 1.0
        shares = {token: (one, none) for token, one, none in shortcuts.token_shares(made, top=9)}
        assert shares["short"] == ((1.0, 0.0) if label else (0.0, 1.0))
    said = shortcuts.ends(labelled([("how do I go home now", 1)] * 3 + [("how do you stay here", 0)] * 3), top=9)
    assert ("how do i …", 1.0, 0.0) in said and ("… stay here", 0.0, 1.0) not in said


def test_the_text_floor_is_measured_on_rows_held_back():
    """Labels by chance: what was fitted would be near 1, what is held back is near one half."""
    chance = random.Random(1)
    made = [Row(text, chance.randint(0, 1), "s", str(i)) for i, text in enumerate(texts(400, 2))]
    assert 0.4 < shortcuts.words_auroc(made) < 0.6
    assert shortcuts.words_auroc([Row(r.text, r.label, "s", "one group") for r in made]) is None


def test_the_text_floor_is_fitted_on_texts_whatever_answers_stand_beside_them():
    """The texts tell the labels, and the answers tell the opposite."""
    made = [Row(f"{'sea' if i % 2 else 'oak'} {t}", i % 2, "s", str(i)) for i, t in enumerate(texts(200, 2))]
    answered = [replace(r, answer=f"{'oak' if r.label else 'sea'} indeed") for r in made]
    assert shortcuts.words_auroc(answered) == shortcuts.words_auroc(made) > 0.6


def test_sources_of_one_label_are_a_warning(write):
    items = [row | {"source": "harmful" if row["label"] else "harmless"} for row in rows()]
    (one,) = lint([write("a.jsonl", items)]).findings
    assert (one.level, one.rule) == ("warning", "source") and "100%" in one.message


def test_class_balance(write):
    one_class = [row | {"label": 1} for row in rows()]
    (only,) = lint([write("a.jsonl", one_class)]).findings
    assert (only.rule, only.message) == ("class-balance", "only harmful rows")
    few = [row | {"label": int(i % 50 == 0)} for i, row in enumerate(rows(200))]
    report = lint([write("a.jsonl", few)])
    (small,) = report.findings
    assert small.message == "4 harmful of 200 rows" and "length_auroc" not in report.figures  # 4 rows say nothing


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd):
    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "lint", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return go


def test_exit_codes(run, write, tmp_path):
    clean, evaluation = write("a.jsonl", rows()), write("e.jsonl", rows()[:5])
    code, out, err = run(clean)
    assert (code, err) == (0, "") and "errors: 0, warnings: 0" in out
    doubled = write("d.jsonl", [*rows(), rows()[0]])
    code, out, _ = run(doubled)
    assert code == 0 and f"warning duplicate {doubled}, 1 rows: 61" in out and "-> nothing need be done" in out
    code, out, err = run(clean, "--against", evaluation)
    assert (
        (code, err) == (1, "")
        and f"error overlap {clean}, 5 rows: 1, 2, 3, 4, 5" in out
        and "errors: 1, warnings: 0" in out
    )
    code, out, err = run(tmp_path / "none.jsonl")
    assert (code, out) == (2, "") and err.startswith("midstream: data file") and len(err.splitlines()) == 1


def test_json_says_the_same(run, write):
    path = write("a.jsonl", rows())
    code, out, _ = run(path, "--against", path, "--json")
    said = json.loads(out)
    (one,) = said["findings"]
    assert code == 1 and said["failed"] is True and said["figures"]["rows"] == 60
    assert one["rule"] == "overlap" and one["rows"] == list(range(1, 61)) and len(one["hashes"]) == 60
    assert said["files"][0]["sha256"] == lint([path]).files[0].sha256


def test_many_rows_are_counted_and_no_text_is_printed(run, write):
    items = rows()
    _, out, _ = run(write("a.jsonl", items), "--against", write("e.jsonl", items))
    assert "60 rows: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 50 more" in out
    assert not any(row["text"] in out for row in items)


def test_without_scikit_learn_the_remedy_is_named(write, monkeypatch):
    monkeypatch.setattr(shortcuts, "find_spec", lambda name: None)
    with pytest.raises(ConfigInvalid, match=r"pip install midstream\[train\]"):
        lint([write("a.jsonl", rows())])
