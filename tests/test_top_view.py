"""The screen of `midstream top`: 80 columns, dashes for what is missing, red for what must be 0."""

import io

import pytest
from rich.console import Console

from monitor.top.scrape import parse
from monitor.top.snapshot import snapshot
from monitor.top.view import draw

from .scraped import page, requests


def drawn(*args, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(*args))
    return console.file.getvalue()


def styled(*args):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(draw(*args))
    return console.file.getvalue()


RED = "\x1b[1;31m"


def test_the_screen_fits_into_80_columns():
    text = drawn("http://127.0.0.1:8000", snapshot([parse(page(), 10.0)]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    (seen,) = [line for line in lines if "0.50%" in line]
    assert " ".join(seen.split()) == "demo chat prompt 0.818 0.50% 1.20% [0.81, 1.71] 0.310"
    (events,) = [line for line in lines if line.split()[:2] == ["demo", "prompt"]]
    assert events.split()[2:5] == ["1", "1", "1"]
    for part in (
        "tiny-llama",
        "unmonitored 0 · leaked 0 · fail open 0",
        "queue 0 · dropped 0 · to review 2",
        "* since",
    ):
        assert part in text
    assert "held back " in text and "… " not in text


def test_long_names_fold_and_numbers_stay_whole():
    text = drawn("http://127.0.0.1:8000", snapshot([parse(page().replace('"demo"', f'"{"p" * 50}"'), 10.0)]))
    assert max(map(len, text.splitlines())) <= 80
    assert "1.20% [0.81, 1.71]" in text and "0.310" in text
    assert text.count("p" * 10) >= 2


def test_what_is_missing_is_a_dash():
    text = drawn("http://127.0.0.1:8000", snapshot([parse("midstream_ready 1\n", 10.0)]))
    assert "ready · up - · heartbeat - ago" in text
    assert "queue - · dropped - · to review -" in text
    assert "leaked - · fail open -" in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('midstream_unmonitored_tokens_total{cause="gap"} 3', "unmonitored 3 (gap 3)"),
        ("midstream_leaked_tokens_total 1", " · leaked 1"),
        ("midstream_fail_open_total 2", " · fail open 2"),
        ("midstream_records_dropped_total 9", " · dropped 9"),
        ("midstream_heartbeat_timestamp_seconds 50", "50 s"),
        ("midstream_ready 0", "not ready"),
    ],
)
def test_what_must_be_0_is_red_where_it_is_not(line, says):
    well = styled("u", snapshot([parse("midstream_ready 1\nmidstream_heartbeat_timestamp_seconds 98\n", 100.0)]))
    assert RED not in well
    ill = styled("u", snapshot([parse("# TYPE midstream_requests counter\n" + line, 100.0)]))
    assert RED + says in ill


def test_the_minute_is_drawn_to_one_scale():
    scrapes = [requests(0.0, allow=0, block=0), requests(1.0, allow=80, block=10), requests(2.0, allow=80, block=10)]
    lines = drawn("u", snapshot(scrapes)).splitlines()
    (allowed,) = [line for line in lines if line.startswith("allow ")]
    (others,) = [line for line in lines if line.startswith("others ")]
    assert allowed.split()[1:] == ["·" * 58 + "█·", "80"]
    assert others.split()[1:] == ["·" * 58 + "▂·", "10"]


def test_a_servers_words_cannot_move_the_cursor():
    text = 'midstream_blocks_total{model="\x1b[2Jm",probe="\x1b[31mp",phase="prompt"} 1\nmidstream_ready 1\n'
    assert "\x1b" not in drawn("u", snapshot([parse(text, 0.0)]), "failed \x1b[2J")


def test_the_outage_is_said_in_the_view():
    shot = snapshot([parse(page(), 10.0)])
    text = drawn("http://127.0.0.1:8000", shot, "ConnectError: [Errno 111] Connection refused")
    assert "can't be reached, trying again: ConnectError" in text and "tiny-llama" in text
    assert "can't be reached, trying again: it answers 500" in drawn("http://127.0.0.1:8000", None, "it answers 500")
