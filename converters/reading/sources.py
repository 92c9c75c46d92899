"""Where tensors come from: every source gives names, shapes, types and views, and holds nothing in memory.

A view is an array over a memory-mapped file wherever the format allows, so that it costs no anonymous memory and
can be sliced, transposed and written in pieces.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.keymap import Rename, canonical
from converters.reading.formats import SafetensorsSource, read_json, weight_paths

_LARGEST = 1 << 40  # bytes of one array
_MOST_CHUNKS = 100_000  # of one array, each a file
_EXPANSION = 1000  # a compressed checkpoint that claims more bytes per stored byte than this is refused


class Source(Protocol):
    """Named tensors of a checkpoint."""

    files: tuple[Path, ...]
    metadata: Mapping[str, str]

    def keys(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def storage(self, name: str) -> np.dtype: ...
    def view(self, name: str) -> np.ndarray: ...
    def close(self) -> None: ...


def is_float(dtype: np.dtype) -> bool:
    """Whether a storage type holds real numbers (numpy calls bfloat16 and float8 opaque)."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))


class MappedSource(SafetensorsSource):
    """Safetensors files of which every tensor can be read.  Same errors and arguments."""

    def __init__(self, paths, weight_map=None, index="the index"):
        super().__init__(paths, weight_map, index)
        for name in self.keys():
            self.storage(name)


def open_safetensors(path: Path) -> MappedSource:
    """A safetensors file, or the weights of a component folder.

    Raises:
        CheckpointError: anything missing, damaged, pickled or pointing outside its folder.
    """
    if not path.is_dir():
        return MappedSource([path])
    paths, mapping = weight_paths(path)
    return MappedSource(paths, mapping, index=f"the index in {path}")


class NamedSource:
    """Some tensors of another source, under other names.

    Args:
        source: the other source.
        names: name here -> names there; several are declared aliases of one tensor, whose copies must be equal.
    """

    def __init__(self, source: Source, names: Mapping[str, Sequence[str]]):
        self._source, self._names = source, dict(names)
        self.files, self.metadata = source.files, source.metadata

    def keys(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name][0])

    def storage(self, name: str) -> np.dtype:
        return self._source.storage(self._names[name][0])

    def view(self, name: str) -> np.ndarray:
        return self._source.view(self._names[name][0])

    def check_aliases(self) -> None:
        """Raises CheckpointError where two names of one tensor hold different values."""
        for first, *others in self._names.values():
            for other in others:
                a, b = self._source.view(first), self._source.view(other)
                if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(bits(a), bits(b)):
                    raise CheckpointError(
                        f"{first} and {other} are two names of one tensor but differ in the checkpoint; "
                        "it is damaged or of another model: download or convert it again"
                    )

    def close(self) -> None:
        self._source.close()


