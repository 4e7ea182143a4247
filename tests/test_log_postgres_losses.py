"""A real PostgreSQL's own ways to lose: texts beside records, numbers that are burnt, tables that are rewritten."""

import psycopg

from monitor.traffic import Cipher, Said, find_said

from .test_log_postgres import log_of, server, stored, url  # noqa: F401
from .test_log_text import KEY
from .test_records import record


def test_a_text_costs_no_record(url):  # noqa: F811
    drops, texts = [], []
    log_of(url).close()  # the tables are there
    with psycopg.connect(url) as admin:
        admin.execute("ALTER TABLE said ADD CONSTRAINT short CHECK (length(sealed) < 1000)")
    log = log_of(url, drops, cipher=Cipher(KEY), texts_dropped=texts.append)
    for name in ("r1", "r2"):
        log.put(record(name))
    log.say(Said("r1", "x" * 2000, {0: "a"}))
    log.mark_features("f", [])  # comes after all of that
    for _ in range(2):
        log.say(Said("r2", "q", {0: "a"}))
    log.put(record("r3"))
    log.close()
    assert stored(url) == ["r1", "r2", "r3"] and (drops, sum(texts)) == ([], 1)
    assert find_said(url, "r1", Cipher(KEY)) == {} and find_said(url, "r2", Cipher(KEY))[0]["answer"] == "a"
