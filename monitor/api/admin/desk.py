"""What lies on a reviewer's desk: the queue, one request with all that is kept of it, and labels. No HTTP here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitor.api.admin.aside import Aside
from monitor.api.admin.feed import Feed
from monitor.api.admin.lensing import Lensing
from monitor.api.spelled import spell_answer, spell_prompt
from monitor.config import Settings
from monitor.errors import ConfigInvalid
from monitor.template import ChatTemplate
from monitor.traffic import (
    Cipher,
    Entry,
    Filter,
    Label,
    Where,
    add_label,
    count_unlabelled,
    find_labels,
    find_records,
    find_said,
    review_queue,
)
from monitor.traffic.labelling import listed, newest_labels, only_choice, request_key, signed
from monitor.traffic.nearest import nearest_queue, threshold_of
from monitor.traffic.review import NoSuchRecord
from monitor.traffic.turns import turns_of


@dataclass(frozen=True, slots=True)
class Page:
    """entries: as JSON has them; next: behind which place the next page begins, None: there is none"""

    entries: list[dict[str, Any]]
    next: tuple[float, int] | None
    around: float | None = None


@dataclass(frozen=True, slots=True)
class Desk:
    """Each call reads or writes the log at once: not on the event loop.

    cipher: opens kept texts, None: there is no key for any; lens: None where this server can't run one
    """

    where: Where
    feed: Feed
    template: ChatTemplate
    cipher: Cipher | None = None
    lens: Lensing | None = None

    @classmethod
    def of(cls, settings: Settings, feed: Feed, template: ChatTemplate, aside: Aside) -> Desk:
        cipher = Cipher(settings.log_key) if settings.log_key else None
        # Another engine's model may be too large for a second copy of it, on a CPU.
        embedded = settings.engine == "embedded" and settings.upstream is None
        lens = Lensing(settings, aside) if embedded and cipher is not None else None
        return cls(settings.log, feed, template, cipher, lens)

    def queue(self, which: Filter, limit: int, after: tuple[float, int] | None) -> Page:
        """The highest value first, what has no score before it. raises: ConfigInvalid"""
        found = review_queue(self.where, which, limit, after)
        return Page(self._shown(found), found[-1].place if len(found) == limit else None)

    def nearest(self, which: Filter, limit: int, around: float | None, after: tuple[float, int] | None) -> Page:
        """around: None is the threshold that the newest records were judged by. raises: ConfigInvalid"""
        if around is None and which.probe is not None and which.phase is not None:
            around = threshold_of(self.where, which.probe, which.phase)
            if around is None:
                raise ConfigInvalid(f"probe {which.probe!r} has no threshold for {which.phase}; order by value instead")
        found = nearest_queue(self.where, which, around or 0.0, limit, after)
        return Page(self._shown(found), found[-1].place if len(found) == limit else None, around)

    def _shown(self, found: list[Entry]) -> list[dict[str, Any]]:
        known = newest_labels(self.where, [entry.place[1] for entry in found]) if found else {}
        return [_entry(entry) | {"label": known.get(entry.place[1])} for entry in found]

    def counts(self) -> dict[str, Any]:
        """How much waits: asked after every label, so no more than one small index is read. raises: ConfigInvalid"""
        return {"unlabelled": count_unlabelled(self.where)}

    def request(self, request_id: str, choice: int | None) -> dict[str, Any]:
        """All that is kept of one choice, and which there are: of all of them it would be a hundred texts.

        choice: None: the first. raises: NoSuchRecord, ConfigInvalid
        """
        key = request_key(request_id)
        found = {body["index"]: body for body in find_records(self.where, key)}
        body = next(iter(found.values()), None) if choice is None else found.get(choice)
        if body is None:
            raise NoSuchRecord(key, choice or 0)
        texts, why = self._texts(key)
        one = {"record": body, "labels": find_labels(self.where, key, body["index"])}
        one |= self._conversation(texts.get(body["index"]), body)
        told = {"id": key, "indices": list(found), "choice": one, "no_text": why}
        return told | {"lens": self.lens is not None and bool(texts)}

    def _texts(self, key: str) -> tuple[dict[int, dict[str, Any]], str | None]:
        """By choice; and if there are none, why, in a sentence."""
        if self.cipher is None:
            return {}, "this server has no log_key, so it keeps no text and opens none"
        try:
            texts = find_said(self.where, key, self.cipher)
        except ConfigInvalid as error:
            return {}, str(error)
        return texts, None if texts else "no text of this request was kept"

    def _conversation(self, text: Mapping[str, Any] | None, body: Mapping[str, Any]) -> dict[str, Any]:
        """turns, answer: None without text; tokens: by position, None where the text no longer fits the scores"""
        if text is None:
            return {"turns": None, "answer": None, "tokens": {"prompt": None, "answer": None}}
        turns, answer = turns_of(text["prompt"], body["index"]), str(text["answer"])
        tokens = {
            "prompt": spell_prompt(self.template, turns, body),
            "answer": spell_answer(self.template, answer, body),
        }
        return {"turns": turns, "answer": answer, "tokens": tokens}

    def conversation(self, request_id: str, choice: int) -> list[dict[str, str]]:
        """The kept turns and the answer. raises: ConfigInvalid if there are none"""
        key = request_key(request_id)
        texts, why = self._texts(key)
        if choice not in texts:
            raise ConfigInvalid(why or f"no text of choice {choice} of request {key!r} was kept")
        turns = turns_of(texts[choice]["prompt"], choice)
        answer = str(texts[choice]["answer"])
        role = "" if any(turn["role"] == "" for turn in turns) else "assistant"
        return [*turns, *([{"role": role, "content": answer}] if answer else [])]

    def label(self, request_id: str, choice: int | None, label: Label, by: str) -> dict[str, Any]:
        """raises: NoSuchRecord; ConfigInvalid if the choice is not said, or nobody can be called so"""
        key, name = request_key(request_id), signed(by, "by")
        which = only_choice(self.where, key, "choice") if choice is None else choice
        before = add_label(self.where, key, which, label, name)
        return {"id": key, "choice": which, "label": label, "by": name, "before": before}


def _entry(entry: Entry) -> dict[str, Any]:
    body = entry.body
    own = (r for r in body["readings"] if (r["probe"], r["phase"]) == (entry.probe, entry.phase))
    reading: dict[str, Any] = next(own, {})
    shown = listed(body, reading) | {name: body[name] for name in ("finish", "key", "policy")}
    shown |= {"value": entry.value, "mode": reading.get("mode"), "action": reading.get("action")}
    return {"id": shown.pop("request_id")} | shown
