"""The command as an operator meets it: every mistake is one line with its remedy, exit code 2, no traceback."""

import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from monitor.cli import main
from monitor.probe import ProbeWeights

from .conftest import LAYER, calibrated, publish


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*arguments) -> (exit code, stdout, stderr less progress bars), in this process."""

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        lines = [x for x in err.replace("\r", "\n").splitlines() if x.strip() and not re.search(r"(it/s|s/it)\]", x)]
        return caught.value.code, out, lines

    return go


@pytest.fixture
def published(tiny, random_probe, tmp_path):
    store = tmp_path / "store"
    publish(tiny, [(random_probe, {"calibration": calibrated(5.0)})], store)
    return store


def refused(result, *says):
    code, out, lines = result
    text = " ".join(lines)
    assert code == 2 and "Traceback" not in text and out == ""
    assert len(lines) == 1 and text.startswith("midstream: "), lines
    for part in says:
        assert part in text


def test_a_model_without_probes(run, tiny_folder, tmp_path):
    result = run("serve", "--model", tiny_folder, "--store", tmp_path / "none", "--port", 0)
    refused(result, "there is no probe for model 'tiny-llama'", "midstream train --model")


def test_a_flipped_byte(run, tiny_folder, published):
    path = published / "tiny-llama" / "random" / "v1" / "probe.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(
        run("serve", "--model", tiny_folder, "--store", published, "--port", 0), "sha256", "publish the probe again"
    )


def card_of(published, **changes):
    path = published / "tiny-llama" / "random" / "v1" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_wrong_layer(run, tiny, tiny_folder, tmp_path):
    probe = ProbeWeights("random", {LAYER: torch.ones(tiny.d_model)}, 0.0)
    publish(tiny, [(probe, {})], tmp_path)
    card = json.loads((tmp_path / "tiny-llama/random/v1/card.json").read_text())
    from safetensors.torch import load, save

    folder = tmp_path / "tiny-llama/random/v1"
    tensors = load((folder / "probe.safetensors").read_bytes())
    data = save({"weight.9": tensors[f"weight.{LAYER}"], "bias": tensors["bias"]})
    (folder / "probe.safetensors").write_bytes(data)
    import hashlib

    (folder / "card.json").write_text(json.dumps(card | {"layers": [9], "sha256": hashlib.sha256(data).hexdigest()}))
    result = run("serve", "--model", tiny_folder, "--store", tmp_path, "--port", 0)
    refused(result, "reads layer 9, the model has layers 0 to 3")


def test_a_neighbouring_layer_is_found_by_the_canaries(run, tiny_folder, published):
    folder = published / "tiny-llama/random/v1"
    from safetensors.torch import load, save

    tensors = load((folder / "probe.safetensors").read_bytes())
    data = save({"weight.1": tensors[f"weight.{LAYER}"], "bias": tensors["bias"]})
    (folder / "probe.safetensors").write_bytes(data)
    import hashlib

    card_of(published, layers=[1], sha256=hashlib.sha256(data).hexdigest())
    refused(run("serve", "--model", tiny_folder, "--store", published, "--port", 0), "canary", "is off by")


def test_another_model_of_the_same_name(run, published, tiny_folder):
    card = json.loads((published / "tiny-llama/random/v1/card.json").read_text())
    card_of(published, model=card["model"] | {"fingerprint": "files-sha256:" + "0" * 64})
    result = run("serve", "--model", tiny_folder, "--store", published, "--port", 0)
    refused(result, "was trained with model 'files-sha256:0", "midstream train")


def test_a_changed_chat_template(run, tiny_folder, published, tmp_path):
    folder = tmp_path / "changed" / "tiny-llama"
    shutil.copytree(tiny_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ 'Be nice. ' }}" + template.read_text())
    result = run("serve", "--model", folder, "--store", published, "--port", 0)
    refused(result, "chat template")


def test_a_taken_port(run, tiny_folder, published):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--model", tiny_folder, "--store", published, "--port", port)
    refused(result, f"can't listen on 127.0.0.1:{port}", "choose another --port")


def test_missing_files(run, tmp_path, tiny_folder):
    refused(run("serve", "--model", tmp_path / "nowhere", "--port", 0), "nowhere", "name a model folder or a hub id")
    refused(run("serve", "--config", tmp_path / "no.yaml"), "no.yaml", "can't be read")
    refused(run("train", "--model", tiny_folder, "--data", tmp_path / "no.jsonl"), "no.jsonl", "can't be read")
    refused(run("show", "abc"), "there are no records", "MIDSTREAM_RECORDS")


def test_bad_settings(run, monkeypatch, tmp_path):
    refused(run("serve", "--port", 99999), "'port' has value 99999")
    refused(run("serve", "--mode", "harmful-intent=off"), "must be PROBE.PHASE=MODE")
    refused(run("serve", "--target-fpr", 7), "'target_fpr' has value 7")
    monkeypatch.setenv("MIDSTREAM_PROT", "1")
    refused(run("serve"), "MIDSTREAM_PROT is not a setting")


def test_a_mode_that_cannot_be_certified(run, tiny, tiny_folder, random_probe, tmp_path):
    publish(tiny, [(random_probe, {})], tmp_path)
    result = run("serve", "--model", tiny_folder, "--store", tmp_path, "--port", 0, "--mode", "random.prompt=block")
    refused(result, "can't block in phase prompt", "set its mode there to shadow")


def test_score_prints_values_and_tokens(run, tiny_folder, published):
    code, out, _ = run("score", "hello", "--model", tiny_folder, "--store", published, "--json")
    scored = json.loads(out)
    row = scored["rows"][0]
    counted = [s for s in row["token_scores"] if s is not None]
    assert code == 0 and row["probe"] == "random"
    assert row["value"] == pytest.approx(max(counted), abs=1e-5)
    assert len(scored["tokens"]) == len(row["token_scores"])
    code, out, _ = run("score", "hello", "--model", tiny_folder, "--store", published, "--tokens")
    assert code == 0 and "random: " in out and "h[" in out


def test_the_installed_command_itself(tmp_path):
    """Once as a process: no traceback, exit code 2."""
    result = subprocess.run(
        [sys.executable, "-m", "monitor.cli", "show", "abc"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", "XDG_STATE_HOME": str(tmp_path)},
        cwd="/",
    )
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("midstream: there are no records")
