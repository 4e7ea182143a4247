"""The policy in force: read again on request, and told to an operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from monitor.config import Settings
from monitor.errors import MidstreamError
from monitor.live import LiveProbes
from monitor.policy.file import policy_of

Result = Literal["loaded", "refused"]


class PolicyKeeper:
    """live, put: read and replace the probes in service; counted: told of every reload"""

    def __init__(
        self,
        settings: Settings,
        live: Callable[[], LiveProbes],
        put: Callable[[LiveProbes], None],
        counted: Callable[[Result], None],
    ) -> None:
        self._settings, self._live, self._put, self._counted = settings, live, put, counted

    def reload(self) -> str:
        """Read the file again; requests from now on go by it, those at work end by the old one.

        returns: its name; without a file there is nothing to read. raises: MidstreamError, and the old policy stays
        """
        if self._settings.policy is None:
            return self._live().file.name
        try:
            file = policy_of(self._settings)
            self._put(self._live().under(file))
        except MidstreamError:
            self._counted("refused")
            raise
        self._counted("loaded")
        return file.name

    def describe(self) -> Mapping[str, Any]:
        """The default's name, the file's digest, and every policy with its rules as they came out of the cards."""
        live = self._live()
        whom = {o.name: o.when.model_dump(exclude_defaults=True) for o in live.file.overrides}
        return {
            "name": live.file.name,
            "sha256": live.file.digest,
            "policies": {
                name: {
                    "when": whom.get(name),
                    "terms": dataclasses.asdict(policy.terms),
                    "rules": {f: [dataclasses.asdict(r) for r in rules] for f, rules in policy.rules.items()},
                }
                for name, policy in live.policies.items()
            },
        }
