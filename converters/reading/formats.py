"""Safetensors files and the folders around them, opened lazily.  Nothing here runs code from a checkpoint.

Weights are read from safetensors only: one file, or a component folder whose ``*.safetensors.index.json`` names
shards beside it.  Headers are checked by the safetensors library before anything is allocated; files are
memory-mapped, so a tensor costs memory when it is read and not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.reading.header import Entry, read_header

JSON_LIMIT = 100_000_000  # bytes; the same bound safetensors sets for its headers
METADATA_KEY = "sega_jax"  # under which images and latents files hold the record of their making
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNSUPPORTED = "a quantised format that is not supported; use the bfloat16 or float16 version of the checkpoint"
# safetensors' spelling -> numpy
STORAGE: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F32": np.float32, "F64": np.float64, "C64": np.complex64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Weight files of a component, chosen by name: one file, or an index and the shards it should name."""

    files: tuple[str, ...]
    index: str | None = None


# -- small files ---------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: missing, unreadable, over 100 MB, not JSON, or not an object.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: a pipe or device, not a file")
        if size > JSON_LIMIT:
            raise CheckpointError(f"{path}: {size} bytes is too large for a JSON file (limit {JSON_LIMIT})")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete, download it again") from None
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    if (disguise := _disguise(raw[:64])) is not None:
        raise CheckpointError(f"{path}: expected JSON, this is {disguise}")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{path}: expected JSON in UTF-8 ({exc.reason} at byte {exc.start})") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: not valid JSON ({exc}); download it again") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _disguise(head: bytes) -> str | None:
    """What a file is that is often met under another name; None if nothing known."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: the content was not fetched, run `git lfs pull` in the repository"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: the download was refused or redirected; fetch it with `hf download` after `hf auth login`"
    if head.startswith(b"PK\x03\x04"):
        return f"a zip archive, as torch.save writes it. {PICKLE_REMEDY}"
    if re.match(rb"\x80[\x02-\x05][^\x00]", head, re.DOTALL):
        return f"a Python pickle. {PICKLE_REMEDY}"
    if head.startswith(b"GGUF"):
        return "a GGUF file: `sega-jax convert` reads it (extra gguf), and `--transformer` takes it"
    return None


PICKLE_REMEDY = (
    "Pickles can run code when opened and are refused: use the safetensors files of the model, or save it again "
    "with torch's weights_only loader and safetensors.torch.save_file"
)


# -- which files make up a component ---------------------------------------------------------------------------

_STEMS = "diffusion_pytorch_model|model"
_WEIGHT = re.compile(rf"(?P<stem>{_STEMS})(\.(?P<a>\w+))?(?P<shard>-\d+-of-\d+)?(\.(?P<b>\w+))?\.safetensors", re.ASCII)
_INDEX = re.compile(rf"(?P<stem>{_STEMS})\.safetensors\.index(\.(?P<variant>\w+))?\.json", re.ASCII)


def choose_weights(names: Collection[str], where: str) -> Weights | None:
    """The weight files of a component among the file names of its folder.

    Only the names diffusers and transformers write are considered, so a single-file checkpoint lying in the same
    folder is never taken.  The plain files win over variants (``.fp16``); a lone variant is used.

    Args:
        names: plain file names.
        where: what to call the folder in errors.

    Returns:
        The files, or None if there are no weights at all.

    Raises:
        CheckpointError: only pickles, shards without an index, an index without shards, or several candidates.
    """
    singles: dict[str, list[str]] = {}
    shards: dict[str, list[str]] = {}
    indices: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := _INDEX.fullmatch(name):
            indices.setdefault(match["variant"] or "", []).append(name)
        elif match := _WEIGHT.fullmatch(name):
            group = shards if match["shard"] else singles
            group.setdefault(match["a"] or match["b"] or "", []).append(name)
    variants = sorted(singles.keys() | shards.keys() | indices.keys())
    if not variants:
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise CheckpointError(f"{where}: only pickled weights ({', '.join(pickles)}). {PICKLE_REMEDY}")
        return None
    if "" not in variants and len(variants) > 1:
        raise CheckpointError(f"{where}: several variants ({', '.join(variants)}) and no plain one; keep one of them")
    variant = "" if "" in variants else variants[0]
    single, parts, index = (group.get(variant, []) for group in (singles, shards, indices))
    if len(single) + len(index) > 1:
        raise CheckpointError(
            f"{where}: {' and '.join([*single, *index])} both claim to be the weights; remove the stale one"
        )
    if single:
        return Weights(files=(single[0],))
    if not index:
        raise CheckpointError(f"{where}: shards ({parts[0]}, ...) without their .safetensors.index.json; download it")
    if not parts:
        raise CheckpointError(f"{where}: {index[0]} is there but none of its shards; download them")
    return Weights(files=tuple(parts), index=index[0])


def _plain_name(name: str) -> bool:
    pure = (PurePosixPath(name), PureWindowsPath(name))
    return all(p.name == name for p in pure) and name not in ("", ".", "..") and "\0" not in name


def _hub_blobs(folder: Path) -> Path | None:
    """The hub cache's blob store, if the folder is (in) one of its snapshots, whose files are links into it."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent / "blobs"
    return None


