"""Labelled requests without features, where their texts are kept and the key is given: the model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from monitor.config import Settings
from monitor.engines.embedded.harvest import residual_streams
from monitor.errors import RequestInvalid
from monitor.traffic import Cipher, find_said
from monitor.traffic.labelled import Labelled
from monitor.traffic.review import Label
from monitor.types import Prompt
from probes_store.card import Card
from training.progress import progress
from training.retrain.traffic import Rows
from training.texts import Reader


def read_said(
    settings: Settings, labelled: Sequence[Labelled], reader: Reader, card: Card, console: Console
) -> tuple[Rows, int]:
    """Their rows, redacted as they are kept, and how many have no text either. raises: ConfigInvalid for a wrong key"""
    found: list[tuple[Labelled, Prompt]] = []
    if settings.log_key is not None:
        cipher = Cipher(settings.log_key)
        for one in labelled:
            said = find_said(settings.log, one.request_id, cipher).get(one.choice)
            prompt = None if said is None else _prompt(reader, said["prompt"])
            if prompt is not None:
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


def _prompt(reader: Reader, prompt: Any) -> Prompt | None:
    """None for what is no conversation, or too long for the model."""
    if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
        return None
    try:
        read = reader.model.template.encode(prompt)
    except RequestInvalid:
        return None
    return read if read.turns and len(read.token_ids) <= reader.model.max_model_len else None
