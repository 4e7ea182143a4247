"""The feature log's files: what is written is read, whole and private; rows that must go are gone with their bytes."""

import dataclasses
import os
import stat
import sys
import zlib

import numpy as np
import pytest

from monitor.errors import ConfigInvalid
from monitor.traffic.features import Feature, read_features, write_features
from monitor.traffic.features.files import drop_older, erase_features
from monitor.types import Phase


def feature(request_id="r1", choice=0, key="alice", created=1000.0, phase=Phase.PROMPT, layers=(3, 5), width=8, **own):
    chance = np.random.default_rng(zlib.crc32(f"{request_id} {choice} {phase}".encode()))
    plain = {"q": 0.25, "reason": "near", "fingerprint": "hub-commit:abc", "template_hash": "t", "position_rule": "p/1"}
    vectors = chance.normal(size=(len(layers), width)).astype(np.float16)
    return Feature(request_id, choice, key, created, phase, **(plain | own), n_tokens=7, layers=layers, vectors=vectors)


def same(one, other):
    plain = [f.name for f in dataclasses.fields(Feature) if f.name != "vectors"]
    equal = np.array_equal(one.vectors, other.vectors) and one.vectors.dtype == other.vectors.dtype == np.float16
    return equal and all(getattr(one, name) == getattr(other, name) for name in plain)


def test_round_trip_over_files(tmp_path):
    folder = tmp_path / "deep/er"
    first = [feature(), feature(phase=Phase.RESPONSE, reason="flagged", q=1.0)]
    second = [feature("r2", 1, "", 2000.0, reason="uniform")]
    paths = [write_features(folder, part) for part in (first, second)]
    got = read_features(folder)
    assert len(got) == 3 and all(map(same, got, first + second))
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [f.request_id for f in read_features(folder, since=1500.0)] == ["r2"]


def test_some_layers_in_the_order_asked_for(tmp_path):
    one = feature()
    write_features(tmp_path, [one])
    (got,) = read_features(tmp_path, layers=(5, 3))
    assert got.layers == (5, 3)
    assert np.array_equal(got.vectors, one.vectors[::-1])
    assert read_features(tmp_path, layers=(4,)) == [], "another probe's"
    write_features(tmp_path, [feature("r2", layers=(4,))])
    assert [f.request_id for f in read_features(tmp_path, layers=(4,))] == ["r2"]


@pytest.mark.parametrize("other", [{"layers": (3,)}, {"width": 4}])
def test_mixed_kinds_are_refused(tmp_path, other):
    with pytest.raises(ConfigInvalid, match="of one kind"):
        write_features(tmp_path, [feature(), feature("r2", **other)])
    write_features(tmp_path, [feature()])
    write_features(tmp_path, [feature("r2", created=3000.0, **other)])
    with pytest.raises(ConfigInvalid, match="features of layers 3"):
        read_features(tmp_path)
    assert [f.request_id for f in read_features(tmp_path, since=2000.0)] == ["r2"]
    if "layers" in other:
        assert len(read_features(tmp_path, layers=(3,))) == 2


def test_nothing_to_write_or_to_read_is_an_error(tmp_path):
    with pytest.raises(ConfigInvalid, match="none"):
        write_features(tmp_path, [])
    with pytest.raises(ConfigInvalid, match="MIDSTREAM_FEATURES"):
        read_features(tmp_path / "nowhere")
    assert read_features(tmp_path) == []


@pytest.mark.parametrize("data", [b"", b"PAR1 is not all of it"])
def test_a_damaged_file_is_named(tmp_path, data):
    path = write_features(tmp_path, [feature()])
    path.write_bytes(data)
    with pytest.raises(ConfigInvalid, match=path.name):
        read_features(tmp_path)


def test_somebody_elses_parquet_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "features-1.parquet")
    with pytest.raises(ConfigInvalid, match="not a file of features"):
        read_features(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(_handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write_features(tmp_path, [feature()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("whose", "left"),
    [
        ({"key": "alice"}, ["r20", "r2", "r2-1"]),
        ({"request_id": "r2"}, ["r1", "r20", "r3"]),
        ({"request_id": "r9"}, ["r1", "r20", "r2", "r2-1", "r3"]),
    ],
)
def test_erasing_rewrites_the_files(tmp_path, whose, left):
    write_features(tmp_path, [feature(), feature("r20", key="bob")])
    write_features(tmp_path, [feature("r2", key=""), feature("r2-1", key="")])
    write_features(tmp_path, [feature("r3")])
    assert erase_features(tmp_path, **whose) == 5 - len(left)
    assert [f.request_id for f in read_features(tmp_path)] == left
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.glob("features-*")} <= {0o600}


def test_what_is_left_has_no_byte_of_what_went(tmp_path):
    mine, other = feature(width=512), feature("r2", key="bob", width=512)
    path = write_features(tmp_path / "both", [mine, other])
    assert erase_features(tmp_path / "both", key="alice") == 1
    assert path.read_bytes() == write_features(tmp_path / "one", [other]).read_bytes()
    assert [p.name for p in (tmp_path / "both").iterdir() if not p.name.startswith(".")] == [path.name]


def test_a_file_without_rows_goes(tmp_path):
    path = write_features(tmp_path, [feature()])
    assert erase_features(tmp_path, request_id="r1") == 1
    assert not path.exists()
    assert erase_features(tmp_path / "nowhere", key="alice") == 0
    with pytest.raises(ConfigInvalid, match="whose"):
        erase_features(tmp_path)


def test_what_is_too_old_goes(tmp_path):
    write_features(tmp_path, [feature(), feature("r2", created=5000.0)])
    assert drop_older(tmp_path, 1000.0) == 0
    assert drop_older(tmp_path, 1000.5) == 1
    assert [f.request_id for f in read_features(tmp_path)] == ["r2"]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigInvalid, match=r"midstream\[parquet\]"):
        write_features(tmp_path, [feature()])
