"""Logs on stderr, as text or as one JSON object a line. What an exception of a request says is left out: it may quote
the client."""

from __future__ import annotations

import contextvars
import io
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from monitor.config import Settings

REQUEST: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("midstream_request", default=("", ""))
"""(our request id, trace id) of the request on whose behalf this runs; "" for none."""
_FRAMES = 40


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message; where there are any request_id, trace_id, exception, traceback and
    `extra={"fields": {...}}`. ASCII, so that nothing in a value can begin a line."""

    def format(self, record: logging.LogRecord) -> str:
        request_id, trace_id = REQUEST.get()
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        fields |= {k: v for k, v in (("request_id", request_id), ("trace_id", trace_id)) if v}
        fields |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = type(record.exc_info[1]).__qualname__
            fields["traceback"] = told(record.exc_info[1], quiet=bool(request_id))
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """time level logger: message, and the request's id; a traceback on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        request_id, _ = REQUEST.get()
        message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _message(record))
        line = f"{_time(record)} {record.levelname.lower()} {record.name}: {message}"
        line += f" request_id={request_id}" if request_id else ""
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + told(record.exc_info[1], quiet=bool(request_id))
        return line


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, version, status = record.args
        return f'{client} - "{method} {str(path).partition("?")[0]} HTTP/{version}" {status}'
    return record.getMessage().strip()


def told(error: BaseException, quiet: bool) -> str:
    """Its frames and those of its causes, the newest exception first. quiet: without what the exceptions say"""
    parts = []
    for one in _chain(error, set()):
        name = f"{type(one).__module__}.{type(one).__qualname__}".removeprefix("builtins.")
        frames = "".join(traceback.format_tb(one.__traceback__, -_FRAMES))
        parts.append(frames + (name if quiet else f"{name}: {one}"))
    return "\n\ncaused by:\n".join(parts)


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
            yield from _chain(inner, seen)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


class Stderr(logging.StreamHandler[TextIO]):
    """The process's own stderr, whatever `sys.stderr` has become."""

    def __init__(self) -> None:
        super().__init__(sys.__stderr__ or sys.stderr)


class Lines(io.TextIOBase):
    """In place of `sys.stderr`: what is printed there, a start-up message or a library's, is logged line by line."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            shown = line.rstrip("\r").rpartition("\r")[2].strip()  # of a progress bar, its last state
            if any(c.isalnum() for c in shown):  # and of a table not its frame
                logging.getLogger("midstream").info("%s", shown)
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return 2


def start(settings: Settings) -> None:
    """For a server's process, before what logs is imported. Handlers that are there stay, unless JSON is asked for."""
    as_json = settings.log_format == "json"
    handler = Stderr()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=as_json)
    logging.getLogger("midstream").setLevel(logging.INFO)
    _keep_from_uvicorn()
    if not as_json:
        return
    logging.raiseExceptions = False  # a broken stderr would be reported on stderr, which logs
    logging.captureWarnings(True)
    sys.stderr = Lines()
    sys.excepthook = _uncaught
    threading.excepthook = lambda died: _uncaught(died.exc_type, died.exc_value, died.exc_traceback)
    if settings.engine == "vllm":
        _vllm(settings.cache)


def _keep_from_uvicorn() -> None:
    """Every uvicorn.Config installs handlers of its own, which would stand in front of ours."""
    from uvicorn.config import LOGGING_CONFIG

    LOGGING_CONFIG.clear()
    LOGGING_CONFIG.update(version=1, disable_existing_loggers=False)


def _vllm(folder: Path) -> None:
    """vLLM's loggers, in its engine's process too. One that the operator configures stays the operator's."""
    if "VLLM_LOGGING_CONFIG_PATH" in os.environ:
        return
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "monitor.logs.JsonFormatter"}},
        "handlers": {"stderr": {"class": "monitor.logs.Stderr", "formatter": "json"}},
        "loggers": {"vllm": {"handlers": ["stderr"], "level": level, "propagate": False}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vllm-logging.json"
    fresh = folder / f"vllm-logging.{os.getpid()}"
    fresh.write_text(json.dumps(config))
    fresh.replace(file)  # another server may be reading it
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(file)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        logging.getLogger("midstream").critical("uncaught", exc_info=(kind, error, trace))
