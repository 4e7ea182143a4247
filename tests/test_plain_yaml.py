"""YAML that an operator writes: plain values, no key twice, and whatever is wrong in one line."""

import pytest

from monitor.plain_yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: {b: 1}\nc: {b: 1}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("- {a: 1}\n- {a: 2}", [{"a": 1}, {"a": 2}]),
        ("a: &x {b: 1, c: 1}\nd: {<<: *x, c: 2}", {"a": {"b": 1, "c": 1}, "d": {"b": 1, "c": 2}}),
        ("a: {d: &x {<<: {b: 0}, b: 1}}\nc: {<<: *x, b: 2}", {"a": {"d": {"b": 1}}, "c": {"b": 2}}),
        (b"a: caf\xc3\xa9", {"a": "café"}),
    ],
)
def test_values(text, value):
    assert read_yaml(text) == value


def test_an_alias_may_lead_back():
    value = read_yaml("a: &x [*x]")
    assert value["a"][0] is value["a"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "key 'a' is given twice, again in line 2"),
        ("a:\n  - {b: 1, c: 2,\n     b: 3}", "key 'b' is given twice, again in line 3"),
        ("? [{a: 1, a: 2}]\n: 1", "key 'a' is given twice"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: !!bool maybe", "maybe"),
        ("a: [", "while parsing"),
        ("a: 1\n---\nb: 2", "single document"),
        ("!!python/object/apply:os.getpid []", "could not determine a constructor"),
        (b"\x00", "special characters"),
        (b"caf\xe9", "unacceptable character"),
        ("[" * 5000, "recursion"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)