def inside(folder: Path, name: str, named_by: str) -> Path:
    """The file ``name`` of a folder, refused if it is anywhere else."""
    if not _plain_name(name):
        raise CheckpointError(f"{named_by} names {name!r}; only plain file names in its own folder are allowed")
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: missing, though {named_by} needs it; download it again") from None
    except (OSError, RuntimeError) as exc:  # a loop of links is RuntimeError before Python 3.13
        raise CheckpointError(f"{path}: cannot be followed ({exc})") from exc
    blobs = _hub_blobs(home)
    if not real.is_relative_to(home) and not (blobs and real.is_relative_to(blobs)):
        raise CheckpointError(
            f"{path} is a link that leaves its folder (to {real}); put the file itself there or a hard link to it"
        )
    return path


def weight_paths(folder: str | Path) -> tuple[list[Path], dict[str, str] | None]:
    """Weight files of a component folder, all present, with the index's tensor -> file map when sharded.

    Raises:
        CheckpointError: no weights, missing shards, an index that points elsewhere.
    """
    folder = Path(folder)
    weights = choose_weights([entry.name for entry in listing(folder) if not entry.is_dir()], str(folder))
    if weights is None:
        raise CheckpointError(
            f"{folder}: no weights; expected diffusion_pytorch_model*.safetensors or model*.safetensors"
        )
    if weights.index is None:
        return [inside(folder, weights.files[0], f"the folder {folder}")], None
    index = folder / weights.index
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(f"{index}: expected a non-empty object 'weight_map' from tensor names to file names")
    for name in mapping.values():
        if name.endswith(PICKLE_SUFFIXES):
            raise CheckpointError(f"{index} names the pickle {name!r}. {PICKLE_REMEDY}")
    return [inside(folder, name, str(index)) for name in sorted(set(mapping.values()))], mapping


