"""JSON of the admin port: a number that is not finite is missing, and missing is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def json_response(content: Any) -> Response:
    return Response(dumped(content), media_type="application/json")


def dumped(content: Any) -> bytes:
    return json.dumps(_plain(content), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
