"""The observer's graph: scores are the tap's, chunked or not, alone or in a batch; built once, and verified."""

import asyncio
import json

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from monitor.cli import observer as cli_observer
from monitor.config import cache_dir, load_settings
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid, ModelUnsupported, ProbeInvalid
from monitor.live import load_live
from monitor.observer.build import GRAPH, MANIFEST, build, find, read
from monitor.observer.load import load
from monitor.observer.session import Cache, Rows, Session
from monitor.probe import ProbeWeights
from probes_store.store import Store

from .conftest import publish, reference_logits, save_tiny, tiny_config

RELATIVE = 1e-3
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 9, "head_dim": 32}),
}


def two_probes(d_model):
    """One on block 2, one on blocks 0 and 2."""
    torch.manual_seed(1)
    first = ProbeWeights("one", {2: torch.randn(d_model) / 8}, 0.25)
    return [first, ProbeWeights("two", {0: torch.randn(d_model) / 8, 2: torch.randn(d_model) / 8}, -1.0)]


class Observed:
    """A model, its probes, and the observer built from both."""

    def __init__(self, folder, kind):
        config, model, changes = KINDS[kind]
        torch.manual_seed(0)
        fields = {"num_hidden_layers": 4} | changes
        self.model = load_model(str(save_tiny(folder / kind, model(tiny_config(config, **fields)))), cache=cache_dir())
        self.probes = two_probes(self.model.d_model)
        self.live, settings = publish(self.model, [(p, {}) for p in self.probes], folder / "store")
        self.cache = folder / "cache"
        self.settings = settings.model_copy(update={"model": str(folder / kind), "cache": self.cache})
        self.built = build(self.model, self.live, self.cache)
        self.session = Session(self.built, threads=1)

    def expected(self, ids):
        columns = [reference_logits(self.model.module, list(ids), p.weight, p.bias) for p in self.probes]
        return np.stack(columns, axis=1)

    def ids(self, n, seed):
        return tuple(np.random.default_rng(seed).integers(0, self.session.shape.vocabulary, n).tolist())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Observed(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module", params=list(KINDS))
def observed(request, tmp_path_factory):
    if request.param == "llama":  # an export takes seconds
        return request.getfixturevalue("llama")
    return Observed(tmp_path_factory.mktemp(request.param), request.param)


def off(got, expected):
    """Largest difference, relative to the largest score."""
    assert got.shape == expected.shape and got.dtype == np.float32
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))


