"""Traffic of a made-up world, as a server leaves it: a probe with its base, records with labels, features of texts.

In it `#` was harmful when the probe was made, and by now `%` is too, which the probe does not know.
"""

import random
from dataclasses import replace

import numpy as np
import torch

from monitor.config import load_settings
from monitor.template import POSITION_RULE
from monitor.traffic import Cipher, Label, Said, TrafficLog, add_label
from monitor.traffic.features import Feature, write_features
from monitor.types import Action, Phase
from probes_store.base import Base
from probes_store.store import Store
from training.data import Row
from training.fit import fit_logistic
from training.texts import Reader

from .conftest import LAYER, calibrated, make_card
from .test_records import record

MODEL, NAME = "tiny-llama", "marks"
RATE = 0.5
"""Of the uniform slice."""
WORDS = ["red", "green", "blue", "yellow", "black", "white", "orange", "violet", "brown", "grey"]


def texts(n, seed, marks=""):
    """n different texts; with a few of the marks among their words, if there are any."""
    chance, found = random.Random(seed), {}
    while len(found) < n:
        words = chance.choices(WORDS, k=chance.randint(4, 8))
        for mark in [chance.choice(marks)] * 3 if marks else []:
            words.insert(chance.randrange(len(words)), mark * 3)
        found[" ".join(words)] = None
    return list(found)


class World:
    """folder: of everything; tenants: API keys that ask in turn"""

    def __init__(self, tiny, folder, tenants=25, **settings):
        self.tiny, self.folder, self.tenants = tiny, folder, tenants
        self.reader = Reader(tiny, 512)
        self.store = Store(folder / "store", shipped=folder / "none")
        self.settings = load_settings(
            model=tiny.module.config.name_or_path, store=folder / "store", records=folder / "records.sqlite3",
            features=folder / "features", audit=folder / "audit.sqlite3", target_fpr=0.1, **settings,
        )  # fmt: skip
        self.n = 0
        rows = texts(200, 0) + texts(60, 1, "#")
        y = np.repeat([0, 1], [200, 60])
        x = self.features(rows)
        fitted = fit_logistic(x, y, np.ones(len(y)), 0.1)
        weight = {LAYER: torch.from_numpy(fitted.weight).float()}
        from monitor.probe import ProbeWeights

        probe = ProbeWeights(NAME, weight, fitted.bias)
        from monitor.aggregate import Aggregation

        how = {"prompt": Aggregation("mean"), "response": Aggregation("ema")}
        calibration = calibrated(0.0)
        del calibration["raw"]["response"]  # as of every probe that we train
        card = make_card(tiny, probe, aggregation=how, calibration=calibration, created="2026-01-01T00:00:00+00:00")
        self.store.publish(card, weight, fitted.bias, Base.of(x[:, None], (LAYER,), y).dump())

    def features(self, of):
        out = np.zeros((len(of), self.tiny.d_model))
        for index, turn in self.reader.streams([Row(t, 0, "x", "x") for t in of], (LAYER,)):
            out[index] = turn[LAYER].mean(0).double().numpy()
        return out

    def serve(self, of, label=None, q=1.0, reason="uniform", key=None, choices=1):
        """Texts were asked, and their features kept; label: what a person said of each, None: nothing."""
        log, kept = TrafficLog(self.settings.records, 10**6, 10**6, lambda n: None), []
        ids = []
        for text, vector in zip(of, self.features(of), strict=True):
            self.n += 1
            request_id, tenant = f"r{self.n}", key if key is not None else f"key-{self.n % self.tenants}"
            for choice in range(choices):
                log.put(replace(record(request_id, choice, Action.FLAG), key=tenant, created=2e9 + self.n))
                kept.append(
                    Feature(
                        request_id,
                        choice,
                        tenant,
                        2e9 + self.n,
                        Phase.PROMPT,
                        q,
                        reason,
                        self.tiny.fingerprint,
                        self.tiny.template.hash,
                        POSITION_RULE,
                        len(text),
                        (LAYER,),
                        vector.astype(np.float16)[None],
                        0.0 if reason == "near" else RATE,
                    )
                )
            ids.append(request_id)
        log.close()
        write_features(self.settings.features, kept)
        if label is not None:
            for i, request_id in enumerate(ids):
                add_label(self.settings.log, request_id, 0, label, "somebody", lambda i=i: 2e9 + self.n + i)
        return ids

    def say(self, of, label=None, choices=1):
        """As `serve`, of a server that keeps texts and no features."""
        log = TrafficLog(self.settings.records, 10**6, 10**6, lambda n: None, cipher=Cipher(self.settings.log_key))
        for text in of:
            self.n += 1
            for choice in range(choices):
                asked = replace(record(f"r{self.n}", choice, Action.FLAG), key=f"key-{self.n % self.tenants}")
                log.put(replace(asked, created=2e9 + self.n))
            body = {"messages": [{"role": "user", "content": text}]}
            log.say(Said(f"r{self.n}", body, dict.fromkeys(range(choices), "an answer")))
        log.close()
        for i in range(len(of)) if label is not None else ():
            add_label(self.settings.log, f"r{self.n - i}", 0, label, "somebody", lambda: 2e9 + self.n)

    def frozen(self, n=400, m=80):
        import json

        path = self.folder / "frozen.jsonl"
        rows = [(t, 0) for t in texts(n, 100)] + [(t, 1) for t in texts(m, 101, "%#")]
        path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
        return (str(path),)


HARMFUL, HARMLESS = Label.HARMFUL, Label.HARMLESS
