"""Writing tensors as they come: from views of mapped files, block by block, into files whose layout is known first.

Nothing larger than a block is held in memory, except where a tensor has to be permuted or computed as a whole.
Flushing to the disk is left to the caller, once, at the end.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from converters.errors import CheckpointError
from converters.reading.formats import STORAGE
from converters.reading.sources import TREE_FILE, bits, is_float, tree_metadata

BLOCK = 8 << 20  # bytes that a worker holds while it writes
CHUNK_LIMIT = 128 << 20  # bytes of one Orbax chunk; larger arrays are split
TILE = 256  # values per side of the tiles in which matrices are transposed
_COPY = hasattr(os, "copy_file_range")  # Linux
_COPY_FROM = 64 << 10  # smaller arrays are written as they are
_COPY_STEP = 32 << 20  # bytes between steps of the bar
_SPELLING = {dtype: name for name, dtype in STORAGE.items()}


@dataclass(frozen=True)
class Output:
    """One tensor to write.

    Attributes:
        name: its name there.
        shape, dtype: as it will be stored.
        pieces: arrays that make it up when joined along the first axis; called when it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Sequence[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Progress:
    """A bar with bytes, rate and time left, shared by the workers."""

    def __init__(self, total: int, label: str, shown: bool):
        self._bar = tqdm(
            total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None if shown else True
        )
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._bar.update(nbytes)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.close()


def in_parallel(tasks: Sequence[Callable[[], None]], workers: int) -> None:
    """Runs tasks on threads; after the first failure the rest is dropped and the failure raised."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def default_workers() -> int:
    """Threads used where none are asked for: up to four, as many as there are processors."""
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in row order; itself if it is so already.  Transposed matrices are copied tile by tile."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    source, target = bits(array), bits(result)
    for i in range(0, array.shape[0], TILE):
        for j in range(0, array.shape[1], TILE):
            target[i : i + TILE, j : j + TILE] = source[i : i + TILE, j : j + TILE]
    return result


def blocks(array: np.ndarray, limit: int = BLOCK) -> Iterator[np.ndarray]:
    """Contiguous blocks of an array in row order, each of about ``limit`` bytes and of at least one row."""
    array = array.reshape(-1) if array.flags.c_contiguous or array.ndim == 0 else array
    if array.size == 0:
        return
    rows = max(1, limit // (array.nbytes // array.shape[0]))
    for start in range(0, array.shape[0], rows):
        yield contiguous(array[start : start + rows])


def cast(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A block rounded to another type (to nearest, ties to even).

    Raises:
        CheckpointError: a finite value exceeds the range of the type.
    """
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore", invalid="ignore"):
        result = block.astype(dtype)
    if not all_finite(result) and not np.array_equal(np.isfinite(result), np.isfinite(block)):
        largest = np.abs(block[np.isfinite(block)].astype(np.float64)).max()
        raise CheckpointError(
            f"{name}: values up to {largest:.4g} do not fit in {dtype.name}; convert to bfloat16 or float32 instead"
        )
    return result


_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if not is_float(array.dtype):
        return True
    mask = _EXPONENTS.get(array.dtype.name)
    if mask is None:
        return bool(np.isfinite(array).all())
    # NaN and infinity are the values whose exponent is all ones, the largest there is.
    return array.size == 0 or int((bits(array) & bits(array).dtype.type(mask)).max()) != mask


def _put(descriptor: int, offset: int, data: bytes | memoryview) -> int:
    data = memoryview(data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
    return offset


def _in_file(array: np.ndarray) -> tuple[str, int] | None:
    """The file and the offset in it of a contiguous array over a mapped file; None for any other array."""
    base = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and not isinstance(base.base, np.ndarray):
            start = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
            return os.fspath(base.filename), base.offset + start
        base = base.base
    return None


def _copy_in_kernel(descriptor: int, offset: int, array: np.ndarray, progress: Progress) -> int:
    """Copies as much of a mapped array as the system can copy between files by itself; returns the bytes copied."""
    place = _in_file(array) if _COPY and array.flags.c_contiguous and array.nbytes >= _COPY_FROM else None
    if place is None:
        return 0
    path, start = place
    done = 0
    source = os.open(path, os.O_RDONLY)
    try:
        while done < array.nbytes:
            step = min(_COPY_STEP, array.nbytes - done)
            copied = os.copy_file_range(source, descriptor, step, start + done, offset + done)
            if not copied:
                break
            done += copied
            progress.add(copied)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(source)
    return done


def write_array(descriptor: int, offset: int, array: np.ndarray, dtype: np.dtype, name: str, progress: Progress) -> int:
    """Writes an array at an offset, cast on the way; returns the offset after it."""
    if array.dtype == dtype:
        copied = _copy_in_kernel(descriptor, offset, array, progress)
        if copied:
            array, offset = array.reshape(-1).view(np.uint8)[copied:], offset + copied
            dtype = array.dtype
    for block in blocks(array):
        data = memoryview(cast(block, dtype, name).reshape(-1).view(np.uint8))
        offset = _put(descriptor, offset, data)
        progress.add(len(data))
    return offset


# -- safetensors ---------------------------------------------------------------------------------------------------


def write_safetensors(
    path: Path, outputs: Sequence[Output], metadata: Mapping[str, str], workers: int, progress: Progress
) -> None:
    """A safetensors file, its header made from shapes alone and its tensors written where they belong."""
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = [], 0
    for output in ordered:
        offsets.append(end)
        end += output.nbytes
        header[output.name] = {
            "dtype": _SPELLING[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offsets[-1], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        os.ftruncate(descriptor, start + end)
        _put(descriptor, 0, len(text).to_bytes(8, "little") + text)

        def task(output: Output, offset: int) -> Callable[[], None]:
            def write() -> None:
                position = start + offset
                for piece in output.pieces():
                    position = write_array(descriptor, position, piece, output.dtype, output.name, progress)
                if position != start + offset + output.nbytes:
                    raise CheckpointError(f"{output.name}: wrote {position - start - offset} of {output.nbytes} bytes")

            return write

        in_parallel([task(output, offset) for output, offset in zip(ordered, offsets, strict=True)], workers)
    finally:
        os.close(descriptor)


def write_sharded(
    folder: Path, stem: str, outputs: Sequence[Output], limit: int, workers: int, progress: Progress
) -> None:
    """Weights of a diffusers or transformers folder: one file, or shards of at most ``limit`` bytes and an index."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", outputs, metadata, workers, progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, metadata, workers, progress)
        weight_map |= {output.name: name for output in shard}
    index = {"metadata": {"total_size": sum(output.nbytes for output in outputs)}, "weight_map": weight_map}
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))


def write_text(path: Path, text: str) -> None:
    """A small text file."""
    path.write_text(text + "\n", encoding="utf-8")


# -- Orbax ---------------------------------------------------------------------------------------------------------


def _split(rows: int, nbytes: int) -> int:
    """Into how many equal runs of rows an array is cut so that none exceeds `CHUNK_LIMIT`, if that can be."""
    wanted = -(-nbytes // CHUNK_LIMIT)
    return next((n for n in range(wanted, min(rows, 64 * wanted) + 1) if rows % n == 0), 1) if wanted > 1 else 1


def _write_orbax_array(folder: Path, output: Output, progress: Progress) -> None:
    (array,) = output.pieces()
    # A transposed view is stored in column order: the same bytes as in the source, read back as [in, out].
    backwards = array.ndim > 1 and array.T.flags.c_contiguous and not array.flags.c_contiguous
    stored = array.T if backwards else array
    rows = stored.shape[0] if stored.ndim else 1
    count = _split(rows, output.nbytes)
    chunks = list(stored.shape)
    if chunks:
        chunks[0] = max(1, rows // count)
    axis = len(chunks) - 1 if backwards else 0
    description = {
        "chunks": [max(1, n) for n in (chunks[::-1] if backwards else chunks)],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": output.dtype.name if is_ml(output.dtype) else output.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "F" if backwards else "C",
        "shape": list(output.shape),
        "zarr_format": 2,
    }
    home = folder / output.name
    home.mkdir()
    (home / ".zarray").write_text(json.dumps(description), encoding="utf-8")
    for j in range(count if array.size else 0):
        name = ".".join(str(j if i == axis else 0) for i in range(len(chunks))) or "0"
        descriptor = os.open(home / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            part = stored[j * rows // count : (j + 1) * rows // count] if chunks else stored
            write_array(descriptor, 0, part, output.dtype, output.name, progress)
        finally:
            os.close(descriptor)


def is_ml(dtype: np.dtype) -> bool:
    """Whether a type is one of ml_dtypes', which have no spelling of numpy's own."""
    return dtype.name.startswith(("bfloat", "float8"))


def write_orbax(
    folder: Path, outputs: Sequence[Output], workers: int, progress: Progress, metadata: Mapping[str, str] | None = None
) -> None:
    """An Orbax PyTree checkpoint (zarr, uncompressed) in an existing folder; plain Orbax restores it."""

    def task(output: Output) -> Callable[[], None]:
        return lambda: _write_orbax_array(folder, output, progress)

    in_parallel([task(output) for output in outputs], workers)
    write_text(folder / TREE_FILE, tree_metadata([output.name for output in outputs], metadata))
