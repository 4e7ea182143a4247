"""Verdicts without a server: `midstream score`, the lens and a notebook judge by the policy's second judge too."""

import json

import pytest
import torch

import monitor
from monitor.cli.lens import _verdicts
from monitor.config import load_settings
from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.live import load_live
from monitor.probe import ProbeWeights
from monitor.scoring import score_text
from probes_store.store import Store

from .conftest import LAYER, calibrated, publish
from .test_notebook import generate


@pytest.fixture
def policed(tiny, tiny_folder, tmp_path):
    """Settings of a policy whose probe `doubt` is unsure of every prompt, and `judge` gives each token a logit."""

    def settings(second, says=0.0, on="prompt"):
        path = tmp_path / "policy.yaml"
        unsure = {"mode": "block", "threshold": 2.0, "escalate": 0.0}
        path.write_text(json.dumps({"probes": {"doubt": {on: unsure}}, "second": second}))
        flat = {LAYER: torch.zeros(tiny.d_model)}
        probes = [ProbeWeights("doubt", flat, 1.0), ProbeWeights("judge", flat, says)]
        published = [(p, {"calibration": calibrated(50.0)}) for p in probes]
        publish(tiny, published, tmp_path / "store")
        return load_settings(store=tmp_path / "store", model=str(tiny_folder), policy=path)

    return settings


def verdicts(tiny, settings):
    """Of a prompt: by score, by the lens, by a notebook."""
    (scored,) = [row.verdict for row in score_text(settings, "hello").rows if row.probe == "doubt"]
    live = load_live(tiny.served(), Store(settings.store), settings)
    prompt = tiny.template.encode([{"role": "user", "content": "hello"}])
    ((_, streams),) = residual_streams(tiny, [prompt], live.bank.layers)

    class Lens:
        scores = score_streams(live.bank, streams)

    (lens,) = [line.rpartition(" ")[2] for line in _verdicts(live, prompt, Lens) if line.startswith("doubt")]
    with monitor.watch(tiny.module, tiny.tokenizer, settings=settings) as w:
        generate(tiny, ["hello"], max_new_tokens=3)
    return scored, lens, w.records[0]


@pytest.mark.parametrize(("says", "verdict"), [(9.0, "block"), (-9.0, "allow")])
def test_another_probe_answers_as_on_a_server(tiny, policed, says, verdict):
    scored, lens, record = verdicts(tiny, policed({"probes": ["judge"]}, says))
    assert (scored, lens, record.verdict) == (verdict, verdict, verdict)
    assert record.escalations[0].second == says


def test_a_judge_at_a_url_is_not_asked_and_its_question_stays_open(tiny, policed):
    scored, lens, record = verdicts(tiny, policed({"url": "http://127.0.0.1:9/v1", "model": "m"}))
    assert (scored, lens) == ("escalate (second.url is not asked here)", "escalate")
    assert (record.verdict, record.finish, record.escalations) == ("escalate", "stop", ())


def test_however_long_an_answer_goes_on_its_question_stays_open(tiny, policed):
    settings = policed({"url": "http://127.0.0.1:9/v1", "model": "m", "max_held": 1}, on="response")
    with monitor.watch(tiny.module, tiny.tokenizer, settings=settings) as w:
        generate(tiny, ["hello"], max_new_tokens=8)
    assert w.verdicts == ["escalate"] and w.records[0].coverage.unmonitored == 0
