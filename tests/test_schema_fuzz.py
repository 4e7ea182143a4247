"""Calls that schemathesis makes up from our OpenAPI document, valid ones and others: none is answered with a 5xx."""

import collections

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis import GenerationMode

from .conftest import calibrated, serving
from .contract import CHAT, TEXT, asked

CALLS = [pytest.param(200, id="sample"), pytest.param(2000, id="all", marks=pytest.mark.attack)]


@pytest.fixture(scope="module")
def server(tiny, random_probe, tmp_path_factory):
    """No call is long."""
    published = [(random_probe, {"calibration": calibrated(1e6)})]
    modes = {"random": {"prompt": "block", "response": "block"}}
    bounds = {"max_model_len": 128, "default_max_tokens": 4}
    with serving(tiny, published, tmp_path_factory.mktemp("store"), modes=modes, **bounds) as running:
        yield running


@pytest.mark.parametrize("calls", CALLS)
def test_no_call_of_the_document_is_an_internal_error(server, calls):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    # What takes nothing can't be called wrongly.
    kinds = [(o, mode) for o in operations for mode in GenerationMode if o.body or mode is GenerationMode.POSITIVE]
    statuses = collections.Counter()

    @hypothesis.settings(
        max_examples=calls,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        case=strategies.one_of(o.as_strategy(generation_mode=mode) for o, mode in kinds),
        fixed=strategies.sampled_from(["nothing", "model", "model and text"]),
    )
    def call(case, fixed):
        if isinstance(case.body, dict):  # no name that is made up gets further than a 404, and few texts fit
            case.body |= {} if fixed == "nothing" else {"model": server.model.name}
            case.body |= asked(case.path) if fixed == "model and text" else {}
        response = case.call(base_url=server.url, timeout=60)
        statuses[case.path, response.status_code] += 1
        assert response.status_code < 500, (case.as_curl_command(), response.text)

    call()
    assert sum(statuses.values()) >= calls
    assert {path for path, _ in statuses} == {o.path for o in operations}
    print(f"schemathesis: {sum(statuses.values())} calls, 0 of them 5xx: {dict(sorted(statuses.items()))}")
    assert statuses[CHAT, 200] and statuses[TEXT, 200]
