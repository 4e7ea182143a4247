"""Labelled requests without features, where their texts are kept and the key is given: the model reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console

from monitor.config import Settings
from monitor.engines.embedded.harvest import residual_streams
from monitor.errors import RequestInvalid
from monitor.traffic import Cipher, find_said
from monitor.traffic.labelled import Labelled
from monitor.traffic.review import Label
from monitor.traffic.turns import is_text, turns_of
from monitor.types import Prompt
from probes_store.card import Card
from training.progress import progress
from training.retrain.traffic import Id, Rows
from training.texts import Reader


def read_said(
    settings: Settings, labelled: Sequence[Labelled], reader: Reader, card: Card, console: Console
) -> tuple[Rows, int]:
    """Their rows, redacted as they are kept, and how many have no text either. raises: ConfigInvalid for a wrong key"""
    found: list[tuple[Labelled, Prompt]] = []
    if settings.log_key is not None:
        cipher = Cipher(settings.log_key)
        for one in labelled:
            said = find_said(settings.log, one.request_id, cipher)
            if one.choice in said:
                given = said[one.choice]["prompt"]
                if is_text(given) and (prompt := _prompt(reader, turns_of(given, one.choice))) is not None:
                    found.append((one, prompt))
    x = np.zeros((len(found), len(card.layers), card.d_model))
    if found:
        prompts = [prompt for _, prompt in found]
        with progress(console, "reading kept texts", len(prompts)) as tick:
            for index, streams in residual_streams(reader.model, prompts, card.layers, tick):
                turn = prompts[index].turns[-1]
                for column, layer in enumerate(card.layers):
                    x[index, column] = streams[layer][turn.start : turn.end].mean(0).double().numpy()
    rows = Rows(
        tuple((one.request_id, one.choice) for one, _ in found),
        x.reshape(len(found), len(card.layers) * card.d_model),
        np.array([int(one.label is Label.HARMFUL) for one, _ in found], dtype=np.int64),
        np.ones(len(found)),
        tuple(one.key for one, _ in found),
        np.zeros(len(found), dtype=bool),
    )
    return rows, len(labelled) - len(found)


def all_said(settings: Settings, ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
    """(n,): whether a labelled request would have been read without features too, so that no chance chose it."""
    if settings.log_key is None or not settings.log_text:
        return np.zeros(len(ids), dtype=bool)
    cipher = Cipher(settings.log_key)
    return np.array([choice in find_said(settings.log, request, cipher) for request, choice in ids], dtype=bool)


def _prompt(reader: Reader, turns: Sequence[dict[str, str]]) -> Prompt | None:
    """None for what the template refuses, or is too long for the model."""
    template = reader.model.template
    try:
        alone = len(turns) == 1 and not turns[0]["role"]
        read = template.raw(turns[0]["content"]) if alone else template.encode(turns)
    except RequestInvalid:
        return None
    return read if read.turns and len(read.token_ids) <= reader.model.max_model_len else None
