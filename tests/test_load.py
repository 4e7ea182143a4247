"""Loaders: the same rows from JSONL, CSV, Parquet and a pinned hub file, and every mistake named with its row."""

import hashlib
import io
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from monitor.errors import ConfigInvalid
from training.data import MAX_ROW_BYTES, read_jsonl
from training.load import read_rows
from training.recipe import Recipe, Source, default_recipe, gather

from .fake_hub import hub as hub

ROWS = [
    {"text": "How do I bake bread?", "label": 0, "source": "kitchen", "group": "g1"},
    {"text": 'He said "no, never",\nand left. Ünïcode ✓', "label": 1, "source": "", "group": ""},
    {"text": "a third one", "label": 0, "source": "kitchen", "group": "g2"},
]


def as_csv(rows, columns=("text", "label", "source", "group")):
    def cell(value):
        return '"' + str(value).replace('"', '""') + '"'

    return "\n".join([",".join(columns), *(",".join(cell(row[c]) for c in columns) for row in rows)]).encode()


def as_parquet(rows, schema=None):
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out)
    return out.getvalue()


def as_jsonl(rows):
    return "\n".join(map(json.dumps, rows)).encode()


FORMS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet, "CSV": as_csv}


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, kind):
    wanted, data = tmp_path / "rows.jsonl", FORMS[kind](ROWS)
    wanted.write_bytes(as_jsonl(ROWS))
    (tmp_path / f"rows.{kind}").write_bytes(data)
    rows, described = read_rows(f"rows.{kind}", tmp_path)
    assert rows == read_jsonl(wanted)[0]
    assert [r.source for r in rows] == ["kitchen", "rows", "kitchen"] and rows[0].group == "rows:g1"
    assert (described.file, described.rows, described.positive) == (f"rows.{kind}", 3, 1)
    assert described.sha256 == hashlib.sha256(data).hexdigest()


def test_other_columns_are_left_alone_and_the_optional_ones_may_be_missing(tmp_path):
    rows = [{"label": True, "text": "yes", "extra": [1, 2]}, {"label": False, "text": "no", "extra": []}]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbflabel,extra,text\r\n1 ,x,yes\r\n0,y,no\r\n")
    for file, stem in (("a.parquet", "a"), ("b.csv", "b")):
        read, _ = read_rows(tmp_path / file)
        assert [(r.text, r.label, r.source) for r in read] == [("yes", 1, stem), ("no", 0, stem)]


def test_a_long_text_fits_in_csv(tmp_path):
    text = "x" * 500_000  # the csv module's own limit is 131,072
    (tmp_path / "a.csv").write_bytes(as_csv([{"text": text, "label": 1}], ("text", "label")))
    assert read_rows(tmp_path / "a.csv")[0][0].text == text


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"text,label\nhello,2\n", "row 1: `label` is '2'; write 1 for harmful"),
        ("a.csv", b"text,label\nhello,0\n ,1\n", "row 2: `text` must be a non-empty string"),
        ("a.csv", b"text,label\nhello,0\nhello, you,1\n", "row 2: more fields than the header has"),
        ("a.csv", b"text,label\nhello\n", "row 1: `label` is None"),
        ("a.csv", b"prompt,label\nhello,1\n", "has no column 'text' (it has prompt, label)"),
        ("a.csv", b"", "has no column 'text' (it has none)"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv", b"text,label\n\xff,1\n", "is not UTF-8: byte 11"),
        ("a.csv", b'text,label\n"open,1\n', "is not CSV"),
        ("a.csv", b"text,label\n" + b"x" * (MAX_ROW_BYTES + 1) + b",1\n", "is not CSV: field larger"),
        ("a.parquet", b"PAR1 nonsense", "is not Parquet"),
        ("a.parquet", b"", "is not Parquet"),
        ("a.parquet", as_parquet([{"text": "x", "harmful": 1}]), "has no column 'label' (it has text, harmful)"),
        ("a.parquet", as_parquet([{"text": "x", "label": 0}, {"text": None, "label": 0}]), "row 2: `text` must be"),
        ("a.parquet", as_parquet([{"text": "x", "label": 0.5}]), "row 1: `label` is 0.5"),
        ("a.parquet", as_parquet([], pyarrow.schema({"text": pyarrow.string(), "label": pyarrow.int8()})), "no rows"),
        ("a.parquet", as_parquet([{"text": "x" * (MAX_ROW_BYTES + 1), "label": 1}]), "below 1 MiB"),
        ("a.jsonl", b'{"text": "x", "label": 3}', "line 1: `label` is 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_mistakes_are_named_with_file_and_row(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigInvalid) as caught:
        read_rows(name, tmp_path)
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        with pytest.raises(ConfigInvalid, match=rf"{name}.* can't be read"):
            read_rows(name, tmp_path)


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(as_parquet(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an import of something not installed finds
    with pytest.raises(ConfigInvalid, match=r"needs pyarrow; pip install midstream\[parquet\], or write JSONL"):
        read_rows("a.parquet", tmp_path)


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_pinned_hub_file_is_the_same_rows_with_its_address(hub, tmp_path, kind):
    data = FORMS[kind](ROWS)
    commit = hub.add("org/set", {f"data/train.{kind}": data}, kind="dataset")
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS))
    for address in (f"hf://org/set@{commit}/data/train.{kind}", f"hf://datasets/org/set@{commit}/data/train.{kind}"):
        rows, described = read_rows(address, tmp_path / "elsewhere")
        assert rows == read_jsonl(tmp_path / "train.jsonl")[0]
        assert described.file == address and described.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://org/set/train.csv", "name the commit, 40 hexadecimal digits"),
        ("hf://org/set@main/train.csv", "name the commit"),
        ("hf://org/set@abc123/train.csv", "name the commit"),
        ("hf://org@COMMIT/train.csv", "write hf://OWNER/NAME@COMMIT/FILE"),
        ("hf:/org/set@COMMIT/train.csv", "write hf://OWNER/NAME@COMMIT/FILE"),
        ("hf://org/none@COMMIT/train.csv", "no such repository"),
        (f"hf://org/set@{'0' * 40}/train.csv", "no such commit"),
        ("hf://org/set@COMMIT/other.csv", "no such file"),
    ],
)
def test_an_address_that_is_not_pinned_or_not_there(hub, address, says):
    commit = hub.add("org/set", {"train.csv": as_csv(ROWS)}, kind="dataset")
    with pytest.raises(ConfigInvalid, match=says):
        read_rows(address.replace("COMMIT", commit))


def test_a_recipe_takes_them_all_and_the_card_will_name_them(hub, tmp_path):
    many = [{"text": f"text {i}", "label": i % 2, "source": "s", "group": ""} for i in range(60)]
    commit = hub.add("org/set", {"train.parquet": as_parquet(many[:20])}, kind="dataset")
    (tmp_path / "b.csv").write_bytes(as_csv(many[20:40]))
    (tmp_path / "c.jsonl").write_bytes(as_jsonl(many[40:]))
    address = f"hf://org/set@{commit}/train.parquet"
    recipe = Recipe(sources=(Source(file=address), Source(file="b.csv"), Source(file="c.jsonl")), balance=True)
    parts, files = gather(recipe, tmp_path)
    assert [f.file for f in files] == [address, "b.csv", "c.jsonl"]
    assert sum(map(len, parts.values())) == 60
    assert {r.key for rows in parts.values() for r in rows} == {"train", "b", "c"}
    assert default_recipe([address], None, 1, 0).sources[0].file == address  # what --data gives
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
