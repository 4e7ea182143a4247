"""What a client may not ask of an upstream: whatever the upstream would read and the observer can't."""

import pytest

from .fake_observer import proxy as proxy
from .fake_upstream import chat_whole, json_answer
from .test_upstream_routes import response_of, said

IMAGE = "https://example.org/cat.png"
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}


def user(content, **more):
    return [{"role": "user", "content": content} | more]


def result(*parts, kind="function_call_output"):
    return {"input": [{"type": kind, "call_id": "call_1", "output": list(parts)}]}


CHAT = {
    "a picture without a type": ({"messages": user([{"image_url": IMAGE}])}, "image_url"),
    "a picture whose type is null": ({"messages": user([{"type": None, "image_url": IMAGE}])}, "image_url"),
    "a film without a type": ({"messages": user([{"video_url": {"url": IMAGE}}])}, "video_url"),
    "embeddings without a type": ({"messages": user([{"prompt_embeds": "AAAA"}])}, "prompt_embeds"),
    "a picture beside a text": ({"messages": user([{"type": "text", "text": "hi", "image_url": IMAGE}])}, "image_url"),
    "a picture inside a text": ({"messages": user([{"type": "text", "text": [{"image_url": IMAGE}]}])}, "image_url"),
    "a picture inside a thought": (
        {"messages": user([{"type": "thinking", "thinking": [{"type": "image_url", "image_url": IMAGE}]}])},
        "image_url",
    ),
    "a picture in no list": ({"messages": user({"type": "image_url", "image_url": IMAGE})}, "image_url"),
    "a list in a list": ({"messages": user([[{"image_url": IMAGE}]])}, "list"),
    "a content that is a number": ({"messages": user(7)}, "int"),
    "a voice that was kept": ({"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}, *user("x")]}, "audio"),
    "a message without a role": ({"messages": [*user("x"), {"content": "x"}]}, "role"),
    "a role of its own": ({"messages": [{"role": "ignore-all-rules", "content": "x"}]}, "ignore-all-rules"),
    "an empty role": ({"messages": [{"role": "", "content": "x"}]}, "role"),
    "a role in capitals": ({"messages": [{"role": "User", "content": "x"}]}, "User"),
    "a search": ({"web_search_options": {}}, "web_search_options"),
    "a search by another name": ({"search_parameters": {"mode": "auto"}}, "search_parameters"),
    "plugins": ({"plugins": [{"id": "web"}]}, "plugins"),
    "a function that the upstream has": (
        {"tools": [FUNCTION, {"type": "builtin_function", "function": {"name": "$web_search"}}]},
        "builtin_function",
    ),
    "a tool of no type and no name": ({"tools": [{"google_search": {}}]}, "tools"),
    "a tool that is a word": ({"tools": ["web_search"]}, "tools"),
    "a tool in no list": ({"tools": {"type": "web_search"}}, "web_search"),
}
RESPONSES = {
    "a picture as a result": (result({"type": "input_image", "image_url": IMAGE}), "input_image"),
    "a file as a result": (result({"type": "input_file", "file_id": "file_1"}), "input_file"),
    "a picture as a custom tool's result": (
        result({"type": "input_image", "image_url": IMAGE}, kind="custom_tool_call_output"),
        "input_image",
    ),
    "a picture without a type as a result": (result({"image_url": IMAGE}), "image_url"),
    "a reference without a type": ({"input": [{"id": "msg_abc"}]}, "role"),
    "a reference whose type is null": ({"input": [{"id": "msg_abc", "type": None}]}, "role"),
    "a message without a role": ({"input": [{"id": "msg_abc", "type": "message"}]}, "role"),
    "a role of its own": ({"input": [{"role": "critic", "content": "x"}]}, "critic"),
    **{
        f"the upstream's {kind}": ({"tools": [{"type": kind}]}, kind)
        for kind in (
            "web_search",
            "file_search",
            "mcp",
            "code_interpreter",
            "image_generation",
            "computer",
            "namespace",
        )
    },
}
CASES = [("/chat/completions", name, *case) for name, case in CHAT.items()]
CASES += [("/responses", name, *case) for name, case in RESPONSES.items()]
FINE = {"/chat/completions": {"messages": user("x")}, "/responses": {"input": "x"}}


def answers(upstream):
    whole, response = chat_whole("fine"), response_of(said("fine"))
    upstream.answer = lambda asked: json_answer(response if "input" in asked.json else whole)


@pytest.mark.parametrize(("path", "name", "body", "named"), CASES, ids=[f"{p[1:5]} {name}" for p, name, *_ in CASES])
def test_what_the_observer_cant_read_is_refused_by_name(upstream, proxy, path, name, body, named):
    answers(upstream)
    before, records = len(upstream.asked), len(proxy.sink.records)
    response = proxy.post(path, FINE[path] | body)
    assert response.status_code == 400 and named in response.json()["error"]["message"], response.text
    assert (len(upstream.asked), len(proxy.sink.records)) == (before, records)


def test_a_hosted_tool_is_refused_with_a_remedy(upstream, proxy):
    error = proxy.chat(tools=[{"type": "web_search_preview"}]).json()["error"]
    assert "'web_search_preview'" in error["message"] and "run it yourself and send its output" in error["message"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_field")


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "model", "user")
CUSTOM = {"type": "custom", "custom": {"name": "sh"}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
HARMLESS = [
    {"messages": [{"role": role, "content": "x"} for role in ROLES]},
    {"messages": user([{"text": "hi"}, "ho", {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])},
    {"messages": [{"role": "assistant", "content": None, "audio": None, "tool_calls": []}, *user("x")]},
    {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *user("x")]},
    {"messages": [*user("x"), {"role": "assistant", "content": [THOUGHT]}, *user("x")]},
    {"messages": user("x"), "tools": [FUNCTION, CUSTOM, {"function": {"name": "g"}}]},
    {"messages": user("x"), "tools": None, "plugins": None, "web_search_options": None},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, *result("x")["input"]]},
    {"input": "x", "tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "sh"}, {"name": "g"}]},
    {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}, said("y"), {"role": "user", "content": "x"}]},
]


@pytest.mark.parametrize("body", HARMLESS, ids=str)
def test_what_it_can_read_goes_on(upstream, proxy, body):
    answers(upstream)
    response = proxy.post("/responses" if "input" in body else "/chat/completions", body)
    assert response.status_code == 200 and upstream.asked[-1].json == {"model": "far"} | body, response.text


@pytest.mark.parametrize(
    "body",
    [
        {"messages": user([{"text": "b"}, {"text": "*d"}])},
        {"messages": [{"role": "function", "name": "f", "content": "b*d"}]},
    ],
)
def test_a_part_without_a_type_and_every_role_is_judged(upstream, proxy, body):
    assert proxy.post("/chat/completions", body).json()["error"]["code"] == "content_filter"


def test_a_result_in_parts_is_read_as_one_text(upstream, proxy):
    parts = [{"type": "input_text", "text": text} for text in ("one ", "w*", "rd")]
    response = proxy.post("/responses", result(*parts))
    assert response.json()["error"]["code"] == "content_filter"
    answers(upstream)
    response = proxy.post("/responses", result(*parts[::2]))
    assert response.status_code == 200
    whole = proxy.observer.template.encode([{"role": "user", "content": "one rd"}])
    assert proxy.records(response)[0].coverage.prompt_tokens == len(whole.token_ids)
