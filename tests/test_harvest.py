"""Harvest: features are those of plain transformers, what can't be one is refused, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from monitor.cli.harvest import Engine, Pool, blocks, reader_name
from monitor.cli.harvest import harvest as command
from monitor.engines.embedded.harvest import residual_streams
from monitor.errors import ConfigInvalid, MidstreamError
from training.data import Row
from training.harvest import Sample, make_plan, unfinished
from training.shards import Harvest, read_manifest
from training.statistics import Statistics
from training.texts import Reader

from .samples import CHAT, LAYERS, SAMPLES, TEXTS, run


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


def test_a_long_text_is_cut_and_a_long_conversation_refused(tiny, tmp_path):
    text = "word " * 300
    cut = run(tiny, tmp_path / "cut", [Sample.of(Row(text, 0, "a", ""))], max_text_tokens=20)
    short = run(tiny, tmp_path / "short", [Sample.of(Row(text[:20], 0, "a", ""))])
    assert cut.load("mean")[0] == pytest.approx(short.load("mean")[0], abs=1e-6)
    chat = Sample(tuple(("user" if i % 2 == 0 else "assistant", text) for i in range(5)), 0, "a")
    with pytest.raises(ConfigInvalid, match="tiny-llama reads 1024"):
        run(tiny, tmp_path / "long", [chat])


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


# --- the command ------------------------------------------------------------------------------------------------------


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


def test_a_reader_is_named_by_engine_and_arguments_in_any_order():
    one = reader_name(Engine.vllm, ["--quantization", "fp8", "--enforce-eager", "--max-num-seqs=4"])
    assert one == reader_name(Engine.vllm, ["--max-num-seqs", "4", "--quantization=fp8", "--enforce-eager"])
    assert one == "vllm --enforce-eager --max-num-seqs 4 --quantization fp8"
    assert len({reader_name(Engine.embedded), reader_name(Engine.vllm), one}) == 3
    assert reader_name(Engine.vllm, ["--a", "x", "--b", "y"]) != reader_name(Engine.vllm, ["--a", "y", "--b", "x"])
