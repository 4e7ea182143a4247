"""The probes in service follow live.json: a change is noticed, verified beside the old set, and swapped in.

Every process that serves does it for itself. Running requests end on the set that they began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from monitor.api.admin.aside import Aside
from monitor.audit import Audit, AuditFailed
from monitor.config import Settings
from monitor.errors import ConfigInvalid, MidstreamError, Overloaded
from monitor.live import LiveProbes, ServedModel, load_candidates, load_live
from probes_store import promote as promoting
from probes_store.promote import Choice, Tried
from probes_store.store import Store, StoredProbe, model_slug

POLL_S, LATER_S = 0.1, 1.0
"""Between two looks at live.json, and before what was only busy is tried again."""
Result = Literal["loaded", "refused"]


@dataclass(frozen=True, slots=True)
class Slots:
    """What an engine gives: live, the probes in service; stage: brings others in beside them and scores their
    canaries (raises: ProbeMismatch, ConfigInvalid, Overloaded, and then nothing has changed); put: serves what was
    staged from now on"""

    live: Callable[[], LiveProbes]
    stage: Callable[[LiveProbes], Awaitable[None]]
    put: Callable[[LiveProbes], None]


class Swap:
    """Lives in one event loop. counted: told how each change ended; say: a line for the console"""

    def __init__(
        self,
        slots: Slots,
        model: ServedModel,
        settings: Settings,
        audit: Audit,
        counted: Callable[[Result], None],
        say: Callable[[str], None],
        aside: Aside,
    ) -> None:
        self.store, self.slug = Store(settings.store), model_slug(model.name)
        self._slots, self._model, self._settings, self._audit = slots, model, settings, audit
        self._counted, self._say, self._aside = counted, say, aside
        self._one = asyncio.Lock()

    # --- live.json, as anybody may change it -------------------------------------------------------------------------

    async def follow(self) -> None:
        """Until it is cancelled. Begins with what live.json says now: candidates come in here, never at the start,
        which they could hinder."""
        seen: tuple[int, ...] | None = ()
        while True:
            now = self._stamp()
            if now != seen:
                seen = now if await self.reload() else ()
                if not seen:
                    await asyncio.sleep(LATER_S)
            await asyncio.sleep(POLL_S)

    def _stamp(self) -> tuple[int, ...] | None:
        path = None if self.store.overlay is None else self.store.overlay / "live.json"
        try:
            found = None if path is None else path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_ino, found.st_size)

    async def reload(self) -> bool:
        """Serve what live.json says. Refused, the old set stays; False: it was only too busy, try again."""
        async with self._one:
            try:
                for why in await self._take(None, audited=True):
                    self._refused(why)
            except (Overloaded, AuditFailed) as error:
                self._say(f"probes: not yet, the old ones stay: {error}")
                return False
            except MidstreamError as error:
                self._refused(f"refused, the old ones stay: {error}")
            return True

    def _refused(self, why: str) -> None:
        self._counted("refused")
        self._say(f"probes: {why}")

    # --- what an operator asks for -----------------------------------------------------------------------------------

    # instead_of: the live version that the operator has seen, to: the one to go back to; None: whatever they are.

    async def promote(self, probe: str, version: str, fewer: bool = False, instead_of: str | None = None) -> Choice:
        """Served first, then written: what does not verify is in no file. raises: MidstreamError"""
        act = functools.partial(promoting.promote, fewer=fewer, instead_of=instead_of)
        return await self._edit(lambda tried: act(self.store, self.slug, probe, version, tried=tried))

    async def rollback(self, probe: str, to: str | None = None, instead_of: str | None = None) -> Choice:
        """raises: MidstreamError"""
        act = functools.partial(promoting.rollback, to=to, instead_of=instead_of)
        return await self._edit(lambda tried: act(self.store, self.slug, probe, tried=tried))

    async def shadow(self, probe: str, version: str | None, instead_of: str | None = None) -> Choice:
        """raises: MidstreamError"""
        act = functools.partial(promoting.shadow, instead_of=instead_of)
        return await self._edit(lambda tried: act(self.store, self.slug, probe, version, tried), probe)

    async def _edit(self, act: Callable[[Tried], Choice], trial: str | None = None) -> Choice:
        """trial: the probe whose candidate must come in"""
        loop = asyncio.get_running_loop()

        def tried(chosen: Mapping[str, str]) -> None:
            refused = asyncio.run_coroutine_threadsafe(self._take(chosen), loop).result()
            if refused and trial is not None:
                raise ConfigInvalid("; ".join(refused))

        async with self._one:
            try:
                return await self._aside(act, tried)
            except MidstreamError:
                self._counted("refused")
                with contextlib.suppress(MidstreamError):  # the old file's own fault is not the answer to this
                    await self._take(None)
                raise

    # --- both --------------------------------------------------------------------------------------------------------

    async def _take(self, chosen: Mapping[str, str] | None, audited: bool = False) -> list[str]:
        """Serve what live.json, or `chosen` in its place, says; returns why a candidate was left out.

        raises: MidstreamError, and the old set stays
        """
        candidates, refused = await self._aside(load_candidates, self._model, self.store, chosen)
        try:
            await self._change(chosen, candidates, audited)
        except (AuditFailed, Overloaded):
            raise
        except MidstreamError as error:
            if not candidates:
                raise
            await self._change(chosen, (), audited)
            names = ", ".join(p.name for p in candidates)
            refused.append(f"candidate {names} is left out: {error}")
        return refused

    async def _change(self, chosen: Mapping[str, str] | None, beside: Sequence[StoredProbe], audited: bool) -> None:
        slots, before = self._slots, self._slots.live()
        live = await self._aside(
            load_live, self._model, self.store, self._settings, chosen=chosen, file=before.file, beside=beside
        )
        if live.versions == before.versions:
            return
        now = ", ".join(f"{name} {version}" for name, version, _ in live.versions)
        row = await self._aside(self._audit.write, "store", "", "RELOAD", f"probes: {now}") if audited else None
        try:
            await slots.stage(live)
            # The policy may have been replaced meanwhile.
            file = slots.live().file
            slots.put(live if file is live.file else live.under(file))
        except MidstreamError as error:
            if row is not None:
                await self._aside(self._audit.ended, row, f"refused: {error}")
            raise
        if row is not None:
            await self._aside(self._audit.ended, row, "loaded")
        self._counted("loaded")
        self._say(f"probes in service: {now}")
