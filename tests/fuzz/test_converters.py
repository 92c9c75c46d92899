"""Damaged checkpoints, LoRAs, GGUF, Orbax, configurations and pictures: only `CheckpointError`, soon, in little memory.

Every entry also has inputs that pass and inputs that are refused, or it would test nothing.
"""

import pytest

from tests.fuzz.harness import check

# entry -> inputs in the fast suite, in the slow one
ENTRIES = {
    "INSPECT": (200, 10_000), "OPEN": (150, 7_500), "CONVERT": (150, 7_500), "LORA": (200, 10_000),
    "GGUF": (100, 5_000), "ORBAX": (100, 5_000), "CONFIGURATION": (100, 5_000),
}  # fmt: skip


def run(name, count, home, first=0):
    ended = check(f"tests.fuzz.converters:{name}", count, home, first)
    assert sum(ended.values()) == count
    assert ended["ok"] > count // 50
    assert ended["CheckpointError"] > count // 10
    print(f"{name}: {count} inputs, {dict(ended)}")


@pytest.mark.parametrize("name", ENTRIES)
def test_some(tmp_path, name):
    run(name, ENTRIES[name][0], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ENTRIES)
def test_many(tmp_path, name):
    """Other inputs than the fast suite's."""
    run(name, ENTRIES[name][1], tmp_path, first=ENTRIES[name][0])
