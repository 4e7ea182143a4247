"""The `midstream` command: one file a command, or a group of commands. The one place that reaches both sides."""

from monitor.cli.command import app, main

__all__ = ["app", "main"]
