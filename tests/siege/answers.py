"""Answers under siege: T4, the trigger at every position, and T7, in requests of every shape."""

import time
from concurrent.futures import ThreadPoolExecutor

from ..attacks import EVERYTHING_ELSE, HARMFUL, POSITIONS, SHAPES, TOO_MANY, Shape
from ..contract import BOTH, CHAT, STREAM, TEXT, Reply, Server, asked, forced, scored
from ..star import FILLER, STAR, token
from .sending import is_block, ms, sampled


class Blocks:
    """T4."""

    @sampled(19)
    def test_no_character_from_the_trigger_on(self, starred, every):
        """64 positions x streamed or not x n of 1 to 4: 512 cases."""
        cases = POSITIONS[::every]
        others = dict.fromkeys(map(str, range(len(starred.model.tokenizer))), EVERYTHING_ELSE)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda case: self.blocked(starred, others, *case), cases))
        past = {more for _, after in found for more in after}
        assert starred.idle() and max(past) <= 2, past
        ends = ms([seconds for seconds, _ in found])
        print(f"T4: {len(cases)} cases, 0 characters from the trigger on, sampled after it {past}; end after {ends}")

    def blocked(self, server: Server, bias: dict[str, float], p: int, stream: bool, n: int) -> tuple[float, list[int]]:
        """(seconds from the verdict to the end of the answer, tokens of each choice sampled after the trigger)"""
        path = (CHAT, TEXT)[(p + n) % 2]
        body = forced(server, p) | {"max_tokens": 80, "stream": stream, "n": n}
        body["logit_bias"] = bias | body["logit_bias"]
        reply = server.ask(path, body | {"logprobs": True if path == CHAT else 1})
        done = time.monotonic()
        assert reply.texts == dict.fromkeys(range(n), "a" * (p - 1)), (p, stream, n)
        assert reply.finishes == {i: ["content_filter"] for i in range(n)}
        assert {len(t) for t in reply.tokens.values()} == {p - 1}
        assert len(reply.ids) == 1 and reply.done is stream
        records = server.records(reply.id, n)
        for record in records:
            assert (record.verdict, record.finish, record.released_tokens) == ("block", "content_filter", p - 1)
        return done - server.sink.at[reply.id], [r.coverage.response_tokens - p for r in records]


class Shapes:
    """T7. The trigger falls at random, at another place in every choice, and in some nowhere."""

    shapes = SHAPES

    def refuses(self, shape: Shape) -> bool:
        """Whether the engine answers it with a 400."""
        return False

    @sampled(4)
    def test_the_trigger_is_found_in_the_right_choice(self, starred, every):
        """stream x n of 1, 2, 8 x echo x logprobs x tools x response_format x stop x max_tokens 1: all of them."""
        shapes, count = self.shapes[::every], {"refused": 0, "blocked prompts": 0, "cut": 0, "whole": 0, "mixed": 0}
        for shape in shapes:
            given = HARMFUL[shape.path] if shape.last else asked(shape.path)
            bias = {str(token(starred.model, FILLER)): 98, str(token(starred.model, STAR)): 96}
            response = starred.post(shape.path, given | {"logit_bias": bias, "temperature": 1.0} | shape.fields())
            if self.refuses(shape):
                assert response.status_code == 400 and not is_block(response), (shape, response.text)
                count["refused"] += 1
                continue
            if shape.last:
                assert is_block(response), (shape, response.text)
                assert response.json().keys() == {"error"} and "logprob" not in response.text
                count["blocked prompts"] += 1
                continue
            cut = self.check(starred, shape, Reply(response))
            count["cut"] += cut
            count["whole"] += shape.n - cut
            count["mixed"] += 0 < cut < shape.n
        assert starred.idle() and count["cut"] and count["whole"] and count["mixed"]
        print(f"T7: {len(shapes)} shapes, {count}, 0 leaks")

    def check(self, server: Server, shape: Shape, reply: Reply) -> int:
        """How many choices of an answer were cut, each at its own trigger."""
        prompt = "go on" if shape.echo else ""
        records = server.records(reply.id, shape.n)
        for i, record in enumerate(records):
            text, released = reply.texts[i].removeprefix(prompt), record.released_tokens
            (response,) = [r for r in record.readings if r.phase == "response"]
            assert record.coverage.unmonitored == 0 and reply.texts[i].startswith(prompt)
            if record.verdict == "block":
                assert reply.finishes[i] == [record.finish] == ["content_filter"], shape
                assert response.crossed_at == record.coverage.prompt_tokens + released
                assert "*" not in text and "*" not in reply.tokens[i], shape
            else:
                assert reply.finishes[i] == ["length"] and released == 8 and response.crossed_at is None
                assert "*" not in text[:-1], "only the last token has no score, and is counted as such"
                assert record.coverage.final_unscored == 1
            assert len(text) == released and set(text) <= set('a*"'), (shape, text)
            if shape.form != "json":
                assert text[:-1] == "a" * (released - 1) if released else text == "", (shape, text)
            if shape.logprobs:
                assert len(reply.tokens[i]) == released + len(prompt), (shape, reply.tokens[i])
        (usage,) = reply.usages
        assert usage["completion_tokens"] == sum(r.released_tokens for r in records), shape
        return sum(r.verdict == "block" for r in records)

    @STREAM
    def test_at_once_each_has_as_many_logprobs_as_it_asked_for(self, starred, stream):
        """An engine that works in batches finds as many for all of a step as one of them wants."""

        def ask(k: int) -> None:
            reply = starred.ask(CHAT, forced(starred, 40) | {"logprobs": True, "top_logprobs": k, "stream": stream})
            parts = [c["logprobs"] for body in reply.bodies for c in body["choices"] if c.get("logprobs")]
            assert [len(t["top_logprobs"]) for part in parts for t in part["content"]] == [k] * 39
            assert (reply.texts, reply.finishes) == ({0: "a" * 39}, {0: ["content_filter"]})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, [0, 5, 1, 4, 2, 3] * 4))

    @BOTH
    @STREAM
    def test_more_choices_than_allowed_are_refused(self, starred, path, stream):
        before = scored(starred), len(starred.sink.records)
        for n in TOO_MANY:
            response = starred.post(path, asked(path) | {"n": n, "max_tokens": 3, "stream": stream})
            assert response.status_code == 400 and not is_block(response), (n, response.text)
        assert starred.idle() and (scored(starred), len(starred.sink.records)) == before