class ArraySource:
    """Tensors already in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.files: tuple[Path, ...] = ()
        self.metadata: Mapping[str, str] = {}

    def keys(self) -> list[str]:
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def storage(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def view(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def close(self) -> None:
        pass


def renamed(source: Source, rename: Rename) -> NamedSource:
    """A source under the names a key map uses: aliases translated, tensors to ignore hidden.

    Raises:
        CheckpointError: two names of one tensor hold different values.
    """
    named = NamedSource(source, canonical(source.keys(), rename))
    named.check_aliases()
    return named


class ComputedSource:
    """A source some of whose tensors are computed when read (dequantised weights).

    Args:
        source: the stored tensors.
        computed: name -> (shape, type, function giving the array); names that are not listed pass through.
        hidden: stored names to hide (scales).
        scales: names stored in eight bits -> (storage type, function giving the scale of every value).
    """

    def __init__(
        self,
        source: Source,
        computed: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
        hidden: Sequence[str] = (),
        scales: Mapping[str, tuple[str, Callable[[], np.ndarray]]] | None = None,
    ):
        self._source, self._computed, self._scales = source, computed, scales or {}
        self._keys = [name for name in source.keys() if name not in set(hidden)]  # noqa: SIM118
        self.files, self.metadata = source.files, source.metadata

    def keys(self) -> list[str]:
        return self._keys

    def shape(self, name: str) -> tuple[int, ...]:
        return self._computed[name][0] if name in self._computed else self._source.shape(name)

    def storage(self, name: str) -> np.dtype:
        return self._computed[name][1] if name in self._computed else self._source.storage(name)

    def view(self, name: str) -> np.ndarray:
        return self._computed[name][2]() if name in self._computed else self._source.view(name)

    def close(self) -> None:
        self._source.close()


def scale_of(source: Source, name: str) -> tuple[str, np.ndarray] | None:
    """Storage type and scale of every value of a tensor stored in eight bits; None for any other."""
    if isinstance(source, NamedSource):
        return scale_of(source._source, source._names[name][0])
    if isinstance(source, ComputedSource):
        if name in source._scales:
            kind, scale = source._scales[name]
            return kind, scale()
        return None if name in source._computed else scale_of(source._source, name)
    return None


def kept_type(source: Source, name: str) -> np.dtype:
    """The type a tensor is written in unless another is asked for: its own, and bfloat16 for dequantised weights."""
    if isinstance(source, NamedSource):
        return kept_type(source._source, source._names[name][0])
    if isinstance(source, ComputedSource):
        return np.dtype(ml_dtypes.bfloat16) if name in source._scales else kept_type(source._source, name)
    quantised = name in getattr(source, "dequantised", ())
    return np.dtype(ml_dtypes.bfloat16) if quantised else source.storage(name)


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, so that NaNs compare and bfloat16 is fast."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}")) if array.dtype.itemsize in (1, 2, 4, 8) else array


# -- Orbax ---------------------------------------------------------------------------------------------------------

TREE_FILE = "_METADATA"
_ZARR_TYPES = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def is_orbax(folder: Path) -> bool:
    """Whether a folder is an Orbax PyTree checkpoint."""
    return (folder / TREE_FILE).is_file()


class OrbaxSource:
    """An Orbax PyTree checkpoint of nested dictionaries; a tensor's name is its keys joined by dots.

    Uncompressed arrays (as `converters` writes them) are mapped; others are read by tensorstore.

    Raises:
        CheckpointError: the tree is not one of dictionaries and arrays, or an array is missing or damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        tree = read_json(folder / TREE_FILE)
        custom = tree.get("custom_metadata")
        pairs = custom.items() if isinstance(custom, dict) else ()
        self.metadata: dict[str, str] = {name: text for name, text in pairs if isinstance(text, str)}
        self._ocdbt = bool(tree.get("use_ocdbt")) or (folder / "manifest.ocdbt").exists()
        self._driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        self._specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._zarr: dict[str, dict] = {}
        self._stores: dict[str, object] = {}
        for name in _tree_names(tree, folder):
            if self._ocdbt or self._driver == "zarr3":
                store = self._open(name)
                shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
            else:
                shape, dtype = self._read_zarr(name)
            self._specs[name] = (shape, dtype)
        self.files = tuple(sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()))
        claimed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._specs.values())
        stored = sum(path.stat().st_size for path in self.files)
        if claimed > _EXPANSION * stored:
            raise CheckpointError(
                f"{folder}: {stored} bytes claim to hold {claimed}; damaged or made to exhaust memory"
            )

    def _read_zarr(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        path = self._folder / name / ".zarray"
        if path.is_symlink() or path.parent.is_symlink():
            raise CheckpointError(f"{path.parent}: a link; the arrays of a checkpoint must lie in its own folder")
        spec = read_json(path)
        try:
            shape = tuple(spec["shape"])
            chunks = tuple(spec["chunks"])
            dtype = np.dtype(_ZARR_TYPES.get(spec["dtype"], spec["dtype"]))
            sound = spec["zarr_format"] == 2 and spec["order"] in ("C", "F") and len(chunks) == len(shape)
            sound &= all(type(n) is int and n >= 0 for n in shape) and all(type(n) is int and n > 0 for n in chunks)
            sound &= not dtype.hasobject and dtype.itemsize > 0
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(f"{path}: not a zarr array description ({exc!r})") from exc
        if not sound:
            raise CheckpointError(f"{path}: not a zarr array description this tool can read: {spec}")
        # Before any chunk is listed: an array of that many chunks has as many files.
        grid = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
        wide = math.prod(chunks) > 4 * math.prod(shape) + 1024  # a chunk is decompressed as a whole
        if math.prod(shape) * dtype.itemsize > _LARGEST or grid > _MOST_CHUNKS or wide:
            raise CheckpointError(
                f"{path}: an array of shape {str(shape)[:80]} in {grid} chunks of {str(chunks)[:80]}; damaged"
            )
        if spec.get("compressor") is None and not spec.get("filters"):
            self._zarr[name] = {"chunks": chunks, "order": spec["order"]}
            for file, count in self._chunk_files(name, shape):
                self._check_chunk(file, count * dtype.itemsize)
        return shape, dtype

    def _chunk_files(self, name: str, shape: tuple[int, ...]) -> list[tuple[Path, int]]:
        """Chunk files of an uncompressed array split along at most one axis, in order, with their value counts."""
        zarr = self._zarr[name]
        folder, chunks = self._folder / name, zarr["chunks"]
        grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
        axis = len(shape) - 1 if zarr["order"] == "F" else 0
        even = all(size % chunk == 0 for size, chunk in zip(shape, chunks, strict=True))
        if not even or any(n != 1 for i, n in enumerate(grid) if i != axis):
            del self._zarr[name]  # some other writer's chunks: tensorstore reads them
            return []
        count = math.prod(chunks)
        return [
            (folder / ".".join(str(j if i == axis else 0) for i in range(len(shape))), count)
            for j in range(grid[axis] if grid else 0)
        ] or [(folder / "0", 1)]

    def _check_chunk(self, file: Path, nbytes: int) -> None:
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing, though {file.parent / '.zarray'} needs it; convert again")
        if file.stat().st_size != nbytes:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {nbytes}; truncated, convert again")

    def _open(self, name: str):
        if name not in self._stores:
            try:
                import tensorstore
            except ImportError as exc:
                raise CheckpointError(f"{self._folder}: reading it needs tensorstore: pip install tensorstore") from exc
            base = str(self._folder.absolute())
            store = (
                {"driver": "ocdbt", "base": {"driver": "file", "path": f"{base}/"}, "path": f"{name}/"}
                if self._ocdbt
                else {"driver": "file", "path": f"{base}/{name}/"}
            )
            try:
                spec = {"driver": self._driver, "kvstore": store}
                self._stores[name] = tensorstore.open(spec, open=True, read=True).result()
            except (ValueError, OSError) as exc:
                raise CheckpointError(f"{self._folder}: array {name!r} cannot be opened ({exc})") from exc
        return self._stores[name]

    def keys(self) -> list[str]:
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name][0]

    def storage(self, name: str) -> np.dtype:
        return self._specs[name][1]

    def view(self, name: str) -> np.ndarray:
        """The array; mapped if it is stored in one uncompressed chunk, else read."""
        shape, dtype = self._specs[name]
        if name not in self._zarr:
            try:
                return np.asarray(self._open(name).read().result())
            except (ValueError, OSError) as exc:
                raise CheckpointError(f"{self._folder}: array {name!r} cannot be read ({exc})") from exc
        backwards = self._zarr[name]["order"] == "F"
        files = self._chunk_files(name, shape)
        inner = shape[::-1] if backwards else shape
        if math.prod(shape) == 0:
            array = np.empty(inner, dtype)
        elif len(files) == 1:
            array = np.memmap(files[0][0], np.uint8, mode="r").view(np.ndarray).view(dtype).reshape(inner)
        else:
            array = np.concatenate([np.fromfile(file, np.uint8) for file, _ in files]).view(dtype).reshape(inner)
        return array.T if backwards else array

    def close(self) -> None:
        self._stores.clear()


def _tree_names(tree: dict, folder: Path) -> list[str]:
    entries = tree.get("tree_metadata")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{folder / TREE_FILE}: no 'tree_metadata'; not an Orbax PyTree checkpoint")
    names = []
    for key in entries:
        try:
            parts = ast.literal_eval(key)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parts = None
        plain = isinstance(parts, tuple) and parts and all(isinstance(part, str) and part for part in parts)
        if not plain or any("/" in part or "\\" in part or "\0" in part or part.strip(".") == "" for part in parts):
            raise CheckpointError(f"{folder / TREE_FILE}: {key!r} is not a path of plain dictionary keys")
        names.append(".".join(parts))
    if len(set(names)) != len(names):
        raise CheckpointError(f"{folder / TREE_FILE}: two arrays have the same name")
    return names


def tree_metadata(names: Sequence[str], metadata: Mapping[str, str] | None = None) -> str:
    """Orbax's description of a tree of nested dictionaries whose dotted names are given, as JSON."""
    entries = {
        str(tuple(name.split("."))): {
            "key_metadata": [{"key": part, "key_type": 2} for part in name.split(".")],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    return json.dumps(
        {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": dict(metadata) if metadata else None,
        }
    )
