"""What a retrained threshold still lacks: everyday rows are those that `midstream retrain` would find."""

import pytest

from monitor.api.admin.shelf import Shelf, everyday
from monitor.config import load_settings
from monitor.traffic import Cipher, Said, TrafficLog
from probes_store.store import Store
from training.retrain.said import draw_said

from .test_log_text import KEY
from .test_records import record


@pytest.fixture
def settings(tmp_path):
    def chosen(**more):
        here = {"records": "records.sqlite3", "features": "features", "store": "store"}
        return load_settings(**{name: tmp_path / file for name, file in here.items()}, **more)

    log = TrafficLog(chosen().log, 1000, 1000, lambda n: None, cipher=Cipher(KEY))
    for i in range(30):
        for choice in range(2):
            log.put(record(f"r{i}", choice))
    for i in range(20):
        log.say(Said(f"r{i}", [{"role": "user", "content": f"question {i}"}], {0: "a", 1: "b"}))
    log.close()
    return chosen


def needed(settings):
    return Shelf(Store(settings.store), "m", settings.log, 0.05, lambda: everyday(settings), lambda: ()).needed()


def test_features_count_by_their_rate_and_kept_texts_by_request(settings):
    assert needed(settings()) == 59, "nothing is kept"
    assert needed(settings(log_features=True, feature_rate=0.5)) == 59 - 15
    texts = settings(log_text=True, log_key=KEY)
    assert needed(texts) == 59 - 20 == 59 - len(draw_said(texts)), "requests, not their choices"


def test_where_features_were_kept_texts_are_not_read(settings):
    texts = settings(log_text=True, log_key=KEY)
    texts.features.mkdir()
    assert needed(texts) == 59


def test_without_a_log_all_of_them_are_needed(settings, tmp_path):
    assert needed(load_settings(records=tmp_path / "none", log_text=True, log_key=KEY)) == 59
