"""One answer that is read along: its second judge, its policies and its bounds, without a network."""

import asyncio

import pytest

from monitor.policy.rule import Policy, Second
from monitor.types import Action, Caller, Terms
from monitor.upstream.choice import Choice, Lag, Setting

from .fake_observer import FakeObserver, rules

UNSURE = 0.0  # between what is harmless and what is harmful


class Judged:
    """A choice, and what was published and asked."""

    def __init__(self, observer=None, lag=None, second=None, prompt="go", **rule):
        self.observer, self.published, self.questions = observer or FakeObserver(), [], []
        setting = Setting(
            "id",
            Caller(route="chat"),
            "far",
            self.observer,
            lag or Lag(),
            self._ask,
            self.published.append,
            self._scored,
        )
        policy = Policy(rules(**rule), Terms(), second or Second())
        self.prompt = self.observer.template.encode([{"role": "user", "content": prompt}])
        self.choice = Choice(setting, 0, self.prompt, policy)
        self.scored = 0

    def _ask(self, policy, ids, answered):
        self.questions.append((self.observer.tokenizer.decode(ids), answered))

    def _scored(self, seconds, n):
        self.scored += n

    async def begin(self):
        stream = self.choice.stream = await self.observer.open(self.prompt.token_ids)
        await self.choice.read_prompt(stream.scores)
        return self.choice


class Unsure(FakeObserver):
    def rows(self, ids):
        rows = super().rows(ids)
        rows[rows > 0] = UNSURE
        return rows


def test_what_the_second_judge_is_asked_about_waits_for_it():
    async def run(second):
        judged = Judged(Unsure(), escalate=-1.0, second=Second(weight=0.9))
        choice = await judged.begin()
        woken = []
        choice.changed = lambda: woken.append(True)
        choice.add("one *two three four", "content")
        await choice.read()
        assert choice.released == len("one ") and not choice.ended
        ((asked, answered),) = judged.questions
        assert asked.endswith("one *")
        await choice.read(pause=True)
        assert choice.released == len("one ")
        answered(second)
        assert woken
        return judged

    async def blocked():
        judged = await run(9.0)
        assert judged.choice.blocked and judged.choice.released == len("one ")
        assert [r.finish for r in judged.published] == ["content_filter"]
        assert judged.observer.streams[0].closed

    async def cleared():
        judged = await run(-9.0)
        choice = judged.choice
        assert not choice.ended and choice.released == len("one *two three four")
        await choice.read("stop")
        assert judged.published[0].escalations[0].result == "clear"

    async def failed():
        judged = await run(None)
        assert judged.choice.cut and judged.published[0].finish == "unmonitored"

    for case in (blocked, cleared, failed):
        asyncio.run(case())


def test_an_end_waits_for_the_second_judge():
    async def run():
        judged = Judged(Unsure(), escalate=-1.0, second=Second(weight=0.9))
        choice = await judged.begin()
        choice.add("one *", "content")
        ending = asyncio.create_task(choice.read("stop"))
        while not judged.questions:
            await asyncio.sleep(0)
        assert not choice.ended and choice.released == len("one ")
        judged.questions[0][1](-9.0)
        await ending
        assert choice.ended and choice.released == len("one *")
        assert judged.published[0].finish == "stop"

    asyncio.run(run())


def test_an_answer_that_comes_too_late_does_not_stop_the_loop():
    """The first question has overflown and is forgotten; while the second one waits, everything else goes on."""

    async def run():
        judged = Judged(
            Unsure(), escalate=-1.0, fail_mode="open", second=Second(weight=0.9, recheck_tokens=1, max_held=2)
        )
        choice = await judged.begin()
        choice.add("*", "content")
        await choice.read(pause=True)
        assert len(judged.questions) == 1
        choice.add("one two", "content")
        await choice.read(pause=True)
        assert choice.watch.question is None and not choice.ended
        choice.add("*", "content")
        ending = asyncio.create_task(choice.read("stop"))
        while choice.watch.question is None or len(judged.questions) < 2:
            await asyncio.sleep(0)
        judged.questions[0][1](-9.0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not ending.done()
        judged.questions[-1][1](-9.0)
        await asyncio.wait_for(ending, 5)
        assert choice.ended

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(("second", "finish"), [(9.0, "content_filter"), (-9.0, None), (None, "unmonitored")])
def test_a_prompt_waits_for_the_second_judge(second, finish):
    async def run():
        judged = Judged(Unsure(), escalate=-1.0, second=Second(weight=0.9), prompt="g*")
        beginning = asyncio.create_task(judged.begin())
        while not judged.questions:
            await asyncio.sleep(0)
        assert not beginning.done()
        judged.questions[0][1](second)
        choice = await beginning
        assert choice.watch.finish == finish and choice.released == 0
        choice.end("aborted")

    asyncio.run(run())


def test_texts_of_other_channels_are_parted_by_a_line_end():
    async def run():
        judged = Judged()
        choice = await judged.begin()
        assert choice.add("so", "reasoning") == 0 and choice.add(" far", "reasoning") == 2
        assert choice.add("yes", "content") == len("so far\n")
        await choice.read("stop")
        ids = judged.observer.streams[0].read_ids
        assert judged.observer.tokenizer.decode(ids) == "so far\nyes"
        assert judged.scored == len(ids) == judged.published[0].released_tokens

    asyncio.run(run())


@pytest.mark.parametrize("n", [1, 16, 17, 100])
def test_a_read_is_never_larger_than_the_bound(n):
    async def run():
        judged = Judged(lag=Lag(tokens=16))
        judged.observer.most = 16
        choice = await judged.begin()
        choice.add("x" * n, "content")
        await choice.read("length")
        (record,) = judged.published
        assert (record.finish, record.coverage.response_scored) == ("length", n)

    asyncio.run(run())


def test_nothing_is_read_behind_a_block():
    async def run():
        judged = Judged(lag=Lag(tokens=16))
        choice = await judged.begin()
        choice.add("x" * 20 + "*" + "y" * 100, "content")
        await choice.read("stop")
        assert choice.blocked and choice.released == 20
        assert len(judged.observer.streams[0].read_ids) == 32
        (record,) = judged.published
        assert record.verdict is Action.BLOCK and record.released_tokens == 20

    asyncio.run(run())


def test_an_end_of_ours_keeps_what_was_judged():
    async def run():
        judged = Judged()
        choice = await judged.begin()
        choice.add("one two three", "content")
        await choice.read()
        choice.end("aborted")
        choice.end("engine_error")
        await choice.read("stop")
        (record,) = judged.published
        assert record.finish == "aborted" and 0 < record.released_tokens < len("one two three")
        assert judged.observer.streams[0].closed

    asyncio.run(run())
