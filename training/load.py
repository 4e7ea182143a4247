"""Labelled texts from anywhere: JSONL, CSV and Parquet, here or in a pinned Hugging Face data set.

`hf://OWNER/NAME@COMMIT/path/to/file`: the commit is 40 hexadecimal digits, so the same address is always the same
bytes. The last part of the name says the form: .csv, .parquet, and JSONL for anything else.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monitor.errors import ConfigInvalid
from probes_store.card import DataFile
from probes_store.hub import fetch
from training.data import MAX_ROW_BYTES, Row, describe, read_bytes, read_jsonl, row_of

COLUMNS = ("text", "label", "source", "group", "response", "split")
"""The first two must be there. Any other column is left alone."""
_HUB = re.compile(r"hf://(?:datasets/)?(?P<repository>[^/@]+/[^/@]+)(?:@(?P<commit>[^/]*))?/(?P<file>.+)")


def is_hub(file: str | Path) -> bool:
    return str(file).startswith("hf:/")


def stem(file: str | Path) -> str:
    """The name of a file without folders and ending: what its rows' `source` is if they have none."""
    return Path(str(file)).stem


def read_rows(file: str | Path, folder: Path = Path()) -> tuple[list[Row], DataFile]:
    """Read a local file, relative to `folder`, or one of the hub; DataFile.file is its name, or its whole address.

    raises: ConfigInvalid, naming file, row and what is wanted
    """
    if not is_hub(file):
        return _read(folder / file)
    address = _HUB.fullmatch(str(file))
    if address is None:
        raise ConfigInvalid(f"{str(file)!r}: write hf://OWNER/NAME@COMMIT/FILE")
    path = fetch(address["repository"], address["commit"] or "", address["file"], "dataset")
    rows, described = _read(path)
    return rows, described.model_copy(update={"file": str(file)})


def read_prompts(file: str | Path, folder: Path = Path()) -> tuple[list[Row], int, DataFile]:
    """Rows whose label is about their `text`, how many label a `response` instead, and the file.

    raises: ConfigInvalid as `read_rows`, or if no row is about a prompt
    """
    rows, described = read_rows(file, folder)
    kept = [r for r in rows if not r.answer]
    if not kept:
        raise ConfigInvalid(
            f"{file}: every row labels a `response`, and prompts are judged here; leave it out, or take the responses "
            "out if the labels are about the texts"
        )
    return kept, len(rows) - len(kept), described


def _read(path: Path) -> tuple[list[Row], DataFile]:
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet"):
        return read_jsonl(path)
    data = read_bytes(path)
    items = _csv(data, path) if kind == ".csv" else _parquet(data, path)
    rows = [row_of(item, f"{path}, row {n}", path.stem, len(str(item["text"]))) for n, item in enumerate(items, 1)]
    if not rows:
        raise ConfigInvalid(f"data file {str(path)!r} has no rows")
    return rows, describe(path.name, data, rows)


def _csv(data: bytes, path: Path) -> Iterator[Mapping[str, Any]]:
    """A header, then rows; UTF-8, with or without a mark at the start. `label` is 0 or 1."""
    before = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        _check_columns(reader.fieldnames or (), path)
        for number, item in enumerate(reader, 1):
            if None in item:
                raise ConfigInvalid(f"{path}, row {number}: more fields than the header has; quote texts with commas")
            label = item["label"]
            yield item | {"label": {"0": 0, "1": 1}.get((label or "").strip(), label)}
    except UnicodeDecodeError as error:
        raise ConfigInvalid(f"data file {str(path)!r} is not UTF-8: byte {error.start}") from error
    except csv.Error as error:
        raise ConfigInvalid(f"data file {str(path)!r} is not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(data: bytes, path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigInvalid(
            f"{path.name}: reading Parquet needs pyarrow; pip install midstream[parquet], or write JSONL"
        ) from error
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
        _check_columns(names, path)
        for batch in file.iter_batches(columns=[name for name in COLUMNS if name in names]):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigInvalid(f"data file {str(path)!r} is not Parquet: {str(error).splitlines()[0]}") from error


def _check_columns(names: Any, path: Path) -> None:
    missing = [name for name in COLUMNS[:2] if name not in names]
    if missing:
        have = ", ".join(map(str, names)) or "none"
        raise ConfigInvalid(f"data file {str(path)!r} has no column {missing[0]!r} (it has {have}); rename one")
