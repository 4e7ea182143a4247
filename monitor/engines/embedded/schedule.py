"""The schedule: which prompts wait, which sequences are active, and what of them the next step feeds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from monitor.config import Settings
from monitor.engines.embedded.generation import Generation, Group
from monitor.engines.embedded.sets import ProbeSet


class Schedule:
    """Without locks: the engine holds its own around whatever touches `waiting`.

    groups: id(leader) -> its group, until the prompt is prefilled
    """

    def __init__(self, settings: Settings) -> None:
        self.waiting: deque[Group] = deque()
        self.active: list[Generation] = []
        self.groups: dict[int, Group] = {}
        self._settings = settings

    @property
    def room(self) -> int:
        """Prompts that may still be queued."""
        return self._settings.max_queue + self._settings.max_sequences - len(self.active) - len(self.waiting)

    def admit(self) -> None:
        """Start waiting prompts, oldest first, while sequences and tokens are free."""
        while self.waiting:
            group = self.waiting[0]
            pending = sum(len(g.choices) - 1 for g in self.groups.values())
            reserved = sum(s.reserved for s in self.active) + sum(
                g.reserved - g.leader.reserved for g in self.groups.values()
            )
            if len(self.active) + pending + len(group.choices) > self._settings.max_sequences:
                return
            if reserved + group.reserved > self._settings.kv_tokens:
                return
            self.waiting.popleft()
            self.groups[id(group.leader)] = group
            self.active.append(group.leader)

    def choose(self) -> Iterator[tuple[Generation, int]]:
        """Each decoding sequence its one token; what is left of the step goes to prompts, oldest first. A sequence
        that waits for the second judge is not fed."""
        room = self._settings.max_step_tokens
        for sequence in sorted(self.active, key=lambda s: s.n_waiting > 1):
            if sequence.watch.question is not None or sequence.n_waiting == 0:
                continue
            n = min(sequence.n_waiting, room) if sequence.n_waiting > 1 else 1
            if n <= 0:
                return
            room -= n
            yield sequence, n

    def drop(self, gone: set[str]) -> list[Generation]:
        """Take out the sequences of these requests, queued or active."""
        queued = [g for g in self.waiting if g.request_id in gone]
        if queued:
            self.waiting = deque(g for g in self.waiting if g.request_id not in gone)
        dropped = [c for g in queued for c in g.choices]
        for sequence in self.active:
            if sequence.request.id in gone:
                group = self.groups.pop(id(sequence), None)
                dropped += group.choices if group is not None else [sequence]
        self.active = [s for s in self.active if s.request.id not in gone]
        return dropped

    def clear(self) -> list[Generation]:
        """Everything there is, and nothing from now on."""
        left = [c for g in (*self.waiting, *self.groups.values()) for c in g.choices]
        left += [s for s in self.active if s not in left]
        self.waiting.clear()
        self.active, self.groups = [], {}
        return left

    @property
    def probes(self) -> set[ProbeSet]:
        """That some sequence is scored by."""
        return {g.leader.probes for g in self.waiting} | {s.probes for s in list(self.active)}

    @property
    def request_ids(self) -> set[str]:
        return {g.request_id for g in self.waiting} | {s.request.id for s in self.active}
