"""Options that many commands have."""

from pathlib import Path
from typing import Annotated

import typer

from monitor.config import DEMO_MODEL

Model = Annotated[str | None, typer.Option(help=f"Model folder or hub id. Default: {DEMO_MODEL}, which comes along.")]
Config = Annotated[Path | None, typer.Option(help="YAML settings file.")]
StoreFolder = Annotated[Path | None, typer.Option("--store", help="Folder of your own probes.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
