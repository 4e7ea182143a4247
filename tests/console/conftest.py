"""A tab of a real Chromium, and the admin port that it looks at."""

import os

import pytest

from ..console_port import port as port
from ..debian import Unavailable
from .browser import browser


@pytest.fixture(scope="module")
def chromium():
    """In CI its absence is a failure, elsewhere a skip."""
    try:
        with browser() as page:
            yield page
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have Chromium: {error}")
        pytest.skip(str(error))


@pytest.fixture
def page(chromium):
    """The tab as new; when the test is over, it has asked nobody but us and broken no rule."""
    chromium.size(1280, 800)
    chromium.prefers()
    chromium.send("Network.clearBrowserCookies")
    for seen in (chromium.asked, chromium.dialogs, chromium.said, chromium.called):
        seen.clear()
    yield chromium
    assert {url.split("/")[2].split(":")[0] for url in chromium.asked if not url.startswith("data:")} == {"127.0.0.1"}
    assert (chromium.violations, chromium.dialogs, chromium.called) == ([], [], [])
    chromium.run("localStorage.clear()")
    chromium.open("about:blank")
