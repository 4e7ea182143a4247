"""The admin port over a real log with kept texts, and probes that are only said to change: what the console shows."""

import base64
import time

import pytest

from monitor.api.admin.desk import Desk
from monitor.api.admin.feed import Feed
from monitor.api.admin.probes import ProbeOperations
from monitor.errors import ConfigInvalid
from monitor.template import ChatTemplate
from monitor.traffic import Cipher, Said, TrafficLog
from monitor.types import Action, Mode, Phase
from probes_store.promote import Choice

from .admin_port import KEY, AdminPort
from .conftest import tiny_tokenizer
from .test_records import coverage, reading, record

LOG_KEY = base64.b64encode(bytes(range(32))).decode()


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


class FakeProbes:
    """Versions of one probe, `demo`, and a training that is done at once; `asked` is what was."""

    def __init__(self):
        self.live, self.previous, self.candidate, self.asked = "v1", None, "v2", []
        self.missing, self.serves = False, None  # None: what is live
        self.starts = True  # whether a training can be started
        self.training = {"state": "idle", "probe": None, "started": None, "ended": None, "exit_code": None}
        self.training |= {"lines": [], "candidate": None}

    @property
    def operations(self):
        return ProbeOperations(self, self.shelf, self)

    async def follow(self):
        pass

    async def end(self):
        pass

    def _choice(self):
        return Choice("demo", self.live, self.previous, self.candidate)

    def _seen(self, live):
        if live not in (None, self.live):
            raise ConfigInvalid(f"demo {live} is not live any more, {self.live} is")

    async def promote(self, probe, version, fewer=False, instead_of=None):
        self.asked.append(("promote", probe, version))
        self._seen(instead_of)
        if version not in ("v1", "v2"):
            raise ConfigInvalid(f"there is no version {version}")
        self.live, self.previous, self.candidate = version, self.live, None
        return self._choice()

    async def rollback(self, probe, to=None, instead_of=None):
        self.asked.append(("rollback", probe, to))
        self._seen(instead_of)
        self.live, self.previous = self.previous, self.live
        return self._choice()

    async def shadow(self, probe, version, instead_of=None):
        self.asked.append(("shadow", probe, version))
        self._seen(instead_of)
        self.candidate = version
        return self._choice()

    async def start(self, probe):
        self.asked.append(("retrain", probe))
        if not self.starts:
            self.training |= {"state": "failed", "probe": probe, "lines": ["it could not be started: the disk is full"]}
            return self.training
        done = {"state": "done", "probe": probe, "started": time.time() - 3, "ended": time.time(), "exit_code": 0}
        self.training = done | {"lines": ["<b>fitting</b>", "gate: PASS"], "candidate": "v3"}
        return self.training | {"state": "running"}

    def describe(self):
        return self.training

    def shelf(self):
        def version(name, **more):
            own = {"version": name, "created": "2026-11-01T10:00:00+00:00", "kind": "harm", "layers": [15]}
            own |= {"sha256": "ab" * 32, "live": name == self.live, "candidate": name == self.candidate}
            return own | {"metrics": {"auroc": 0.913}, "gate": None, "labels": None} | more

        bad = dict.fromkeys(("created", "kind", "layers", "sha256", "metrics"))
        versions = [version("v2", gate={"verdict": "PASS"}, labels=240), version("v1")]
        versions.append(version("v0", damaged="its sha256 is another", **bad))
        found = {"name": "demo", "live": self.live, "previous": self.previous, "candidate": self.candidate}
        seen = {"phase": "prompt", "format": "chat", "threshold": 1.5, "n": 2000, "target_fpr": 0.005, "psi": 0.31}
        seen |= {"observed": 0.0205, "low": 0.0148, "high": 0.0277, "stale": True}
        few = seen | {"phase": "response", "n": 12} | dict.fromkeys(("observed", "low", "high", "psi", "stale"))
        serves = self.serves or self.live
        found |= {"missing": self.missing, "serves": serves, "tries": None if self.serves else self.candidate}
        found |= {"backlog": 12, "needed": 60, "versions": versions, "thresholds": [seen, few]}
        return {"model": "tiny", "probes": [found]}


class ConsolePort(AdminPort):
    """`say` adds a request to the log, text and all; `feed` is what the live view sees."""

    def __init__(self, folder, texts=True, lens=None, **settings):
        self.path, self.drops, self.feed, self.probes = folder / "records.sqlite3", [], Feed(), FakeProbes()
        cipher = Cipher(LOG_KEY) if texts else None
        self.template = ChatTemplate(tiny_tokenizer())
        self.log = TrafficLog(self.path, 100_000, 10_000, self.drops.append, cipher=cipher)
        self._at = time.time() - 5000
        desk = Desk(self.path, self.feed, self.template, cipher, lens)
        super().__init__(folder, desk, self.probes.operations, **settings)

    def say(self, request_id, text, answer="", value=3.0, verdict=Action.FLAG, scores=None, **more):
        """text: of the user. scores: of every position, else one that crosses in the prompt's middle"""
        self._at += 1
        prompt = chat(text)
        n = len(self.template.encode(prompt["messages"]).token_ids)
        m = len(self.template.tokenizer(answer)["input_ids"])
        crossed = n // 2
        own = {position: value - abs(position - crossed) / 4 for position in range(n + m)}
        scores = [own[p] for p in range(n + m)] if scores is None else scores
        prompt_reading = reading(
            verdict, Phase.PROMPT, Mode.FLAG, value=value, threshold=2.0, crossed_at=crossed, peak_position=crossed
        )
        covered = coverage(
            prompt_tokens=n, response_tokens=m, prompt_scored=n, response_scored=max(0, m - 1),
            final_unscored=int(m > 0),
        )  # fmt: skip
        fields = {
            "readings": (prompt_reading, reading(phase=Phase.RESPONSE, value=-1.0)), "coverage": covered,
            "released_tokens": m, "held_tokens": 0, "counted": ((1, n),), "token_scores": {"demo": scores},
            "created": self._at, "key": "alice",
        }  # fmt: skip
        one = record(request_id, 0, verdict, **(fields | more))
        self.log.put(one)
        self.feed.put(one)
        self.log.say(Said(request_id, prompt, {0: answer}))
        return one

    def written(self):
        """Everything said so far is in the log. Erasing waits for what was put before; nobody has this key."""
        assert self.log.erase(key="nobody has this name") == 0 and self.drops == []

    def sign_in(self, page, name="ann"):
        """As a person does, with keys."""
        page.open(f"http://127.0.0.1:{self.port}/admin/console")
        page.until("document.activeElement.name === 'key'")
        page.write(KEY)
        page.press("Tab")
        page.write(name)
        page.press("Enter")
        page.until("!document.getElementById('top').hidden")

    def stop(self):
        super().stop()
        self.log.close()


@pytest.fixture
def port(tmp_path):
    one = ConsolePort(tmp_path)
    yield one
    one.stop()
