"""Training rows that are made up: features of two classes, and the lines of a file."""

import json

import numpy as np
import pytest


def blobs(n=200, d=8, apart=4.0, seed=0):
    """Two classes along the first feature; one constant feature, one of a massive activation, one dead."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = random.normal(size=(n, d))
    x[:, 0] += apart * y
    x[:, 1] = 7.0
    x[:, 2] = 24_874.0 + random.normal(size=n)
    x[:, 3] = 0.0
    return x, y.astype(np.int64)


@pytest.fixture
def jsonl(tmp_path):
    def write(*items, name="rows.jsonl"):
        lines = [i if isinstance(i, bytes) else json.dumps(i).encode() for i in items]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