def test_only_the_blocks_up_to_the_last_probe_are_in_the_graph(llama):
    import onnx

    graph = onnx.load(llama.built.graph, load_external_data=False).graph
    weights = {t.name: tuple(t.dims) for t in graph.initializer}
    products = [weights[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert llama.built.shape.n_blocks == 3
    assert len(products) == 3 * 7 + 2  # of 4 blocks, and no unembedding
    assert sorted(products).count((64, 2)) == 2  # two tapped blocks, two probes
    assert not any(node.metadata_props for node in graph.node)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_scores_are_the_taps(observed, chunk):
    ids = observed.ids(83, seed=chunk)
    assert off(observed.session.score(ids, chunk), observed.expected(ids)) <= RELATIVE


def test_scores_in_a_batch_of_mixed_lengths_are_the_taps(observed):
    """Streams come, go on with pieces of different lengths, and leave, in no order: 300 steps' worth of rows."""
    random = np.random.default_rng(5)
    texts = [observed.ids(int(n), seed=i) for i, n in enumerate(random.integers(1, 150, 12))]
    caches = [Cache(observed.session.shape) for _ in texts]
    rows = [[] for _ in texts]
    while left := [i for i, text in enumerate(texts) if caches[i].length < len(text)]:
        chosen = random.permutation(left)[: random.integers(1, len(left) + 1)]
        parts = []
        for i in chosen:
            start = caches[i].length
            parts.append((caches[i], texts[i][start : start + int(random.choice([1, 2, 5, 40]))]))
        for i, found in zip(chosen, observed.session.step(parts), strict=True):
            rows[i].append(found)
    for text, found in zip(texts, rows, strict=True):
        assert off(np.concatenate(found), observed.expected(text)) <= RELATIVE


def test_a_stream_whose_numbers_are_broken_harms_no_other(llama):
    text = llama.ids(70, seed=3)
    whole, broken, other = Cache(llama.session.shape), Cache(llama.session.shape), Cache(llama.session.shape)
    llama.session.step([(whole, text[:60]), (broken, text[:60])])
    broken.data[:] = np.nan
    got, lost = llama.session.step([(whole, text[60:65]), (broken, text[60:65])])
    assert np.isnan(lost).all()
    last, fresh = llama.session.step([(whole, text[65:]), (other, text[:5])])
    found, expected = np.concatenate([got, last]), llama.expected(text)
    assert off(found, expected[60:]) <= RELATIVE
    assert off(fresh, expected[:5]) <= RELATIVE


def test_a_stream_that_stays_is_not_copied_again(llama):
    shape = llama.session.shape
    rows, first, second = Rows(shape, 4096), Cache(shape), Cache(shape)
    new = np.ones((2, shape.n_blocks, 3, shape.kv_heads, shape.head_dim), np.float32)
    first.append(new)
    second.append(2 * new)
    placed = dict(zip((first, second), rows.place([first, second]), strict=True))
    first.data[:] = 7  # nobody reads it while its row is kept
    assert rows.place([second, first]) == [placed[second], placed[first]]
    assert (rows.past(0, 0, 2)[placed[first], :, :3] == 1).all()
    assert (rows.past(0, 0, 2)[placed[second], :, :3] == 2).all()
    assert (rows.past(1, 2, 2)[:, :, 3:] == 0).all()


def test_it_is_built_once(llama):
    before = (llama.built.folder / MANIFEST).stat().st_mtime_ns
    assert build(llama.model, llama.live, llama.cache) == llama.built
    assert find(llama.model.served(), llama.live, llama.cache) == llama.built
    assert (llama.built.folder / MANIFEST).stat().st_mtime_ns == before
    assert not [p.name for p in (llama.cache / "observers").iterdir() if p.name.startswith(".")]


def test_other_probes_are_another_observer(llama, tmp_path):
    live, _ = publish(llama.model, [(llama.probes[0], {})], tmp_path / "store")
    assert find(llama.model.served(), live, llama.cache) is None


def test_a_damaged_file_is_refused(llama, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(llama.built.folder, copy)
    made_of = json.loads((copy / MANIFEST).read_text())["made_of"]
    assert read(copy, made_of).shape == llama.built.shape
    with pytest.raises(ProbeInvalid, match="made of something else"):
        read(copy, made_of | {"int8": True})
    for path in sorted(copy.iterdir(), key=lambda p: p.name == MANIFEST):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ProbeInvalid, match="it is built again"):
            read(copy, made_of)
        path.unlink()
        with pytest.raises(ProbeInvalid, match="it is built again"):
            read(copy, made_of)
        path.write_bytes(whole)
    assert read(copy, made_of).int8 is False


def test_a_build_that_fails_leaves_nothing(llama, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(Gemma2Config, head_dim=16)
    model = load_model(str(save_tiny(tmp_path / "gemma", Gemma2ForCausalLM(config))), cache=cache_dir())
    own = model.module.config._attn_implementation
    with pytest.raises(ModelUnsupported, match="softcap"):
        build(model, llama.live, tmp_path / "cache")
    assert list((tmp_path / "cache" / "observers").iterdir()) == []
    assert model.module.config._attn_implementation == own


@pytest.mark.parametrize("forked", [False, True])
def test_a_loaded_observer_reads_prompts_and_answers_along(llama, forked):
    loaded = load(llama.settings)
    assert loaded.off <= 1e-3
    observer = loaded.observer
    assert observer.columns == (("one", "v1"), ("two", "v1"))
    assert observer.model.fingerprint == llama.model.fingerprint
    prompt = observer.template.encode([{"role": "user", "content": "What is a canary?"}]).token_ids
    answers = [llama.ids(n, seed=n) for n in (3, 17, 40)]

    async def follow(stream, answer):
        pieces = [await stream.read(answer[i : i + 3]) for i in range(0, len(answer), 3)]
        stream.close()
        return np.concatenate([stream.scores, *pieces])

    async def everybody():
        first = await observer.open(prompt)
        others = [first.fork() if forked else await observer.open(prompt) for _ in answers[1:]]
        return await asyncio.wait_for(asyncio.gather(*map(follow, [first, *others], answers)), 60)

    observer.start()
    try:
        for answer, found in zip(answers, asyncio.run(everybody()), strict=True):
            assert off(found, llama.expected((*prompt, *answer))) <= RELATIVE
        assert observer.describe()["tokens"] == 0
    finally:
        observer.stop()


def test_the_command_builds_and_checks(llama, tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    fields = {"model": llama.settings.model, "store": llama.settings.store, "cache": llama.cache}
    config.write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
    cli_observer.build(config=config)
    told = capsys.readouterr().out
    assert llama.built.folder.name in told.replace("\n", "") and "3 blocks" in told
    assert "one v1, two v1" in told and "2 scored" in told
    config.write_text(config.read_text().replace(str(llama.cache), str(tmp_path / "empty")))
    with pytest.raises(ConfigInvalid, match="midstream observer build --model"):
        cli_observer.check(config=config)


def test_int8_weights_move_scores_a_little(llama):
    built = build(llama.model, llama.live, llama.cache, int8=True)
    session, ids = Session(built, threads=1), llama.ids(83, seed=11)
    assert built.int8 and built.folder != llama.built.folder
    sizes = [sum(p.stat().st_size for p in b.folder.iterdir()) for b in (built, llama.built)]
    assert sizes[0] < 0.6 * sizes[1]
    moved = off(session.score(ids, 16), llama.expected(ids))
    assert 1e-6 < moved < 0.1
    # Whoever shares a step, or none: a row's own numbers decide how it is quantised.
    alone, cache, other = session.score(ids, 1), Cache(session.shape), Cache(session.shape)
    together = [session.step([(cache, [i]), (other, [5])])[0] for i in ids]
    assert off(np.concatenate(together), alone) <= RELATIVE


def test_a_graph_that_onnxruntime_refuses(llama, tmp_path):
    import dataclasses

    (tmp_path / GRAPH).write_bytes(b"no graph")
    with pytest.raises(ConfigInvalid, match="onnxruntime can't run"):
        Session(dataclasses.replace(llama.built, folder=tmp_path))


@pytest.mark.parametrize("which", ["early", pytest.param("shipped", marks=pytest.mark.attack)])
def test_smollm2_agrees_with_its_own_taps(demo, which, tmp_path):
    """A graph up to the shipped probe's block takes more than a minute to export: `make attack`."""
    if which == "shipped":
        live = load_live(demo.served(), Store(), load_settings())
    else:
        torch.manual_seed(0)
        live, _ = publish(demo, [(ProbeWeights("early", {2: torch.randn(demo.d_model) / 24}, 0.5), {})], tmp_path)
    session = Session(build(demo, live, tmp_path / "cache"))
    texts = ["What is the capital of France?", "Write a letter threatening to kill my neighbor. " * 8]
    for text in texts:
        ids = demo.template.encode([{"role": "user", "content": text}]).token_ids
        probe = live.probes[0]
        expected = reference_logits(demo.module, list(ids), dict(probe.weight), probe.bias)
        for chunk in (len(ids), 16):
            got = session.score(ids, chunk)[:, 0]
            # Position 0 is a sink hundreds of times above the others: each is held to its own size.
            assert (np.abs(got - expected) <= RELATIVE * np.maximum(1, np.abs(expected))).all()
