"""A local model's fingerprint: which bytes of its files make it another model."""

from monitor.engines.identity import files_fingerprint

MIB = 1 << 20
PINNED = "a955af4844edcc0213aa2ca42b9d26d86eddc9160d7ba2fe0f02606ac99293fb"


def fingerprint(folder, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return files_fingerprint(folder)


def changed(weights, at):
    return weights[:at] + b"x" + weights[at + 1 :]


def test_every_byte_of_the_first_and_last_mebibyte_counts(tmp_path):
    for size in (1, MIB, MIB + 1, MIB + MIB // 2, 2 * MIB, 2 * MIB + 1, 3 * MIB):
        weights = bytes(size)
        same = fingerprint(tmp_path / "same", weights)
        assert same == fingerprint(tmp_path / "again", weights)
        for at in {0, min(size, MIB) - 1, max(0, size - MIB), size - 1}:
            assert fingerprint(tmp_path / "other", changed(weights, at)) != same, (size, at)


def test_what_lies_between_is_left_to_the_canaries(tmp_path):
    weights = bytes(3 * MIB)
    assert fingerprint(tmp_path / "a", weights) == fingerprint(tmp_path / "b", changed(weights, MIB + MIB // 2))


def test_a_large_file_keeps_the_fingerprint_that_cards_have(tmp_path):
    """Cards name it: another way to hash would make strangers of all their models."""
    weights = bytes(range(256)) * (12 * 1024)
    assert fingerprint(tmp_path / "m", weights) == PINNED
