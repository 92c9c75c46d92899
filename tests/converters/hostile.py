"""What the tests of bad inputs and bad ends share."""

import tracemalloc

import pytest

from converters.convert import convert
from converters.errors import CheckpointError

MEMORY = 40_000_000  # bytes; the tiny checkpoints are under one megabyte


def file_of(folder):
    return next(folder.glob("*.safetensors"))


def refused(source, tmp_path, match=None, **options):
    """The conversion is refused as a checkpoint error, cheaply, and leaves nothing behind."""
    before = {entry.name for entry in tmp_path.iterdir()}
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match):
            convert(source, tmp_path / "out", to="orbax", verify="exact", progress=False, **options)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert {entry.name for entry in tmp_path.iterdir()} == before
