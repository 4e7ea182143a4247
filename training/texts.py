"""Rows as the model reads them: token ids, and the span of the turn that a row's label is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from monitor.engines.embedded.harvest import residual_streams
from monitor.engines.embedded.model import LoadedModel
from monitor.types import Format, Prompt, Turn
from training.data import Row


@dataclass(frozen=True, slots=True)
class Reader:
    """max_tokens: a text, and an answer, is cut after so many"""

    model: LoadedModel
    max_tokens: int

    def prompt(self, text: str, form: Format = "chat") -> Prompt:
        """A text as a user's whole conversation, or as a raw prompt."""
        template = self.model.template
        text = self.cut(text)
        return template.raw(text) if form == "raw" else template.encode([{"role": "user", "content": text}])

    def answer(self, text: str) -> tuple[int, ...]:
        """An answer's tokens, as they would have been sampled."""
        return tuple(self.model.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_tokens])

    def labelled(self, row: Row) -> Prompt:
        """The row with the turn that its label is about as the newest one: the text, or the answer to it."""
        prompt = self.prompt(row.text)
        return self.answered(prompt, row.answer) if row.answer else prompt

    def answered(self, prompt: Prompt, answer: str) -> Prompt:
        """The prompt with an answer to it as its newest turn."""
        ids = (*prompt.token_ids, *self.answer(answer))
        return Prompt(ids, (*prompt.turns, Turn(len(prompt.token_ids), len(ids))), len(prompt.turns), "chat")

    def cut(self, text: str) -> str:
        offsets = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= self.max_tokens else text[: offsets[self.max_tokens - 1][1]]

    def streams(
        self, rows: Sequence[Row], layers: Sequence[int], tick: Callable[[int], None] = lambda n: None
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """(index, {layer: (n_counted, d_model) float32}) of the turn that each row's label is about, shortest first."""
        prompts = [self.labelled(r) for r in rows]
        for index, streams in residual_streams(self.model, prompts, layers, tick):
            turn = prompts[index].turns[-1]
            yield index, {layer: streams[layer][turn.start : turn.end] for layer in layers}
