"""Harvest to shards: right features, a killed run that goes on, and no shard that is damaged or of another plan."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from monitor.cli.harvest import Engine, Pool, blocks, reader_name
from monitor.cli.harvest import harvest as command
from monitor.config import cache_dir
from monitor.engines.embedded.harvest import residual_streams
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid, MidstreamError, ProbeMismatch
from probes_store.moments import Moments
from training.data import Row
from training.families import lda
from training.harvest import Sample, harvest, make_plan, statistics_of, unfinished
from training.shards import MANIFEST, Harvest, read_manifest, shard_path, write_shard
from training.statistics import Statistics
from training.texts import Reader

LAYERS = (0, 2, 3)
TEXTS = [f"{'red green blue ' * (i % 5)}{i}" for i in range(23)]
SAMPLES = [Sample.of(Row(text, i % 2, "abc"[i % 3], str(i))) for i, text in enumerate(TEXTS)]
CHAT = Sample((("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "What is 2 + 2?")), 0, "chat")


ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    pass


def run(model, folder, samples=SAMPLES, progress=lambda n: None, **changes):
    fields = {"layers": LAYERS, "poolings": ("mean", "last"), "shard_rows": 5} | changes
    return harvest(model, samples, folder, make_plan(model, samples, **fields), progress)


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


def reference(model, sample):
    """(n_layers, d) by plain transformers: the mean over the newest turn's counted positions, and the last one."""
    prompt = model.template.encode([{"role": role, "content": text} for role, text in sample.messages])
    turn = prompt.turns[-1]
    model.module.set_attn_implementation("sdpa")
    with torch.inference_mode():
        found = model.module(torch.tensor([prompt.token_ids]), output_hidden_states=True).hidden_states
    # The last entry is after the final norm, which is not the residual stream.
    rows = torch.stack([found[layer + 1][0, turn.start : turn.end] for layer in LAYERS[:2]])
    return rows.mean(1).numpy(), rows[:, -1].numpy(), turn.end - turn.start


# --- what is in them ------------------------------------------------------------------------------------------------


def test_features_are_those_of_plain_transformers(tiny, tmp_path):
    samples = [*SAMPLES, CHAT]
    made = run(tiny, tmp_path, samples)
    mean, labels = made.load("mean")
    last, _ = made.load("last", LAYERS[:2])
    assert mean.shape == (24, 3, tiny.d_model) and mean.dtype == np.float32 and last.shape == (24, 2, tiny.d_model)
    assert labels.tolist() == [s.label for s in samples]
    counted = np.concatenate([shard.counted for shard in made.shards()])
    for i, sample in enumerate(samples):
        wanted_mean, wanted_last, n = reference(tiny, sample)
        assert mean[i, :2] == pytest.approx(wanted_mean, abs=1e-4)
        assert last[i] == pytest.approx(wanted_last, abs=1e-4)
        assert counted[i] == n


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


def test_a_long_text_is_cut_and_a_long_conversation_refused(tiny, tmp_path):
    text = "word " * 300
    cut = run(tiny, tmp_path / "cut", [Sample.of(Row(text, 0, "a", ""))], max_text_tokens=20)
    short = run(tiny, tmp_path / "short", [Sample.of(Row(text[:20], 0, "a", ""))])
    assert cut.load("mean")[0] == pytest.approx(short.load("mean")[0], abs=1e-6)
    chat = Sample(tuple(("user" if i % 2 == 0 else "assistant", text) for i in range(5)), 0, "a")
    with pytest.raises(ConfigInvalid, match="tiny-llama reads 1024"):
        run(tiny, tmp_path / "long", [chat])


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


# --- killed and continued -------------------------------------------------------------------------------------------


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


# --- damage and other plans -----------------------------------------------------------------------------------------


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


def test_a_reader_is_named_by_engine_and_arguments_in_any_order():
    one = reader_name(Engine.vllm, ["--quantization", "fp8", "--enforce-eager", "--max-num-seqs=4"])
    assert one == reader_name(Engine.vllm, ["--max-num-seqs", "4", "--quantization=fp8", "--enforce-eager"])
    assert one == "vllm --enforce-eager --max-num-seqs 4 --quantization fp8"
    assert len({reader_name(Engine.embedded), reader_name(Engine.vllm), one}) == 3
    assert reader_name(Engine.vllm, ["--a", "x", "--b", "y"]) != reader_name(Engine.vllm, ["--a", "y", "--b", "x"])


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


