"""The traffic log with a million records: how fast the writer is, and how soon the review queue answers.

`python -m tests.bench.log [RECORDS]`. The file is filled in SQL with rows like the writer's; 20,000 more records then
go through the writer, and the queue is asked as the console asks it.
"""

import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from monitor.api.admin.desk import Desk
from monitor.api.admin.feed import Feed
from monitor.traffic import Filter, TrafficLog, count_unlabelled, counts, record_json, review_queue
from monitor.traffic.nearest import nearest_queue
from monitor.types import Action, Mode, Phase
from tests.admin_port import AdminPort
from tests.bench.pairs import say
from tests.test_records import reading, record

RECORDS, WRITTEN, ROUNDS = 1_000_000, 20_000, 9
QUEUE_MS, WRITES_S = 200.0, 2000.0
DAY = 86_400.0

# As many keys as `%` says, a fifth not allowed, a tenth of these labelled; two readings each.
_FILL = """
INSERT INTO records (id, request_id, choice, created, verdict, body, key, waiting, digest)
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :n)
SELECT i, printf('%032x', i * 7919), 0, i * 2.0,
    CASE i % 20 WHEN 0 THEN 'block' WHEN 1 THEN 'flag' WHEN 2 THEN 'flag' WHEN 3 THEN 'unmonitored' ELSE 'allow' END,
    :body, 'key' || CASE WHEN i % 3 THEN i % 10 ELSE i % 5000 END, i % 20 < 4 AND i % 200 >= 20, printf('%032x', i)
FROM n
"""
_READINGS = """
INSERT INTO readings (record, probe, phase, rank, decides, verdict, labelled, key, created)
SELECT id, 'demo', phase, (abs(random()) % 2000001) / 100000.0 - 10, phase = 'prompt', verdict,
    verdict <> 'allow' AND NOT waiting, key, created
FROM records CROSS JOIN (SELECT 'prompt' AS phase UNION ALL SELECT 'response')
"""


def one(i: int) -> object:
    readings = (
        reading(Action.ALLOW, Phase.PROMPT, value=(i * 7919 % 2000) / 100 - 10),
        reading(Action.FLAG if i % 5 == 0 else Action.ALLOW, Phase.RESPONSE, Mode.FLAG, value=i % 2000 / 100 - 10),
    )
    verdict = Action.FLAG if i % 5 == 0 else Action.ALLOW
    scores = {"demo": [0.12345] * 60} if i % 5 == 0 else {}
    return record(f"{i:032x}", 0, verdict, readings=readings, key=f"key{i % 50}", token_scores=scores)


def filled(path: Path, n: int) -> float:
    """Seconds that it took."""
    TrafficLog(path, n * 2, 10, lambda lost: None).close()
    began = time.perf_counter()
    database = sqlite3.connect(path)
    database.execute("PRAGMA cache_size=-500000")
    database.execute(_FILL, {"n": n, "body": json.dumps(record_json(one(0)))})
    database.execute(_READINGS)
    database.commit()
    database.close()
    return time.perf_counter() - began


def written(path: Path, n: int) -> tuple[float, float]:
    """Records a second, from the first `put` until the last is in the file; and a second of this process' own time."""
    records = [one(i) for i in range(n)]
    drops: list[int] = []
    log = TrafficLog(path, n + RECORDS * 2, n, drops.append)
    began, worked = time.perf_counter(), time.process_time()
    for each in records:
        log.put(each)  # type: ignore[arg-type]
    log.close()
    took, worked = time.perf_counter() - began, time.process_time() - worked
    assert drops == []
    return n / took, n / worked


def asked(act: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds: median and worst."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        act()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times), max(times)


def questions(n: int) -> dict[str, Filter]:
    """n: records in the log, one every two seconds"""
    last = n * 2.0
    return {
        "what waits": Filter(),
        "everything": Filter(verdicts=frozenset(Action), labelled=None),
        "labelled": Filter(labelled=True),
        "blocks": Filter(verdicts=frozenset({Action.BLOCK})),
        "one probe's answers": Filter("demo", Phase.RESPONSE),
        "a large key": Filter(key="key7"),
        "a small key": Filter(key="key4321"),
        "a large key, one probe": Filter("demo", Phase.PROMPT, key="key7"),
        "the last hour": Filter(since=last - 3600),
        "the last day": Filter(since=last - DAY),
        "an early day": Filter(since=DAY, until=2 * DAY),
        "a large key, the last day": Filter(key="key7", since=last - DAY),
        "nobody's": Filter(key="none such"),
    }


def nearest(n: int) -> dict[str, Filter]:
    return {
        "nearest to a threshold": Filter("demo", Phase.PROMPT),
        "nearest, everything": Filter("demo", Phase.PROMPT, frozenset(Action), labelled=None),
        "nearest, a large key": Filter("demo", Phase.PROMPT, key="key7"),
        "nearest, the last day": Filter("demo", Phase.PROMPT, since=n * 2.0 - DAY),
    }


def routes(path: Path) -> dict[str, tuple[float, float]]:
    """Through the admin port's socket, guard and audit row and all: as the console asks."""
    desk = Desk(path, Feed(), None)  # type: ignore[arg-type] - no text is asked for
    port = AdminPort(path.parent, desk)
    try:
        return {
            f"GET /admin/{query}": asked(lambda query=query: port.ask("GET", f"/admin/{query}"))  # type: ignore[misc]
            for query in ("queue", "queue?labelled=any", "queue?key=key7", "queue/counts")
        }
    finally:
        port.stop()


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else RECORDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.sqlite3"
        say(f"{n:,} records made in {filled(path, n):.0f} s; {path.stat().st_size / 2**30:.2f} GiB")
        rate, worked = written(path, WRITTEN)
        say(f"writer: {rate:,.0f} records a second behind them, {worked:,.0f} a CPU second (wanted: {WRITES_S:,.0f})")
        worst = 0.0
        for name, which in questions(n).items():
            median, slowest = asked(lambda which=which: review_queue(path, which, 50))  # type: ignore[misc]
            worst = max(worst, median)
            say(f"queue, {name}: {median:.0f} ms, at most {slowest:.0f} ms")
        place = review_queue(path, Filter(), 50)[-1].place
        median, slowest = asked(lambda: review_queue(path, Filter(), 50, place))
        say(f"queue, next page: {median:.0f} ms, at most {slowest:.0f} ms")
        for name, which in nearest(n).items():
            median, slowest = asked(lambda which=which: nearest_queue(path, which, 2.5, 50))  # type: ignore[misc]
            worst = max(worst, median)
            say(f"queue, {name}: {median:.0f} ms, at most {slowest:.0f} ms")
        place = nearest_queue(path, next(iter(nearest(n).values())), 2.5, 50)[-1].place
        median, slowest = asked(lambda: nearest_queue(path, next(iter(nearest(n).values())), 2.5, 50, place))
        say(f"queue, nearest, next page: {median:.0f} ms, at most {slowest:.0f} ms")
        for name, (median, slowest) in routes(path).items():
            worst = max(worst, median)
            say(f"{name}: {median:.0f} ms, at most {slowest:.0f} ms")
        say(f"queue: the slowest question {worst:.0f} ms (wanted: {QUEUE_MS:.0f})")
        for name, act in (("backlog", count_unlabelled), ("counts", counts)):
            median, slowest = asked(lambda act=act: act(path))  # type: ignore[misc, operator]
            say(f"{name}: {median:.0f} ms, at most {slowest:.0f} ms")


if __name__ == "__main__":
    main()
