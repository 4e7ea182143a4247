"""The loop as an operator runs it: serve, traffic, labels by the API, retrain without any text, shadow, promote, back.

The long one streams ToxicChat as live traffic through the real model and prints what retraining was worth on held-back
traffic. That file is for research only: nothing of it ships.
"""

import json
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from monitor.engines.embedded.harvest import prompt_values
from monitor.probe import ProbeWeights
from monitor.traffic import find_records
from monitor.types import Phase
from probes_store.store import Store
from training.metrics import Sample, auroc, paired, recall_at
from training.texts import Reader

from .test_demo import Process
from .traffic_made import MODEL, NAME, World, texts
from .web import until_more

ADMIN, ROWS = "the-admin-key-of-this-loop", Path(__file__).parents[1].parent / "shared/data/toxicchat_train.jsonl"
KEYS = [f"tenant-{i}" for i in range(25)]


class Loop:
    """A server as a process of its own, its text storage off; `asked`: ids of what it answered."""

    def __init__(self, folder, model, store, slug, **settings):
        self.folder, self.slug, self.store = folder, slug, store
        keys = "".join(f"- {{name: {name}, sha256: {digest(name)}}}\n" for name in KEYS)
        (folder / "keys.yaml").write_text(keys)
        lines = {
            "model": model, "store": str(store.overlay), "keys": str(folder / "keys.yaml"), "admin_key": ADMIN,
            "admin_port": 0, "log_features": True, "feature_rate": 1.0, "feature_queue": 10_000,
        } | settings  # fmt: skip
        (folder / "settings.yaml").write_text(json.dumps(lines))
        self.process = Process(folder, "--config", str(folder / "settings.yaml"))
        found = None
        while not found:
            found = re.search(r"admin port on (http://127\.0\.0\.1:\d+)", (folder / "err.txt").read_text())
            time.sleep(0.05)
        self.admin_url, self.state = found[1] + "/admin/", folder / "midstream"
        self.client = httpx.Client(timeout=600)

    def admin(self, method, path, body=None):
        headers = {"Authorization": f"Bearer {ADMIN}"}
        answer = self.client.request(method, self.admin_url + path, json=body, headers=headers)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def ask(self, text, key):
        body = {"model": self.slug, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {secret(key)}"}
        answer = self.client.post(self.process.url + "/v1/chat/completions", json=body, headers=headers)
        return answer.status_code, answer.headers.get("x-midstream-request-id")

    def stream(self, rows, label):
        """rows: (text, label); label: the share that is labelled. Returns {id: (text, label)}"""
        chance, ids, labelled = random.Random(0), {}, []
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda i: self.ask(rows[i][0], KEYS[i % len(KEYS)]), range(len(rows)))
            for row, (status, request_id) in zip(rows, answers, strict=True):
                assert status == 200, status
                ids[request_id] = row
        self.settle()
        labelled = [i for i in ids if chance.random() < label]
        for request_id in labelled:
            word = "harmful" if ids[request_id][1] else "harmless"
            self.admin("POST", "labels", {"id": request_id, "label": word, "by": "somebody"})
        return ids, labelled

    def settle(self):
        """Until every kept sequence has been read again, and is on disk."""
        while self.gauge("midstream_feature_queue_depth") or self.gauge("midstream_record_queue_depth"):
            time.sleep(0.2)

    def gauge(self, name):
        (line,) = [
            x for x in self.client.get(self.process.url + "/metrics").text.splitlines() if x.startswith(name + " ")
        ]
        return float(line.split()[-1])

    def retrain(self, probe):
        self.admin("POST", "retrain", {"probe": probe})
        while (state := self.admin("GET", "retrain"))["state"] == "running":
            time.sleep(0.3)
        return state

    def shelf(self, probe):
        return next(p for p in self.admin("GET", "probes")["probes"] if p["name"] == probe)

    def change_under_load(self, probe, version, texts):
        """Promote and roll back while four clients ask; returns statuses, and how long the roll-back took."""
        done, answers, lock = threading.Event(), [], threading.Lock()

        def client(i):
            chance = random.Random(i)
            while not done.is_set():
                answer = self.ask(chance.choice(texts), KEYS[i])
                with lock:
                    answers.append(answer)

        clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for one in clients:
            one.start()
        until_more(answers, len(clients))
        promoted = self.admin("POST", f"probes/{probe}/promote", {"version": version})
        until_more(answers, len(clients))
        began = time.monotonic()
        back = self.admin("POST", f"probes/{probe}/rollback", {})
        seconds = time.monotonic() - began
        until_more(answers, len(clients))
        done.set()
        for one in clients:
            one.join()
        assert (promoted["live"], back["live"]) == (version, promoted["previous"])
        return answers, seconds

    def records(self, answers):
        self.settle()
        log = self.state / "records.sqlite3"
        return [find_records(log, request_id)[0] for _, request_id in answers]

    def stop(self):
        self.client.close()
        self.process.stop()


def secret(name):
    return f"secret-of-{name}"


def digest(name):
    import hashlib

    return hashlib.sha256(secret(name).encode()).hexdigest()


def close(loop, probe, version, rows):
    """Promote and roll back under load: no request fails, and each record names one version of the probe."""
    answers, seconds = loop.change_under_load(probe, version, [text for text, _ in rows])
    assert {status for status, _ in answers} == {200}
    seen = set()
    for record in loop.records(answers):
        versions = {r["version"] for r in record["readings"] if r["probe"] == probe}
        assert len(versions) == 1
        seen |= versions
    print(f"promote and roll back under load: {len(answers)} requests, 0 failed, versions {sorted(seen)}")
    print(f"roll-back: {seconds:.2f} s")
    assert version in seen


