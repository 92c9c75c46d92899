"""The fast hash of parameters, and hashes of whole files."""

import hashlib

import numpy as np
import pytest

from converters.stream import Progress
from converters.verify.digest import _LANE, Digest, file_hashes


def digest(data, *cuts, text="t"):
    made = Digest(text)
    for part in np.split(np.frombuffer(data, np.uint8), cuts):
        made.update(part)
    return made.hexdigest()


def by_hand(data, text="t"):
    """The definition, one integer at a time."""
    full, joined = 2**64 - 1, hashlib.sha256(text.encode())

    def key(i):
        z = (i + 1) * 0x9E3779B97F4A7C15 & full
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & full
        z = (z ^ z >> 27) * 0x94D049BB133111EB & full
        return z ^ z >> 31 | 1

    lanes = [data[start : start + _LANE] for start in range(0, len(data) - len(data) % _LANE, _LANE)]
    for lane in [*lanes, data[len(lanes) * _LANE :]]:
        lane += bytes(-len(lane) % 8)
        words = [int.from_bytes(lane[i : i + 8], "little") for i in range(0, len(lane), 8)]
        mixed = [w * key(i) & full for i, w in enumerate(words)]
        for value in (sum(mixed), sum((m >> 32) * key(i + _LANE // 8) for i, m in enumerate(mixed))):
            joined.update((value & full).to_bytes(8, "little"))
    joined.update(len(data).to_bytes(8, "little"))
    return joined.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4097, _LANE - 1, _LANE, _LANE + 9])
def test_it_is_what_its_definition_says(size):
    data = np.random.default_rng(size).bytes(size)
    assert digest(data) == by_hand(data)


def test_how_bytes_are_divided_does_not_matter():
    data = np.random.default_rng(0).bytes(3 * _LANE + 1234)
    whole = digest(data)
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert digest(data, *np.sort(rng.integers(0, len(data), 7))) == whole
    assert digest(data, _LANE, 2 * _LANE) == digest(data, 1, 1, 2) == whole


def test_every_kind_of_small_damage_changes_it():
    """One bit, the same bit of two words (the top ones too), words exchanged, zeros appended, another text."""
    data = np.frombuffer(np.random.default_rng(0).bytes(4096), np.uint8)
    seen = {digest(data.tobytes())}
    made = 1

    def changed(*bits):
        array = data.copy()
        for bit in bits:
            array[bit // 8] ^= 1 << bit % 8
        return digest(array.tobytes())

    for bit in range(0, 8 * len(data), 7):
        seen.add(changed(bit))
        made += 1
    for bit in range(64):
        for other in (1, 2, 300):
            seen.add(changed(bit, bit + 64 * other))
            seen.add(changed(bit, (bit + 32) % 64, bit + 64 * other, (bit + 32) % 64 + 64 * other))
            made += 1 + (bit < 32)
    words = data.view(np.uint64).copy()
    words[[3, 9]] = words[[9, 3]]
    seen |= {digest(words.tobytes()), digest(data.tobytes() + bytes(8)), digest(data.tobytes(), text="u")}
    assert len(seen) == made + 3


def test_files_are_hashed_as_other_tools_do(tmp_path):
    files = []
    for size in (0, 10, (1 << 20) + 5):
        files.append(tmp_path / str(size))
        files[-1].write_bytes(np.random.default_rng(size).bytes(size))
    with Progress(0, "", False) as bar:
        found = file_hashes(files, 2, bar)
    assert list(found) == files
    for file in files:
        assert found[file] == hashlib.sha256(file.read_bytes()).hexdigest()
