"""A wire whose call has blocked choices, and what goes out of it for vLLM's events."""

from monitor.api.vllm.wire import parse_event, sse
from monitor.engines.vllm.call import Call


def blocked(wire, *indices, first=None):
    """A wire of that class whose call has these choices blocked. first: the first event that went out"""
    call = Call("chat", "chat", blocked=dict.fromkeys(indices, 0))
    made = wire(call)
    made.first = b"" if first is None else sse(None, first).split(b"\n\n")[0]
    return made


def sent(wire, *events):
    """What goes out for these events, parsed. An event is its data, or None for [DONE]."""
    raw = b"".join(part for data in events for part in wire.event(data and data.get("type"), data))
    assert raw.endswith(b"\n\n") or not raw
    return [parse_event(event) for event in raw.split(b"\n\n")[:-1]]