def audited(loop):
    rows = loop.admin("GET", "audit?limit=1000")["rows"][::-1]
    return [r["path"] for r in rows if r["actor"] == "retrain"]


def test_the_loop_on_a_tiny_model(tiny, tmp_path):
    """The same, on a made-up world: what is asked for here are events and counts."""
    world = World(tiny, tmp_path)
    frozen = world.frozen(200, 40)
    loop = Loop(
        tmp_path, world.settings.model, world.store, MODEL,
        target_fpr=0.1, retrain_frozen=list(frozen), modes={NAME: {"prompt": "flag"}},
    )  # fmt: skip
    try:
        rows = [(t, 0) for t in texts(90, 7)] + [(t, 1) for t in texts(30, 9, "%")]
        _, labelled = loop.stream(rows, 1.0)
        before = loop.shelf(NAME)
        assert (before["live"], before["candidate"], before["backlog"]) == ("v1", None, len(labelled))
        state = loop.retrain(NAME)
        print(f"\n{state['state']}, exit {state['exit_code']}: " + "\n".join(state["lines"][-6:]))
        assert state["state"] == "done" and state["candidate"] == "v2"
        after = loop.shelf(NAME)
        assert (after["live"], after["candidate"], after["backlog"]) == ("v1", "v2", 0)
        assert after["versions"][0]["labels"] == len(labelled)
        deadline = time.monotonic() + 20
        while True:  # the server notices by itself
            _, request_id = loop.ask("red green", KEYS[0])
            (record,) = loop.records([(200, request_id)])
            found = {r["probe"]: r["mode"] for r in record["readings"] if r["phase"] == "prompt"}
            if f"{NAME}@v2" in found:
                break
            assert time.monotonic() < deadline
        assert found == {NAME: "flag", f"{NAME}@v2": "shadow"}
        close(loop, NAME, "v2", rows)
        assert loop.shelf(NAME)["live"] == "v1"
        steps = [path.split(": ")[1].split(" ")[0] for path in audited(loop)]
        assert steps == ["started", "labels", "gate", "published", "v2"]
        text = b"".join(p.read_bytes() for p in (tmp_path / "midstream").rglob("*") if p.is_file())
        assert b"yellow" not in text and b"%%%" not in text  # no word of what was asked
    finally:
        loop.stop()


@pytest.mark.attack
def test_the_loop_on_toxicchat(demo, tmp_path):
    """ROWS as live traffic: what retraining on a tenth of it, labelled, is worth on the traffic that was held back."""
    rows = [json.loads(line) for line in ROWS.read_text().split("\n") if line.strip()]
    random.Random(1).shuffle(rows)
    rows = [(r["text"][:600], r["label"]) for r in rows[: int(os.environ.get("LOOP_ROWS", len(rows)))]]
    traffic, held = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    frozen = tmp_path / "held.jsonl"
    seen = {}
    for text, label in held:
        seen.setdefault(" ".join(text.lower().split()), {"text": text, "label": label})
    frozen.write_text("".join(json.dumps(r) + "\n" for r in seen.values()))
    held = [(r["text"], r["label"]) for r in seen.values()]
    store = Store(tmp_path / "store")
    modes = {"harmful-intent": {"prompt": "flag", "response": "shadow"}}
    slug, share = "smollm2-135m-instruct", float(os.environ.get("LOOP_LABELS", 0.2))  # of one half: a tenth of all
    loop = Loop(tmp_path, slug, store, slug, target_fpr=0.04, retrain_frozen=[str(frozen)], modes=modes)
    try:
        began = time.monotonic()
        _, labelled = loop.stream(traffic, share)
        print(f"\n{len(traffic)} requests in {time.monotonic() - began:.0f} s, {len(labelled)} of them labelled")
        state = loop.retrain("harmful-intent")
        print("\n".join(state["lines"]))
        assert state["state"] == "done", state
        if state["candidate"] is None:  # the gate calls it worse: nothing was published, and that is the answer
            assert state["exit_code"] == 11
            return
        live = loop.shelf("harmful-intent")["live"]
        compare(demo, store, slug, live, state["candidate"], held)
        close(loop, "harmful-intent", state["candidate"], traffic)
    finally:
        loop.stop()


def compare(model, store, slug, live, candidate, held):
    """Prints recall at 1 % false positives on held-back traffic before and after, and the paired interval."""
    prompts, labels = [Reader(model, 512).prompt(text) for text, _ in held], np.array([y for _, y in held])
    values = []
    for version in (live, candidate):
        probe = store.load(slug, "harmful-intent", version)
        how = {phase: probe.card.aggregation[phase.value] for phase in Phase}
        weights = ProbeWeights("harmful-intent", probe.weight, probe.bias)
        values.append(np.array(prompt_values(model, weights, how, prompts)))
    before, after = (Sample.of(v, labels, [str(i) for i in range(len(labels))]) for v in values)
    for name, metric in (("recall at 1 % FPR", recall_at(0.01)), ("AUROC", auroc)):
        figure = paired(metric, after, before)
        one, two = (float(metric(*s.masses())) for s in (before, after))
        print(
            f"{name} on {int(labels.sum())} harmful and {int((labels == 0).sum())} harmless rows held back: "
            f"{live} {one:.3f}, {candidate} {two:.3f}, difference {figure.value:+.3f} "
            f"[{figure.low:+.3f}, {figure.high:+.3f}] (paired bootstrap)"
        )
