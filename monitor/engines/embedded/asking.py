"""The second judge beside the engine: questions go to its thread, answers wait for the next step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from monitor.engines.embedded.generation import Generation
from monitor.policy.second import Asker
from monitor.question import Question

Answer = tuple[Generation, Question, float | None]


class Asking:
    """wake: the engine's lock, notified when an answer has come; spell: token ids -> text"""

    def __init__(self, wake: threading.Condition, spell: Callable[[Sequence[int]], str]) -> None:
        self._wake, self._spell = wake, spell
        self._asker = Asker()
        self._answers: list[Answer] = []

    @property
    def answered(self) -> bool:
        return bool(self._answers)

    def ask(self, sequence: Generation) -> None:
        """Hand a question that is new to the second judge's thread."""
        question = sequence.watch.question
        if question is None or question is sequence.asked:
            return
        sequence.asked = question
        how = sequence.probes.live.second(sequence.policy.terms.policy)
        if how is None:  # the policy was replaced by one without a second judge
            self._came(sequence, question, None)
            return
        read = sequence.tokens[: question.n_read]
        self._asker.ask(how, lambda: self._spell(read), lambda z: self._came(sequence, question, z))

    def _came(self, sequence: Generation, question: Question, second: float | None) -> None:
        with self._wake:
            self._answers.append((sequence, question, second))
            self._wake.notify()

    def take(self) -> list[Answer]:
        """What has come since the last call, of questions that are still open."""
        with self._wake:
            answers, self._answers = self._answers, []
        return [answer for answer in answers if answer[0].watch.question is answer[1]]

    def close(self) -> None:
        self._asker.close()
