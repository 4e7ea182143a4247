"""T4 to T9 with vLLM, against its own table of routes: one engine for all of them."""

import pytest

from ..conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.siege")

from ..attacks import SHAPES  # noqa: E402
from ..contract import Server  # noqa: E402
from ..siege import Siege  # noqa: E402
from ..star import fit_star_probe  # noqa: E402
from . import test_leak  # noqa: E402
from .conftest import EAGER, Harness, Web, make_plan  # noqa: E402

quiet = test_leak.quiet
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@pytest.fixture(scope="module")
def web(quiet, tmp_path_factory):
    probe, threshold = fit_star_probe(quiet)
    modes = {"star": {"prompt": "block", "response": "block"}}
    published = [(probe, {"calibration": calibrated(threshold)})]
    store = tmp_path_factory.mktemp("store")
    running = Harness(make_plan(quiet, store, published, [*EAGER, *TOOLS], modes=modes, max_concurrent=600))
    web = Web(running)
    yield web
    web.stop()
    running.stop()


@pytest.fixture
def starred(web, quiet):
    return Server(web.url, quiet, web.harness.plan.live, web.sink, web.idle)


@pytest.fixture
def app(web):
    return web.app


class TestVllm(Siege):
    # vLLM gives the prompt's logprobs to one choice only where it joins the outputs of two, and then ends the stream
    # with an error, watched or not.
    shapes = tuple(s for s in SHAPES if not (s.echo and s.logprobs and s.stream and s.n > 1 and not s.last))
