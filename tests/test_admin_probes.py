"""The admin route of the shelf: its JSON is made where it was read, and says what is missing."""

import math
import threading

from .admin_port import AdminPort
from .console_port import FakeProbes


class Found(dict):
    """Notes which thread makes JSON of it."""

    threads = ()

    def items(self):
        self.threads = (*self.threads, threading.current_thread())
        return super().items()


class Odd(FakeProbes):
    def shelf(self):
        found = super().shelf()
        found["probes"][0]["thresholds"][0]["psi"] = math.nan
        self.found = Found(found)
        return self.found


def test_a_figure_that_is_no_number_is_missing_and_the_loop_is_left_alone(tmp_path):
    probes = Odd()
    port = AdminPort(tmp_path, probes=probes.operations)
    try:
        status, found, _ = port.ask("GET", "/admin/probes")
    finally:
        port.stop()
    assert (status, found["probes"][0]["thresholds"][0]["psi"]) == (200, None)
    assert probes.found.threads and port._thread not in probes.found.threads
