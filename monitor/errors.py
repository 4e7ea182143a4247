"""Our errors, each one line: what is wrong, and the remedy. Imports nothing of ours."""

from __future__ import annotations


class MidstreamError(Exception):
    """The root of our errors. The message is one line: what is wrong, and what to do about it.

    MidstreamError
    ├── ConfigInvalid      a setting, a file or an argument
    ├── ModelUnsupported   a model that can't be loaded or tapped
    ├── ProbeInvalid       a probe file or card that is damaged or incomplete
    ├── ProbeMismatch      a sound probe that does not belong to this model
    ├── RequestInvalid     a client's request that can't be served as written
    └── Overloaded         a bound was reached; try again later
    """


class ConfigInvalid(MidstreamError):
    pass


class ModelUnsupported(MidstreamError):
    pass


class ProbeInvalid(MidstreamError):
    pass


class ProbeMismatch(MidstreamError):
    pass


class RequestInvalid(MidstreamError):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(MidstreamError):
    pass
