"""Requests without features, where their texts are kept and the key is given: the model reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console

from monitor.config import Settings
from monitor.engines.embedded.harvest import residual_streams
from monitor.errors import ConfigInvalid, RequestInvalid
from monitor.traffic import Cipher
from monitor.traffic.labelled import Labelled
from monitor.traffic.review import Label
from monitor.traffic.text import SLICE, said_prompts, said_requests
from monitor.traffic.turns import is_text, turns_of
from monitor.types import Prompt
from probes_store.card import Card
from training.fit import Array
from training.progress import progress
from training.retrain.traffic import Id, Rows, draw, firsts
from training.texts import Reader


def draw_said(settings: Settings, at_most: int = SLICE) -> list[Id]:
    """A uniform sample of the requests whose texts are kept: those whose names have the smallest hashes.

    raises: ConfigInvalid if there is none
    """
    found = sorted(said_requests(settings.log), key=draw)[:at_most]
    if not found:
        raise ConfigInvalid(
            f"there are no features at {str(settings.features)!r} and no texts in the log; set MIDSTREAM_LOG_FEATURES "
            "or MIDSTREAM_LOG_TEXT for the server"
        )
    return found


def read_said(
    settings: Settings, labelled: Sequence[Labelled], drawn: Sequence[Id], reader: Reader, card: Card, console: Console
) -> tuple[Rows, int]:
    """Their rows, redacted as they are kept, and how many have no text either. drawn: the uniform slice is of these

    raises: ConfigInvalid for a wrong key
    """
    at, x = read_kept(settings, [(one.request_id, one.choice) for one in labelled], reader, card, console)
    found = [labelled[i] for i in at]
    rows = Rows(
        tuple((one.request_id, one.choice) for one in found),
        x,
        np.array([int(one.label is Label.HARMFUL) for one in found], dtype=np.int64),
        np.ones(len(found)),
        tuple(one.key for one in found),
        firsts([one.request_id for one in found], {name for name, _ in drawn}),
    )
    return rows, len(labelled) - len(found)


def read_kept(
    settings: Settings, ids: Sequence[Id], reader: Reader, card: Card, console: Console
) -> tuple[list[int], Array]:
    """Which of them have a text that the model can read, and (n, n_layers * d_model) of those. raises: as above"""
    found: list[tuple[int, Prompt]] = []
    if ids and settings.log_key is not None:
        given = said_prompts(settings.log, ids, Cipher(settings.log_key))
        for i, (one, (_, choice)) in enumerate(zip(given, ids, strict=True)):
            if one is not None and is_text(one) and (prompt := _prompt(reader, turns_of(one, choice))) is not None:
                found.append((i, prompt))
    x = np.zeros((len(found), len(card.layers), card.d_model))
    if found:
        prompts = [prompt for _, prompt in found]
        with progress(console, "reading kept texts", len(prompts)) as tick:
            for index, streams in residual_streams(reader.model, prompts, card.layers, tick):
                turn = prompts[index].turns[-1]
                for column, layer in enumerate(card.layers):
                    x[index, column] = streams[layer][turn.start : turn.end].mean(0).double().numpy()
    return [i for i, _ in found], x.reshape(len(found), len(card.layers) * card.d_model)


def all_said(settings: Settings, ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
    """(n,): whether a labelled request would have been read without features too, so that no chance chose it."""
    if settings.log_key is None or not settings.log_text:
        return np.zeros(len(ids), dtype=bool)
    given = said_prompts(settings.log, ids, Cipher(settings.log_key))
    return np.array([prompt is not None for prompt in given], dtype=bool)


def _prompt(reader: Reader, turns: Sequence[dict[str, str]]) -> Prompt | None:
    """None for what the template refuses, or is too long for the model."""
    template = reader.model.template
    try:
        alone = len(turns) == 1 and not turns[0]["role"]
        read = template.raw(turns[0]["content"]) if alone else template.encode(turns)
    except RequestInvalid:
        return None
    return read if read.turns and len(read.token_ids) <= reader.model.max_model_len else None
