"""The wheel is whole: built, installed away from the checkout, it has its probes, its pairs and its command."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("midstream-*.whl")
    return built


def test_it_holds_the_shipped_probes_and_pairs_and_nothing_else_of_ours(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    intents = [f"harmful-intent/v{version}" for version in (1, 2, 3)]
    for probe in (*intents, "harmful-answer/v1", "caps/v1", "html/v1"):
        held = {n.rsplit("/", 1)[-1] for n in names if f"/{probe}/" in n}
        assert {"probe.safetensors", "card.json"} <= held, probe
    ours = {f"training/{name}.jsonl" for name in ("pairs", "lookalikes", "twins", "contrasts", "answers")}
    assert ours | {"training/recipes/harmful-intent.yaml", "monitor/py.typed"} <= set(names)
    console = Path(ROOT / "monitor/api/admin/console")
    assert {f"monitor/api/admin/console/{file.name}" for file in console.iterdir() if file.is_file()} <= set(names)
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"monitor", "training", "probes_store"}


def test_installed_elsewhere_it_finds_its_probe(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MIDSTREAM_")}
    environment |= {"PYTHONPATH": str(target), "XDG_STATE_HOME": str(tmp_path), "COLUMNS": "160"}
    where = "import monitor, probes_store; print(monitor.__file__, probes_store.__file__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", where], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert found.stdout.count(str(target)) == 2
    listed = subprocess.run(
        [sys.executable, "-P", "-m", "monitor.cli", "probes"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert "harmful-intent" in listed.stdout and "shipped" in listed.stdout, listed.stderr
