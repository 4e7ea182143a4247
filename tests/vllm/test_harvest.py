"""`midstream harvest --engine vllm`: the same plan, the same shards, the same numbers as the embedded engine's."""

import json
import os
from types import SimpleNamespace

import numpy as np

from monitor.cli.harvest import Engine, Pool, need_vllm
from monitor.cli.harvest import harvest as command
from training.shards import Harvest, read_manifest

from .conftest import EAGER
from .test_engine import CHUNKED

TEXTS = [f"{'red green blue ' * (i % 9)}{i}" for i in range(24)]
LAYERS = "1,3"


def test_the_environment_is_settled_before_vllm_is_imported(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    need_vllm()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_both_engines_make_the_same_shards(tiny, tmp_path, capsys):
    data, out = tmp_path / "rows.jsonl", {}
    data.write_text("".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(TEXTS)))
    folder = str(tiny.module.config.name_or_path)
    for engine in Engine:
        extra = [*EAGER, *CHUNKED] if engine is Engine.vllm else []
        where = tmp_path / engine
        wanted = {"layers": LAYERS, "pooling": [Pool.mean, Pool.last], "model": folder, "as_json": True}
        settings = tmp_path / "settings.yaml"
        settings.write_text("dtype: float32\n")
        command([str(data)], where, **wanted, config=settings, engine=engine, context=SimpleNamespace(args=extra))
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["harvested"] == len(TEXTS)
        out[engine] = where
    plans = [read_manifest(where).plan for where in out.values()]
    assert plans[0].reader != plans[1].reader, "neither goes on with the other's shards"
    assert plans[0].model_copy(update={"reader": plans[1].reader}) == plans[1]

    for pooling in ("mean", "last"):
        (one, labels), (other, same) = (Harvest(where).load(pooling) for where in out.values())
        assert np.array_equal(labels, same) and one.shape == (len(TEXTS), 2, tiny.d_model)
        off = float(np.abs(one - other).max())
        print(f"{pooling}: largest difference {off:.2g} of {float(np.abs(one).max()):.2g}")
        assert off <= 1e-4
