"""Midstream, the serving side: reads the residual stream of every request and judges it while the model generates."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from monitor.notebook import watch as watch

__all__ = ["__version__", "watch"]


def __getattr__(name: str) -> Any:
    # `monitor.watch` pulls in torch; `import monitor.types` must not.
    if name == "watch":
        from monitor.notebook import watch

        return watch
    raise AttributeError(f"module 'monitor' has no attribute {name!r}")