def listing(folder: Path) -> list[Path]:
    """Entries of a folder in order of their names.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no such folder; the checkpoint is incomplete") from None
    except OSError as exc:
        raise CheckpointError(f"{folder}: cannot be listed ({exc.strerror or exc})") from exc


# -- tensors -----------------------------------------------------------------------------------------------------


class SafetensorsSource:
    """Tensors of one safetensors file or of a sharded set, memory-mapped.  A `TensorSource`; close it or use `with`.

    Args:
        paths: the files.
        weight_map: tensor name -> file name as the index says; the files must hold exactly these tensors.
        index: the index file, for messages.

    Raises:
        CheckpointError: a file is damaged, not safetensors, or disagrees with the index.
    """

    def __init__(self, paths: Iterable[Path], weight_map: Mapping[str, str] | None = None, index: str = "the index"):
        self.files = tuple(paths)
        self._maps: dict[Path, np.memmap] = {}
        self._home: dict[str, Path] = {}
        self._entries: dict[str, Entry] = {}
        self._metadata: dict[str, str] = {}
        for number, path in enumerate(self.files):
            self._add(path, number == 0)
        if weight_map is not None:
            self._check_index(weight_map, index)

    def _add(self, path: Path, first: bool) -> None:
        check_file(path)
        header = read_header(path)
        if first:
            self._metadata = dict(header.metadata)
        for name, entry in header.tensors.items():
            if name in self._home:
                raise CheckpointError(f"tensor {name!r} is in both {self._home[name]} and {path}")
            self._home[name], self._entries[name] = path, entry
        self._maps[path] = np.memmap(path, np.uint8, mode="r")

    def _check_index(self, weight_map: Mapping[str, str], index: str) -> None:
        problems = [
            f"{name}: the index says {file}, "
            + (f"it is in {self._home[name].name}" if name in self._home else "which lacks it")
            for name, file in weight_map.items()
            if name not in self._home or self._home[name].name != file
        ]
        problems += [
            f"{name}: in {path.name} but not in the index"
            for name, path in self._home.items()
            if name not in weight_map
        ]
        if problems:
            shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
            raise CheckpointError(
                f"{index} does not match its shards ({len(problems)} problems); files of different versions are mixed, "
                f"download the folder again:\n  {shown}"
            )

    def keys(self) -> list[str]:
        """Tensor names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Storage type in safetensors' spelling (``"BF16"``, ``"F8_E4M3"``), from the header."""
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        """The file a tensor lies in."""
        self._entry(name)
        return self._home[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.end - entry.start for entry in self._entries.values())

    @property
    def metadata(self) -> dict[str, str]:
        """The string metadata of the first file."""
        return dict(self._metadata)

    def storage(self, name: str) -> np.dtype:
        """Storage type as numpy knows it.

        Raises:
            CheckpointError: a type numpy cannot hold (smaller than float8).
        """
        dtype = self.dtype(name)
        if dtype not in STORAGE:
            raise CheckpointError(f"{self._home[name]}: tensor {name!r} is stored as {dtype}, {_UNSUPPORTED}")
        return STORAGE[dtype]

    def view(self, name: str) -> np.ndarray:
        """The tensor, read-only, over the mapped file.

        Raises:
            CheckpointError: as `storage`.
            ValueError: the source is closed.
        """
        dtype, entry, path = self.storage(name), self._entry(name), self._home[name]
        if path not in self._maps:
            raise ValueError(f"{path}: the source is closed")
        return self._maps[path][entry.start : entry.end].view(np.ndarray).view(dtype).reshape(entry.shape)

    def read(self, name: str) -> np.ndarray:
        """A tensor as an array of its own.

        Raises:
            CheckpointError, ValueError: as `view`, and for float8, whose values mean nothing without their scales.
        """
        if (dtype := self.dtype(name)).startswith("F8"):
            raise CheckpointError(f"{self._home[name]}: tensor {name!r} is stored as {dtype}, {_UNSUPPORTED}")
        return self.view(name).copy()

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            where = self.files[0] if len(self.files) == 1 else self.files[0].parent
            raise CheckpointError(f"{where}: no tensor named {name!r}") from None

    def close(self) -> None:
        """Unmaps the files once no view is left.  Arrays already read stay valid."""
        self._maps.clear()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def check_file(path: Path) -> None:
    """Raises CheckpointError where there is no file, or one that is something else under the name of safetensors."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: " + ("not a file" if path.exists() else "no such file"))
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    # A safetensors header of 640 + 65536 n bytes begins like a pickle, so its brace is looked at first.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length + 8 > size:
        if (disguise := _disguise(head)) is not None:
            raise CheckpointError(f"{path}: expected safetensors, this is {disguise}")
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(f"{path}: looks like a pickle by its name. {PICKLE_REMEDY}")


def open_tensors(path: str | Path) -> SafetensorsSource:
    """Lazy tensors of a ``.safetensors`` file or of a component folder.

    Args:
        path: a file, or a folder holding ``diffusion_pytorch_model*`` or ``model*`` weights.

    Raises:
        CheckpointError: anything missing, damaged, pickled, pointing outside its folder, or a whole pipeline.
    """
    path = Path(path)
    if not path.is_dir():
        return SafetensorsSource([path])
    if (path / "model_index.json").exists():
        names = ", ".join(read_pipeline(path))
        raise CheckpointError(f"{path}: a whole pipeline; open one of its component folders ({names})")
    paths, mapping = weight_paths(path)
    return SafetensorsSource(paths, mapping, index=f"the index in {path}")


# -- pipelines -----------------------------------------------------------------------------------------------------


def read_pipeline(folder: str | Path) -> dict[str, tuple[str, str]]:
    """Components named by a pipeline's ``model_index.json``: name -> (library, class), empty ones left out.

    Raises:
        CheckpointError: the index is unreadable or names something that is not a plain folder name.
    """
    return parse_pipeline(read_json(Path(folder) / "model_index.json"), str(Path(folder) / "model_index.json"))


def parse_pipeline(index: Mapping[str, object], where: str) -> dict[str, tuple[str, str]]:
    """`read_pipeline` for a ``model_index.json`` already read; ``where`` names it in errors."""
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue  # bookkeeping and plain settings
        if not _plain_name(name):
            raise CheckpointError(f"{where} names the component {name!r}; only plain folder names are allowed")
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise CheckpointError(f"{where}: component {name!r} should be [library, class], got {value!r}")
        if value[0] is not None and value[1] is not None:
            components[name] = (value[0], value[1])
    if not components:
        raise CheckpointError(f"{where}: names no components; it is not a diffusers pipeline index")
    return components
