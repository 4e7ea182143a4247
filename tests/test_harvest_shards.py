"""Shards: every row in its place, a killed run that goes on, and none that is damaged or of another plan."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid, ProbeMismatch
from probes_store.moments import Moments
from training.families import lda
from training.harvest import Sample, make_plan, statistics_of
from training.shards import MANIFEST, Harvest, read_manifest, shard_path, write_shard
from training.statistics import Statistics

from .samples import CHAT, LAYERS, SAMPLES, run

ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    pass


def dies_after(shards):
    """A progress that kills the run within the shard after so many."""
    done = 0

    def progress(n):
        nonlocal done
        done += n
        if done > 5 * shards:
            raise Killed

    return progress


def made_at(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(tiny, folder)
    return folder


# --- what is in them --------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_source_and_hash(whole):
    shards = list(Harvest(whole).shards())
    assert [len(s.labels) for s in shards] == [5, 5, 5, 5, 3]
    assert [h for s in shards for h in s.hashes] == [s.sha256 for s in SAMPLES]
    assert [k for s in shards for k in s.sources] == [s.source for s in SAMPLES]
    assert len({s.sha256 for s in SAMPLES}) == len(SAMPLES)


def test_float16_halves_the_shards(tiny, whole, tmp_path):
    made = run(tiny, tmp_path, dtype="float16")
    features, _ = made.load("mean")
    assert features.dtype == np.float16
    assert features == pytest.approx(Harvest(whole).load("mean")[0], rel=1e-3, abs=1e-3)
    assert shard_path(tmp_path, 0).stat().st_size < 0.6 * shard_path(whole, 0).stat().st_size


def test_statistics_of_shards_are_those_of_all_rows(whole):
    made = Harvest(whole)
    statistics = statistics_of(made, "last")
    features, labels = made.load("last")
    for layer in LAYERS:
        for label in (0, 1):
            wanted = Moments.of(features[labels == label, LAYERS.index(layer)])
            found = statistics.pooled(layer, label)
            assert found.n == wanted.n and found.mean == pytest.approx(wanted.mean, abs=1e-9)
            assert found.scatter == pytest.approx(wanted.scatter, abs=1e-6)
    assert lda(statistics, 2).weight.shape == (made.plan.d_model,)
    with pytest.raises(ProbeMismatch, match="pooling is 'last' and 'mean'"):
        statistics.merge(statistics_of(made, "mean"))


def test_what_was_not_harvested_is_named(whole):
    made = Harvest(whole)
    for pooling, layers in (("mean", (1,)), ("max", None)):
        with pytest.raises(ConfigInvalid, match=r"holds last, mean of layers 0, 2, 3"):
            made.load(pooling, layers)


# --- killed and continued ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", range(5))
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tiny, whole, tmp_path, shards):
    with pytest.raises(Killed):
        run(tiny, tmp_path, progress=dies_after(shards))
    before = made_at(tmp_path)
    assert len(before) == shards
    with pytest.raises(ConfigInvalid, match="shards are missing; harvest again"):
        Harvest(tmp_path)
    rows = []
    run(tiny, tmp_path, progress=rows.append)
    assert sum(rows) == 23 - 5 * shards
    assert {name: at for name, at in made_at(tmp_path).items() if name in before} == before
    assert contents(tmp_path) == contents(whole)


def test_a_run_ended_by_sigkill_goes_on(tiny, tiny_folder, whole, tmp_path):
    """In a process of its own, ended while it writes its third shard: the scratch file is there, the shard is not."""
    script = f"""
        import os, signal, torch
        from pathlib import Path
        torch.set_num_threads(1)  # as the tests' own process: another number may round in another order
        from monitor.config import cache_dir
        from monitor.engines.embedded.model import load_model
        from training.harvest import Sample, harvest, make_plan
        model, rename = load_model({str(tiny_folder)!r}, cache=cache_dir()), os.replace
        samples = [Sample(*fields) for fields in {[(s.messages, s.label, s.source) for s in SAMPLES]!r}]
        def replace(scratch, path):
            if path.name == "shard-00002.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(scratch, path)
        os.replace = replace
        plan = make_plan(model, samples, {LAYERS}, ("mean", "last"), shard_rows=5)
        harvest(model, samples, Path({str(tmp_path)!r}), plan)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        MANIFEST,
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors.part",
    ]
    assert sorted(read_manifest(tmp_path).shards) == [0, 1]
    run(tiny, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_shard_the_manifest_does_not_know_is_made_again(tiny, whole, tmp_path):
    """Killed between the two: the shard is on the disk, the manifest is one behind."""
    with pytest.raises(Killed):
        run(tiny, tmp_path, progress=dies_after(2))
    shard_path(tmp_path, 2).write_bytes(b"written, but not yet in the manifest")
    run(tiny, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_finished_run_does_nothing(tiny, whole):
    before = made_at(whole)
    run(tiny, whole, progress=dies_after(-1))
    assert made_at(whole) == before


# --- damage and other plans -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(whole, tmp_path):
    for name, data in contents(whole).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_not_read_and_made_again(tiny, whole, damaged, spoil):
    path = shard_path(damaged, 3)
    data = path.read_bytes()
    if spoil == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if spoil == "cut" else data[:900] + bytes([data[900] ^ 1]) + data[901:])
    with pytest.raises(ConfigInvalid, match=r"shard-00003.*made anew"):
        Harvest(damaged).load("mean")
    run(tiny, damaged)
    assert contents(damaged) == contents(whole)


def test_a_shard_that_lies_about_its_rows_is_refused(whole, damaged):
    """Even with a checksum that the manifest vouches for."""
    manifest = read_manifest(damaged)
    first = next(Harvest(damaged).shards())
    digest = write_shard(damaged, 4, first, manifest.plan)
    plain = json.loads((damaged / MANIFEST).read_text())
    plain["shards"]["4"] = digest
    (damaged / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(ConfigInvalid, match="does not hold what its manifest says"):
        Harvest(damaged).load("mean")


CHANGES = {
    "layers": {"layers": (0, 2)},
    "poolings": {"poolings": ("mean",)},
    "dtype": {"dtype": "float16"},
    "max_text_tokens": {"max_text_tokens": 100},
    "reader": {"reader": "vllm --quantization fp8"},
    "shard_rows": {"shard_rows": 6},
    "rows_sha256": {"samples": [*SAMPLES[1:], SAMPLES[0]]},
    "sources, rows, rows_sha256": {"samples": [*SAMPLES, CHAT]},
}


@pytest.mark.parametrize("differs", CHANGES)
def test_another_plan_does_not_touch_the_folder(tiny, whole, differs):
    before = contents(whole)
    with pytest.raises(ConfigInvalid, match=rf"another harvest \({differs} differ\)"):
        run(tiny, whole, **CHANGES[differs])
    assert contents(whole) == before


def test_features_of_two_readers_are_not_merged(tiny):
    kinds = [make_plan(tiny, SAMPLES, LAYERS, reader=r).origin("mean") for r in ("embedded", "vllm")]
    one, other = (Statistics(tiny.d_model, kind) for kind in kinds)
    with pytest.raises(ProbeMismatch, match="reader is 'embedded' and 'vllm'"):
        one.merge(other)


def test_a_manifest_that_names_no_reader_is_read_but_not_gone_on_with(tiny, damaged):
    plain = json.loads((damaged / MANIFEST).read_text())
    del plain["plan"]["reader"]
    (damaged / MANIFEST).write_text(json.dumps(plain))
    assert len(Harvest(damaged).load("mean")[1]) == 23
    with pytest.raises(ConfigInvalid, match=r"another harvest \(reader differ\)"):
        run(tiny, damaged)


def test_another_label_is_another_plan_but_the_same_hash(tiny, whole):
    relabelled = [Sample(SAMPLES[0].messages, 1, SAMPLES[0].source), *SAMPLES[1:]]
    assert relabelled[0].sha256 == SAMPLES[0].sha256
    with pytest.raises(ConfigInvalid, match="rows_sha256 differ"):
        run(tiny, whole, relabelled)


def test_another_model_does_not_go_on_with_the_shards_of_this_one(tiny, tiny_folder, whole, tmp_path):
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    other = load_model(str(tmp_path), cache=cache_dir())
    with pytest.raises(ConfigInvalid, match="fingerprint"):
        run(other, whole)


def test_a_damaged_manifest_is_refused(tiny, damaged):
    (damaged / MANIFEST).write_text("{")
    with pytest.raises(ConfigInvalid, match="remove the folder and harvest again"):
        run(tiny, damaged)
    (damaged / MANIFEST).unlink()
    with pytest.raises(ConfigInvalid, match="holds no harvest"):
        Harvest(damaged)
