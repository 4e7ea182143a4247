"""T4 to T9 with the embedded engine, against its own table of routes."""

import pytest

from .conftest import calibrated, serving

pytest.register_assert_rewrite("tests.contract", "tests.siege")

from .contract import Server  # noqa: E402
from .siege import Siege  # noqa: E402


@pytest.fixture(scope="module")
def running(quiet, star_probe, tmp_path_factory):
    probe, threshold = star_probe
    modes = {"star": {"prompt": "block", "response": "block"}}
    published = [(probe, {"calibration": calibrated(threshold)})]
    room = {"max_queue": 600, "max_concurrent": 600}  # T8 is about names, not about queues: 500 wait
    with serving(quiet, published, tmp_path_factory.mktemp("store"), modes=modes, **room) as server:
        yield server


@pytest.fixture
def starred(running):
    return Server(running.url, running.model, running.engine.live, running.sink, running.idle)


@pytest.fixture
def app(running):
    return running.app


class TestEmbedded(Siege):
    def refuses(self, shape):
        return shape.tools or shape.echo or shape.form == "json"
