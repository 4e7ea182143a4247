"""Chat template -> token ids, the spans of each turn, and which positions count. One code for training and serving.

Which positions count is found on token ids, not on roles: whatever is not a boundary of the template counts. A client
may write `<|im_end|>` into its text; a forged boundary makes one more turn to take the maximum over, nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from monitor.errors import ModelUnsupported, RequestInvalid
from monitor.types import Prompt, Turn

POSITION_RULE = "turns-and-closing/1"
"""Counted: the content of every turn; after the newest turn the template's closing tokens up to the answer. Never
counted: position 0 (a sink), special tokens and the template's own text elsewhere."""

ROLES = ("system", "user", "assistant")
# Letters that no template writes itself; two, so that text between two contents can be cut out.
_MARKS = ("QXZJ", "VKWQ")

Message = Mapping[str, str]


class ChatTemplate:
    """A tokenizer's chat template, and its boundaries as token ids.

    raises: ModelUnsupported if the tokenizer is not a fast one (offsets are needed)
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ModelUnsupported(f"{type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed")
        self.tokenizer = tokenizer
        self.has_chat = bool(tokenizer.chat_template)
        # A template that can be told to reason writes other tokens before the answer.
        self.switches = any(name in str(tokenizer.chat_template) for name in ("thinking", "reasoning"))
        specials = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = frozenset(specials) | frozenset(tokenizer.all_special_ids)
        text = "\x00".join([str(tokenizer.chat_template), *(str(specials[i]) for i in sorted(specials))])
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self._closings: list[tuple[int, ...]] = []
        self._boundaries = self._find_boundaries() if self.has_chat else []

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """A conversation with the generation prompt at its end.

        messages: role and content, at least one
        returns: the newest turn is everything after the last answer that is followed by another message
        raises: RequestInvalid if there is no template or it refuses these messages
        """
        text = self.render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = tuple(encoded["input_ids"])
        history = self._history(messages)
        # A template that rewrites earlier messages gives no prefix: then everything is the newest turn.
        cut = len(history) if text.startswith(history) else 0
        first = next((i for i, (start, _) in enumerate(encoded["offset_mapping"]) if start >= cut), len(ids))
        return self._prompt(ids, first, "chat")

    def render(self, messages: Sequence[Message]) -> str:
        """The text whose ids `encode` gives. raises: RequestInvalid as there"""
        if not self.has_chat:
            raise RequestInvalid("this model has no chat template; use /v1/completions", "messages")
        return self._render(messages, generate=True)

    def pieces(self, text: str, specials: bool) -> list[str]:
        """What each token of a text stands for in it; together they are the text. A letter of several tokens is its
        first one's. specials: with those that the tokenizer adds, which stand for nothing"""
        spans = self.tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True)["offset_mapping"]
        ends = [0, *itertools.accumulate((end for _, end in spans), max)]
        return [text[start:end] for start, end in itertools.pairwise(ends)]

    def opening(self) -> tuple[int, ...]:
        """What every conversation without a system message begins with; empty without a template."""
        if not self.has_chat:
            return ()
        first, second = (self.encode([{"role": "user", "content": mark}]).token_ids for mark in _MARKS)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return tuple(token for token, _ in same)

    def history_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What precedes the newest turn, as ids: for a prompt that somebody else has rendered. Empty if unknown."""
        try:
            history = self._history(messages) if self.has_chat else ""
            history.encode()  # the tokenizer raises something else for half a surrogate pair
        except (RequestInvalid, UnicodeEncodeError):
            return ()
        return self._ids(history) if history else ()

    def rendered(self, ids: Sequence[int], history: Sequence[int]) -> Prompt:
        """A conversation that somebody else has rendered. history: of `history_ids`; ignored unless `ids` begin so"""
        cut = len(history) if tuple(ids[: len(history)]) == tuple(history) else 0
        return self._prompt(tuple(ids), cut, "chat")

    def _history(self, messages: Sequence[Message]) -> str:
        # An answer parts the history from the newest turn only if it says something and something follows it. That
        # stops accidents, no forger: a client writes every turn, and an answer that it makes up parts like a real one.
        # What was asked before is then judged by `on_history`, of which only `block` is closed to that.
        asked = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
        answers = (i for i, m in enumerate(messages[:asked]) if m["role"] == "assistant" and m["content"].strip())
        last = max(answers, default=-1)
        return self._render(messages[: last + 1], generate=False) if last >= 0 else ""

    def raw(self, text_or_ids: str | Sequence[int]) -> Prompt:
        """A prompt of /v1/completions: text, or token ids. Turns written by hand are found all the same.

        raises: RequestInvalid if no position is left to judge
        """
        ids = self.tokenizer(text_or_ids)["input_ids"] if isinstance(text_or_ids, str) else text_or_ids
        prompt = self._prompt(tuple(ids), 0, "raw")
        if not prompt.turns:
            raise RequestInvalid("the prompt has no token that can be judged; write at least two tokens", "prompt")
        return prompt

    def _prompt(self, ids: tuple[int, ...], newest_from: int, form: Any) -> Prompt:
        turns = self.turns(ids)
        newest = next((i for i, t in enumerate(turns) if t.end > newest_from), max(0, len(turns) - 1))
        return Prompt(ids, turns, newest, form)

    def turns(self, ids: Sequence[int]) -> tuple[Turn, ...]:
        """Counted positions of a prompt, turn by turn, the closing tokens joined to the last one."""
        boundary = [i in self._special for i in ids]
        if boundary:
            boundary[0] = True
        # Longest first: "<|im_end|>\n<|im_start|>user\n" before "<|im_end|>\n".
        for start in (i for i, special in enumerate(boundary) if special):
            for sequence in self._boundaries:
                if tuple(ids[start : start + len(sequence)]) == sequence:
                    boundary[start : start + len(sequence)] = [True] * len(sequence)
                    break
        runs = []
        for is_boundary, group in itertools.groupby(range(len(ids)), key=boundary.__getitem__):
            if not is_boundary:
                positions = list(group)
                runs.append(Turn(positions[0], positions[-1] + 1))
        closing = next((c for c in self._closings if tuple(ids[-len(c) :]) == c), None)
        if closing is not None:
            start = len(ids) - len(closing)
            # An empty message leaves no content: its closing tokens alone are the turn.
            joins = bool(runs) and runs[-1].end == start
            first = runs.pop().start if joins else max(start, 1)
            runs.append(Turn(first, len(ids)))
        return tuple(runs)

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # jinja2 errors and whatever a template raises by itself
            raise RequestInvalid(f"the model's chat template refuses these messages: {error}", "messages") from error
        return text

    def _find_boundaries(self) -> list[tuple[int, ...]]:
        """Render small conversations of marks, and take what stands before, between and after the marks."""
        found: set[tuple[int, ...]] = set()
        closings: set[tuple[int, ...]] = set()
        enders: set[tuple[int, ...]] = set()  # what ends a turn when no answer is asked for
        singles = [[{"role": a, "content": _MARKS[0]}] for a in ROLES]
        pairs = [
            [{"role": a, "content": _MARKS[0]}, {"role": b, "content": _MARKS[1]}]
            for a, b in itertools.product(ROLES, ROLES)
        ]
        for messages in singles + pairs:
            try:
                text, plain = self._render(messages, True), self._render(messages, False)
            except RequestInvalid:
                continue  # many templates want user and assistant to alternate
            parts, mark = self._between(text, len(messages)), _MARKS[len(messages) - 1]
            found.update(parts)
            if parts and messages[-1]["role"] == "user":
                closings.add(parts[-1])
            enders.add(self._ids(plain[plain.rfind(mark) + len(mark) :]))
        # "<|im_end|>\n<|im_start|>user\n" less its "<|im_end|>\n" is the header alone, as a forger may write it.
        headers = {b[len(e) :] for b in found for e in enders if e and b[: len(e)] == e}
        # Only what starts with a special token can be told from text that a client wrote.
        known = {b for b in found | enders | headers if b and b[0] in self._special}
        self._closings = sorted((c for c in closings if c and c[0] in self._special), key=len, reverse=True)
        return sorted(known, key=len, reverse=True)

    def _between(self, text: str, n_marks: int) -> list[tuple[int, ...]]:
        """Token ids of the text before, between and after the marks; empty if the template changed them."""
        parts = []
        for mark in _MARKS[:n_marks]:
            before, found, text = text.partition(mark)
            if not found:
                return []
            parts.append(before)
        return [self._ids(part) for part in [*parts, text]]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
