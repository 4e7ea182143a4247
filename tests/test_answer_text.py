"""The text of an answer as it grows, with a tokenizer that falls back to bytes."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from monitor.engines.embedded.text import AnswerText


@pytest.fixture(scope="module")
def tokenizer():
    """As Llama 2's: 256 tokens of one byte, and a few words."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "A", "\u2581and"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def read(tokenizer, *tokens):
    text = AnswerText(tokenizer, ())
    for token in tokens:
        text.add(tokenizer.convert_tokens_to_ids(token))
    return text.release(len(tokens), final=True)


def test_a_character_of_several_bytes(tokenizer):
    assert read(tokenizer, "<0xE2>", "<0x99>", "<0xA5>", "\u2581and", "A") == "\u2665 andA"


def test_a_lone_byte_after_a_character_ends_nothing(tokenizer):
    """The library reads the whole run of bytes anew, no longer finds what it had said, and raises: for one sequence's
    sake everybody's engine would die."""
    found = read(tokenizer, "<0xE2>", "<0x99>", "<0xA5>", "<0xF0>", "A", "\u2581and")
    assert found.startswith("\u2665") and found.endswith("A and")
