"""The traffic log: finished records -> SQLite or PostgreSQL, people's labels of them, and what leaves it again."""

from monitor.traffic.database import Where
from monitor.traffic.erase import erase, erase_each, erase_texts, erased_from
from monitor.traffic.log import TrafficLog
from monitor.traffic.queue import Entry, Filter, counts, review_queue
from monitor.traffic.receipts import Receipt
from monitor.traffic.review import Label, add_label, count_unlabelled, find_labels, find_records, unlabelled
from monitor.traffic.rows import record_json
from monitor.traffic.text import Cipher, Said, find_said

__all__ = [
    "Cipher",
    "Entry",
    "Filter",
    "Label",
    "Receipt",
    "Said",
    "TrafficLog",
    "Where",
    "add_label",
    "count_unlabelled",
    "counts",
    "erase",
    "erase_each",
    "erase_texts",
    "erased_from",
    "find_labels",
    "find_records",
    "find_said",
    "record_json",
    "review_queue",
    "unlabelled",
]
