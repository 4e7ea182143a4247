"""T4 to T9 with vLLM, against its own table of routes: one engine for all of them."""

import pytest

from ..conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.siege")

from ..attacks import SHAPES  # noqa: E402
from ..contract import Server  # noqa: E402
from ..siege import Siege  # noqa: E402
from ..star import fit_star_probe  # noqa: E402
from .shared import blocking, load, routes  # noqa: E402


@pytest.fixture(scope="module")
def live(shared, quiet, tmp_path_factory):
    probe, threshold = fit_star_probe(quiet)
    published = [(probe, {"calibration": calibrated(threshold)})]
    return load(shared, quiet, tmp_path_factory.mktemp("store"), published, modes=blocking("star"))


@pytest.fixture(scope="module")
def web(shared, live):
    with routes(shared) as web:
        yield web


@pytest.fixture
def starred(web, live, quiet):
    return Server(web.url, quiet, live, web.sink, web.idle)


@pytest.fixture
def app(web):
    return web.app


class TestVllm(Siege):
    # vLLM gives the prompt's logprobs to one choice only where it joins the outputs of two, and then ends the stream
    # with an error, watched or not.
    shapes = tuple(s for s in SHAPES if not (s.echo and s.logprobs and s.stream and s.n > 1 and not s.last))
