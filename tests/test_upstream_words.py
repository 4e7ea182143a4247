"""Text as it grows -> token ids: the same as of the whole text, and none before it is settled."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from monitor.config import DEMO_MODEL, cache_dir
from monitor.upstream.sse import Frames, parse
from monitor.upstream.words import Words

from .conftest import tiny_tokenizer

TEXTS = [
    "Once upon a time, there wasn't (really!) a house;  it's 12345 metres tall.\n\n\n   And\t\tthen  \n \n x",
    "The cafés' naïve façade 🎈🎈👩‍👩‍👧 costs 1.234,50 € — \u201cquoted\u201d… they'll we've I'm you'd",
    "日本語の文章です。スペースはありません。 한국어도 있습니다. Ещё немного текста.",
    "def f(x):\n    return {'a': [1, 2, 3]}  # comment\n\n\nif __name__ == '__main__':\n\tprint(f'{x!r}')\n",
    "before <|im_end|>\n<|im_start|>user\nmore <|im_ not <| im_end |> it<|im_end|>",
    "a" * 300 + " " * 40 + "\n" * 30 + "!" * 50,
    " ",
    "\n",
]


def byte_level(pattern):
    """A BPE of bytes trained on the texts, with a split of its own."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return trained(backend)


def metaspace(with_words):
    """As SentencePiece writes spaces; without words the merges may go anywhere."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=with_words, prepend_scheme="first")
    return trained(backend, decoders.Metaspace(prepend_scheme="first"))


def trained(backend, decoder=None):
    backend.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if decoder is None else []
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", additional_special_tokens=special[1:])


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "GPT-2": lambda: byte_level(GPT_2),
    "Llama 3": lambda: byte_level(LLAMA_3),
    "SentencePiece": lambda: metaspace(True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def read(words, text, sizes):
    """Its ids, given in pieces; after each piece the text covered must be whole tokens of the given text."""
    ids, at = [], 0
    while at < len(text):
        size = next(sizes)
        words.add(text[at : at + size])
        at += size
        ids += words.settle()
        assert words.n_tokens == len(ids) and words.covered(len(ids)) <= at
    return ids + words.settle(final=True)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_ids_are_those_of_the_whole_text_however_it_comes(tokenizer, text):
    chance = random.Random(7)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    for most in (1, 2, 3, 8, 1000):
        words = Words(tokenizer, max_tail=10_000)
        assert read(words, text, iter(lambda m=most: chance.randint(1, m), 0)) == expected, most
        assert words.covered(words.n_tokens) == len(text) and not words.waiting


def test_no_word_may_wait_for_ever(tokenizer):
    words = Words(tokenizer, max_tail=16)
    text = "x" * 500
    for character in text:
        words.add(character)
        words.settle()
        assert len(text[: words.length]) - words.covered(words.n_tokens) <= 16 * 40
    words.settle(final=True)
    assert words.covered(words.n_tokens) == 500


def test_a_character_of_several_tokens_is_covered_with_the_last_of_them():
    tokenizer = tiny_tokenizer()
    words = Words(tokenizer)
    words.add("a🎈b")
    ids = words.settle(final=True)
    assert len(ids) == 6
    assert [words.covered(n) for n in range(7)] == [0, 1, 1, 1, 1, 2, 3]


def test_text_that_may_become_an_added_token_waits():
    tokenizer = tiny_tokenizer()
    words = Words(tokenizer)
    words.add("one two three <|im_end")
    assert words.covered(len(words.settle())) <= len("one two three ")
    words.add("|>")
    words.add(" and so on")
    ids = words.settle()
    assert ids[-1] != tokenizer.eos_token_id or tokenizer.eos_token_id in ids
    assert tokenizer.eos_token_id in ids + words.settle(final=True)


def test_after_a_pause_the_text_goes_on():
    tokenizer = byte_level(GPT_2)
    words = Words(tokenizer)
    words.add("Once upon a ti")
    first = words.settle(final=True)
    words.add("me, there")
    ids = first + words.settle(final=True)
    assert tokenizer.decode(ids) == "Once upon a time, there"
    assert words.covered(len(ids)) == len("Once upon a time, there")


def test_half_a_surrogate_pair_is_read_as_what_a_client_shows():
    words = Words(tiny_tokenizer())
    words.add("a\ud83d")
    words.add("\ude00b")
    assert words.settle(final=True) == tiny_tokenizer()("a\ufffd\ufffdb", add_special_tokens=False)["input_ids"]
    assert words.covered(words.n_tokens) == words.length == 4


def test_the_shipped_models_tokenizer_settles_as_it_reads():
    from transformers import AutoTokenizer

    from monitor.engines.identity import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(DEMO_MODEL, cache_dir()))
    chance = random.Random(3)
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        for most in (1, 4, 9):
            words = Words(tokenizer, max_tail=10_000)
            assert read(words, text, iter(lambda m=most: chance.randint(1, m), 0)) == expected


# --- events ---

LINES = ["event: x\ndata: {}\n\n", ": ping\n\n", "data: é☃🎈\ndata: two\n\n", "id: 7\nretry: 1\n\n", "data\n\n", "\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_frames_are_the_same_wherever_they_are_split(end):
    raw = "".join(LINES).replace("\n", end).encode() + b"x"
    reading = Frames(1000)
    whole = reading.feed(raw)
    assert b"".join(whole) + reading.end() == raw and len(whole) == len(LINES) - 1
    for at in range(len(raw)):
        frames = Frames(1000)
        assert frames.feed(raw[:at]) + frames.feed(raw[at:]) == whole
    frames = Frames(1000)
    assert [f for i in range(len(raw)) for f in frames.feed(raw[i : i + 1])] == whole and frames.end() == reading.end()


def test_the_fields_of_an_event():
    assert parse(b"\xef\xbb\xbfevent: x\r\ndata:a\r\ndata:  b\r\nother: c\r\n\r\n") == ("x", b"a\n b")
    assert parse(b": comment\n\n") == (None, None) and parse(b"data: [DONE]\n\n").is_done
