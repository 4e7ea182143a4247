"""The programs that read our metrics, for real."""

import os

import pytest

from tests.debian import Unavailable

from .debian import Tools, find_tools


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Paths of prometheus, promtool, alertmanager and amtool. In CI their absence is a failure, elsewhere a skip."""
    try:
        return find_tools()
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have Prometheus and Alertmanager: {error}")
        pytest.skip(str(error))
