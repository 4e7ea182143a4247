"""Answers where nothing fires: what comes back is OpenAI's, to the token, streamed or not."""

import pytest

from .exchange import BOTH, CHAT, STREAM, TEXT, asked, endless, forced, logprobs, user


class Answers:
    """Nothing fires: what comes back is OpenAI's, streamed or not."""

    @pytest.mark.parametrize("n", [1, 2])
    def test_the_chat_client_reads_the_same_streaming_or_not(self, calm, n):
        more = endless(calm) | {"model": calm.model.name, "messages": user("hi"), "max_tokens": 12, "n": n}
        whole = calm.api.chat.completions.create(**more)
        options = {"include_usage": True}
        chunks = list(calm.api.chat.completions.create(**more, stream=True, stream_options=options))
        texts, finishes = [""] * n, [[] for _ in range(n)]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] += [choice.finish_reason] if choice.finish_reason else []
        assert texts == [c.message.content for c in whole.choices] and all(texts)
        assert finishes == [[c.finish_reason] for c in whole.choices] == [["length"]] * n
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
        assert whole.usage.completion_tokens == 12 * n
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}

    @pytest.mark.parametrize("n", [1, 2])
    def test_the_completions_client_reads_the_same_streaming_or_not(self, calm, n):
        more = endless(calm) | {"model": calm.model.name, "prompt": "once upon", "max_tokens": 12, "n": n}
        whole = calm.api.completions.create(**more)
        chunks = list(calm.api.completions.create(**more, stream=True, stream_options={"include_usage": True}))
        texts, finishes = [""] * n, [[] for _ in range(n)]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.text
            finishes[choice.index] += [choice.finish_reason] if choice.finish_reason else []
        assert texts == [c.text for c in whole.choices] and all(texts)
        assert finishes == [[c.finish_reason] for c in whole.choices] == [["length"]] * n
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
        assert whole.usage.completion_tokens == 12 * n
        assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"text_completion"}

    @BOTH
    def test_a_greedy_answer_is_the_same_streaming_or_not(self, calm, path):
        """Whatever the model says by itself, half a character at the end included."""
        body = {"temperature": 0, "max_tokens": 16} | asked(path, "Once upon a time")
        whole, streamed = calm.ask(path, body), calm.ask(path, body | {"stream": True})
        assert (whole.texts, whole.finishes) == (streamed.texts, streamed.finishes)
        first, second = calm.records(whole.id) + calm.records(streamed.id)
        assert first.coverage == second.coverage
        assert first.released_tokens == second.released_tokens

    @BOTH
    def test_a_stream_has_one_id_one_ending_per_choice_and_done(self, calm, path):
        reply = calm.ask(path, endless(calm) | {"stream": True, "n": 3, "max_tokens": 4})
        assert reply.done and len(reply.ids) == 1
        assert reply.finishes == {i: ["length"] for i in range(3)}
        assert reply.usages == [], "nobody asked for it"
        assert {r.released_tokens for r in calm.records(reply.id, 3)} == {4}

    @BOTH
    @STREAM
    def test_every_token_has_its_logprob(self, calm, path, stream):
        body = endless(calm) | logprobs(path) | {"max_tokens": 6, "stream": stream, "n": 2}
        reply = calm.ask(path, body | forced(calm, 5, "b"))
        assert reply.texts == {0: "aaaaba", 1: "aaaaba"}
        assert reply.tokens == {0: list("aaaaba"), 1: list("aaaaba")}

    @BOTH
    @STREAM
    def test_a_stop_string_ends_the_answer_before_it(self, calm, path, stream):
        for stop, text in (("!", "aaaa"), ("aa!", "aa"), (["zz", "a!"], "aaa")):
            reply = calm.ask(path, forced(calm, 5, "!") | {"max_tokens": 9, "stream": stream, "stop": stop})
            assert (reply.texts, reply.finishes) == ({0: text}, {0: ["stop"]})
            (record,) = calm.records(reply.id)
            assert record.finish == "stop" and record.coverage.unmonitored == 0
        assert calm.idle()

    @BOTH
    @STREAM
    def test_the_end_token_ends_the_answer(self, calm, path, stream):
        end = {str(calm.model.tokenizer.eos_token_id): 100}
        reply = calm.ask(path, {"logit_bias": end, "temperature": 0, "max_tokens": 9, "stream": stream})
        assert (reply.texts, reply.finishes) == ({0: ""}, {0: ["stop"]})
        assert calm.records(reply.id)[0].finish == "stop"

    @BOTH
    @STREAM
    def test_an_answer_of_one_token_is_final_and_unscored(self, calm, path, stream):
        reply = calm.ask(path, forced(calm, 5) | {"max_tokens": 1, "stream": stream})
        assert (reply.texts, reply.finishes) == ({0: "a"}, {0: ["length"]})
        coverage = calm.records(reply.id)[0].coverage
        assert (coverage.response_tokens, coverage.final_unscored) == (1, 1)

    @STREAM
    def test_a_list_of_prompts_gives_n_choices_for_each(self, calm, stream):
        body = {"prompt": ["one two", "three"], "n": 2, "max_tokens": 3, "stream": stream} | forced(calm, 9)
        reply = calm.ask(TEXT, body | {"stream_options": {"include_usage": True}} if stream else body)
        assert reply.texts == dict.fromkeys(range(4), "aaa")
        assert reply.finishes == {i: ["length"] for i in range(4)}
        (usage,) = reply.usages
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len("one two") + len("three"), 12)
        prompts = [r.coverage.prompt_tokens for r in calm.records(reply.id, 4)]
        assert prompts == [len("one two")] * 2 + [len("three")] * 2

    def test_a_prompt_of_token_ids(self, calm):
        reply = calm.ask(TEXT, {"prompt": [70, 71, 72], "max_tokens": 2} | forced(calm, 9))
        assert reply.texts == {0: "aa"} and calm.records(reply.id)[0].coverage.prompt_tokens == 3

    def test_usage_counts_what_the_records_count(self, calm):
        reply = calm.ask(CHAT, endless(calm) | {"n": 2, "max_tokens": 5})
        records = calm.records(reply.id, 2)
        (usage,) = reply.usages
        assert usage["completion_tokens"] == sum(r.released_tokens for r in records) == 10
        assert usage["prompt_tokens"] == records[0].coverage.prompt_tokens