def test_what_was_not_harvested_is_named(whole):
    made = Harvest(whole)
    for pooling, layers in (("mean", (1,)), ("max", None)):
        with pytest.raises(ConfigInvalid, match=r"holds last, mean of layers 0, 2, 3"):
            made.load(pooling, layers)


def test_nothing_to_harvest_is_refused(tiny):
    for samples, layers, poolings in (([], (0,), ("mean",)), (SAMPLES, (), ("mean",)), (SAMPLES, (0,), ())):
        with pytest.raises(ConfigInvalid, match="at least one row, one layer and one pooling"):
            make_plan(tiny, samples, layers, poolings)
    with pytest.raises(ConfigInvalid, match="layer 4 does not exist: the model has blocks 0 to 3"):
        make_plan(tiny, SAMPLES, (0, 4))


@pytest.fixture
def loud(tiny):
    """The tiny model with one weight that blows the stream up to `size`."""
    weight = tiny.module.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()

    def to(size):
        weight.data[5] = size
        return tiny

    yield to
    weight.data.copy_(before)


def test_a_feature_too_large_for_float16_is_refused(loud, tmp_path):
    with pytest.raises(ConfigInvalid, match="harvest in float32"):
        run(loud(1e9), tmp_path / "half", dtype="float16")
    assert np.abs(run(loud(1e9), tmp_path / "single").load("mean")[0]).max() > 65_504


def test_a_feature_that_is_not_finite_names_its_row(loud, tmp_path):
    with pytest.raises(MidstreamError, match=f"row {SAMPLES[0].sha256[:16]} is not finite"):
        run(loud(float("nan")), tmp_path)
    assert list(tmp_path.glob("shard*")) == []
    assert unfinished(tmp_path, read_manifest(tmp_path).plan) == [0, 1, 2, 3, 4]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_harvests_and_goes_on(tiny_folder, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(TEXTS)))

    def told():
        command(
            [str(data)],
            tmp_path / "out",
            layers="1,3",
            pooling=[Pool.last],
            half=True,
            statistics=True,
            model=str(tiny_folder),
            as_json=True,
            context=SimpleNamespace(args=[]),
        )
        return json.loads(capsys.readouterr().out)

    first, again = told(), told()
    assert (first["rows"], first["harvested"], first["layers"], first["poolings"]) == (23, 23, [1, 3], ["last"])
    assert again == first | {"harvested": 0}
    features, labels = Harvest(tmp_path / "out").load("last")
    assert features.shape == (23, 2, 64) and features.dtype == np.float16 and labels.sum() == 11
    statistics = Statistics.load(tmp_path / "out" / "statistics-last.safetensors")
    assert statistics.pooled(3, 1).n == 11 and statistics.sources == ["rows"]


def test_labels_of_answers_are_harvested_at_the_answers(tiny, tiny_folder, tmp_path, capsys):
    """As `midstream train` reads them; without --answers a row's text is what its label is about."""
    rows = [{"text": "tell me of the sea", "response": r, "label": i} for i, r in enumerate(("no", "the sea is wide"))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = {}
    for answers in (True, False):
        out = tmp_path / str(answers)
        asked = {"layers": "1", "pooling": None, "model": str(tiny_folder), "as_json": True}
        command([str(data)], out, answers=answers, context=SimpleNamespace(args=[]), **asked)
        found[answers] = Harvest(out).load("mean")[0][:, 0]
    capsys.readouterr()
    reader = Reader(tiny, 512)
    prompts = [reader.labelled(Row(r["text"], r["label"], "s", "g", answer=r["response"])) for r in rows]
    for index, streams in residual_streams(tiny, prompts, [1]):
        turn = prompts[index].turns[-1]
        assert np.abs(found[True][index] - streams[1][turn.start : turn.end].mean(0).numpy()).max() < 1e-5
    assert np.abs(found[False][0] - found[False][1]).max() == 0, "one text, twice"
    with pytest.raises(ConfigInvalid, match="1 of 2 rows have no `response`"):
        data.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"text": "x", "label": 1}))
        command([str(data)], tmp_path / "c", answers=True, context=SimpleNamespace(args=[]), **asked)


@pytest.mark.parametrize(
    ("text", "found"),
    [("middle", [15]), ("all", list(range(30))), ("5", [5]), ("12-14, 3,13", [3, 12, 13, 14]), ("29", [29])],
)
def test_blocks(text, found):
    assert blocks(text, 30) == found


@pytest.mark.parametrize("text", ["", "30", "5-3", "1-30", "-1", "a", "1,", "1.5", "²"])
def test_blocks_that_are_none(text):
    with pytest.raises(ConfigInvalid, match="the model has blocks 0 to 29"):
        blocks(text, 30)
