"""Workers whose tap is taken out, while they serve or before: what a broken tap looks like."""

from typing import Any

from monitor.engines.vllm.worker import MonitoredWorker


class DeafWorker(MonitoredWorker):
    def go_deaf(self) -> None:
        for handle in self.tap.handles:
            handle.remove()


class BornDeafWorker(DeafWorker):
    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self.go_deaf()
