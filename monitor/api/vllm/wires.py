"""The routes that generate, and what a block looks like on each."""

from __future__ import annotations

from monitor.api.vllm.choices import ChatWire, CompletionWire
from monitor.api.vllm.items import MessagesWire, ResponsesWire
from monitor.api.vllm.wire import Wire

WIRES: dict[str, type[Wire]] = {
    "/v1/chat/completions": ChatWire,
    "/v1/chat/completions/batch": ChatWire,
    "/v1/completions": CompletionWire,
    "/v1/responses": ResponsesWire,
    "/v1/messages": MessagesWire,
}
"""The routes that generate. A route that is not here and generates does not exist (see `mount`)."""
