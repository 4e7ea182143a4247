"""A recipe's fit rows -> features at every block that is asked about -> the ranking of `training.select`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from monitor.config import Settings
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid
from training.metrics import Unsupported
from training.progress import progress
from training.recipe import gather, read_recipe
from training.select import Blocks, Selection, fits, select
from training.solve import Rows
from training.texts import Reader


def run(
    settings: Settings,
    recipe_file: Path,
    folder: Path,
    sets_of: Callable[[int], Sequence[Blocks]],
    solvers: Sequence[str],
    strengths: Sequence[float],
) -> Selection:
    """sets_of: the model's number of blocks -> the sets of blocks to try

    raises: ConfigInvalid for a bad recipe, file or block, or if the rows can't support a ranking
    """
    recipe = read_recipe(recipe_file)
    if recipe.head is not None:
        raise ConfigInvalid(f"{recipe_file}: a head is no direction; leave `head` out to select blocks for it")
    rows = gather(recipe, folder)[0]["fit"]
    console = Console(stderr=True)
    with console.status(f"loading {settings.model} …"):
        model = load_model(settings.model, cache=settings.cache, revision=settings.revision, dtype=settings.dtype)
    sets = list(dict.fromkeys(sets_of(model.n_layers)))
    layers = sorted({block for s in sets for block in s})
    # Of a recipe of mean and last token both, side by side, as it is fitted.
    features = np.empty((len(rows), len(layers), recipe.projections, model.d_model), dtype=np.float32)
    with progress(console, f"activations at {len(layers)} blocks", len(rows)) as tick:
        for index, streams in Reader(model, recipe.max_text_tokens).streams(rows, layers, tick):
            for column, layer in enumerate(layers):
                features[index, column, 0] = streams[layer].mean(0).numpy()
                features[index, column, 1:] = streams[layer][-1].numpy()
    beside = features.reshape(len(rows), len(layers), -1)
    labels, weights = np.array([r.label for r in rows]), np.array([r.weight for r in rows])
    known = Rows(beside[:, 0], labels, weights, [r.key or r.source for r in rows])
    try:
        with progress(console, "fits without each data set", fits(sets, solvers, strengths)) as tick:
            return select(beside, layers, known, [r.group for r in rows], sets, solvers, strengths, tick)
    except Unsupported as error:
        raise ConfigInvalid(f"{recipe_file}: {error}") from error
