"""What a checkpoint, image or latents file is made of, from names and headers alone."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from PIL import Image

from converters.errors import CheckpointError, naming
from converters.keymap import canonical
from converters.kinds import BY_NAME, FAMILIES, Family
from converters.reading.detect import Kind, detect, recognise
from converters.reading.formats import METADATA_KEY, SafetensorsSource, choose_weights, listing, open_tensors
from converters.reading.gguf import GgufSource, is_gguf
from converters.reading.sources import OrbaxSource, is_orbax
from converters.report import stored_report, summary

RECORDED = (  # fields of a picture's record that people look for, in the order they are shown
    "prompt", "negative_prompt", "seed", "image_index", "width", "height", "steps", "guidance", "true_guidance",
    "positional", "layout", "ladder", "model", "transformer", "loras", "init_image",
)  # fmt: skip
_EXIF_FOLDER, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_SHOWN = 500  # characters of a field


@dataclass(frozen=True)
class Part:
    """One component or file.

    Attributes:
        name: component name, or the file's.
        class_name: what the configuration says it is.
        files: weight files.
        tensors: number of tensors.
        parameters: number of values in them.
        dtypes: storage type -> number of values.
        nbytes: bytes of all tensors.
        problem: why it cannot be used, if so; the counts are then zero.
    """

    name: str
    class_name: str | None = None
    files: tuple[str, ...] = ()
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """What `inspect` found; ``str()`` is a table for people, `to_dict` is for programs.

    Attributes:
        path: what was inspected.
        kind: `converters.reading.detect.Kind` by its value, or "image".
        description: one line.
        parts: components, or the single file.
        metadata: name of each text record in the file -> what it is ("JSON, 14 fields").
        record: of a picture or latents made by sega-jax: what it was made from, the fields of `RECORDED` that are set.
        conversion: the report of the conversion that made it, if one lies beside it.
    """

    path: str
    kind: str
    description: str
    parts: tuple[Part, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    conversion: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain dictionaries, lists and numbers."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}", f"  {self.description}"]
        weighed = [part for part in self.parts if part.tensors]
        if weighed:
            header = ("component", "class", "tensors", "parameters", "bytes", "dtypes", "files")
            rows = [_row(part) for part in self.parts]
            if len(weighed) > 1:
                rows.append(_row(_total(weighed)))
            widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
            for row in [header, *rows]:
                cells = [
                    cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
                ]
                lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"  problem in {part.name}: {part.problem}" for part in self.parts if part.problem]
        lines += [f"  metadata {name!r}: {what}" for name, what in self.metadata.items()]
        lines += [f"  {name}: {_readable(value)}" for name, value in self.record.items()]
        if self.conversion:
            lines.append("  " + summary(self.conversion).replace("\n", "\n  "))
        return "\n".join(lines)


def _row(part: Part) -> tuple[str, ...]:
    shares = ", ".join(
        dtype if len(part.dtypes) == 1 else f"{dtype} {count / max(part.parameters, 1):.1%}"
        for dtype, count in part.dtypes.items()
    )
    return (
        part.name,
        part.class_name or "-",
        str(part.tensors or "-"),
        f"{part.parameters:,}" if part.tensors else "-",
        f"{part.nbytes:,}" if part.tensors else "-",
        shares or "-",
        str(len(part.files) or "-"),
    )


def _total(parts: list[Part]) -> Part:
    dtypes: Counter[str] = Counter()
    for part in parts:
        dtypes.update(part.dtypes)
    return Part(
        name="total",
        files=tuple(file for part in parts for file in part.files),
        tensors=sum(part.tensors for part in parts),
        parameters=sum(part.parameters for part in parts),
        dtypes=dict(dtypes.most_common()),
        nbytes=sum(part.nbytes for part in parts),
    )


def _weigh(name: str, class_name: str | None, source: SafetensorsSource) -> Part:
    dtypes: Counter[str] = Counter()
    for key in source.keys():  # noqa: SIM118  not a mapping
        dtypes[source.dtype(key)] += math.prod(source.shape(key))
    return Part(
        name=name,
        class_name=class_name,
        files=tuple(path.name for path in source.files),
        tensors=len(source.keys()),
        parameters=dtypes.total(),
        dtypes=dict(dtypes.most_common()),
        nbytes=source.nbytes,
    )


def _weigh_orbax(folder: Path, name: str, class_name: str | None) -> Part:
    source = OrbaxSource(folder)
    dtypes: Counter[str] = Counter()
    nbytes = 0
    for key in source.keys():  # noqa: SIM118  not a mapping
        count = math.prod(source.shape(key))
        dtypes[source.storage(key).name] += count
        nbytes += count * source.storage(key).itemsize
    source.close()
    tensors = len(source.keys())
    return Part(name, class_name, ("_METADATA",), tensors, dtypes.total(), dict(dtypes.most_common()), nbytes)


def _component(folder: Path, name: str, class_name: str | None) -> Part:
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: the folder is missing")
        if is_orbax(folder):
            return _weigh_orbax(folder, name, class_name)
        names = [entry.name for entry in folder.iterdir()]
        if choose_weights(names, str(folder)) is None:
            if "config.json" in names:
                raise CheckpointError(f"{folder}: has a config.json but no safetensors weights")
            return Part(name, class_name)  # a tokenizer or a scheduler
        with open_tensors(folder) as source:
            return _weigh(name, class_name, source)
    except CheckpointError as exc:
        return Part(name, class_name, problem=str(exc))


def inspect(path: str | Path) -> Report:
    """What lies at a path.  Reads names and headers, never weights or pixels.

    Args:
        path: a pipeline or component folder, a folder of single files, a safetensors or GGUF file, or an image.

    Raises:
        CheckpointError: nothing is there, or it is neither a checkpoint nor an image.  A damaged component of a
            pipeline is reported in its part instead.
    """
    path = Path(path)
    with naming(path):
        return _inspect(path)


def _inspect(path: Path) -> Report:
    if path.is_file() and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        return _inspect_image(path)
    return replace(_inspect_weights(path), conversion=stored_report(path))


def _inspect_weights(path: Path) -> Report:
    if path.is_file() and is_gguf(path):
        return _inspect_gguf(path)
    layout = detect(path)
    if layout.kind is not Kind.PIPELINE and is_orbax(path):
        part = _weigh_orbax(path, path.name, layout.class_name)
        return Report(str(path), "Orbax checkpoint", f"{part.tensors} arrays", (part,))
    kind, description = layout.kind.value, layout.description
    match layout.kind:
        case Kind.PIPELINE:
            parts = tuple(
                _component(path / name, name, class_name) for name, (_, class_name) in layout.components.items()
            )
            return Report(str(path), kind, description, parts)
        case Kind.COMPONENT:
            return Report(str(path), kind, description, (_component(path, path.name, layout.class_name),))
        case Kind.SAFETENSORS | Kind.BFL_TRANSFORMER:
            with open_tensors(path) as source:
                metadata = {name: _kind_of(text) for name, text in source.metadata.items()}
                if description == "latents":
                    description = f"latents {list(source.shape('latents'))}"
                record = _picked(source.metadata.get(METADATA_KEY, ""))
                return Report(str(path), kind, description, (_weigh(path.name, None, source),), metadata, record)
    if path.is_dir():
        return _inspect_folder(path, description)
    raise CheckpointError(f"{path}: {description}")


def _inspect_folder(path: Path, description: str) -> Report:
    """A folder of single files (a LoRA's, or what ``--to bfl`` makes of a pipeline), or one of component folders."""
    entries = listing(path)
    folders = tuple(_component(path / name, name, None) for name in BY_NAME if (path / name).is_dir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix == ".safetensors"]
    if not folders and not files:
        raise CheckpointError(f"{path}: {description}")
    parts = folders or tuple(_single(file) for file in files)
    kind = "folder of components" if folders else "folder of single files"
    return Report(str(path), kind, ", ".join(part.name for part in parts), parts)


def _single(file: Path) -> Part:
    try:
        with SafetensorsSource([file]) as source:
            return _weigh(file.name, recognise(source.keys())[1], source)
    except CheckpointError as exc:
        return Part(file.name, problem=str(exc))


def _inspect_gguf(path: Path) -> Report:
    with contextlib.closing(GgufSource(path)) as source:
        dtypes: Counter[str] = Counter()
        for kind, count, _ in source.stored.values():
            dtypes[kind] += count
        nbytes = sum(size for _, _, size in source.stored.values())
        found = next((what for family in FAMILIES if (what := _as_kind(family, source.keys()))), "of an unknown model")
        part = Part(
            path.name, None, (path.name,), len(source.stored), dtypes.total(), dict(dtypes.most_common()), nbytes
        )
        metadata = {name: f"text, {len(text)} characters" for name, text in source.metadata.items()}
    return Report(str(path), "GGUF file", f"GGUF {found}", (part,), metadata)


def _as_kind(family: Family, names: Collection[str]) -> str | None:
    known = canonical(names, family.rename)
    return next(
        (f"{family.name} in {layout} names" for layout, sign in family.signatures.items() if sign in known), None
    )


_IMAGES = ("PNG", "JPEG", "WEBP")  # other decoders take gigabytes for a few bytes


def _inspect_image(path: Path) -> Report:
    try:  # warnings are of large pictures and of damaged EXIF
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_IMAGES) as image:
            description = f"{image.format} image, {image.width}x{image.height}, mode {image.mode}"
            metadata = {name: _kind_of(text) for name, text in image.info.items() if isinstance(text, str)}
            record = _picked(image.info.get(METADATA_KEY, ""))
            comment = image.getexif().get_ifd(_EXIF_FOLDER).get(_USER_COMMENT, b"")
            if isinstance(comment, bytes) and METADATA_KEY.encode() in comment:
                metadata[METADATA_KEY] = "JSON in the EXIF user comment"
                record = _picked(comment.removeprefix(_ASCII).decode("utf-8", "replace"))
    except Exception as exc:  # decoders meet damage in many ways, such as struct.error
        raise CheckpointError(f"{path}: cannot be read as an image ({exc or type(exc).__name__})") from exc
    if METADATA_KEY not in metadata:
        description += ", not made by sega-jax or stripped of its record"
    return Report(str(path), "image", description, metadata=metadata, record=record)


def _picked(text: object) -> dict:
    """The fields of `RECORDED` of a record that are set; nothing of what is no record."""
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    inner = record.get(METADATA_KEY)  # an EXIF comment holds the record under its key; in a record that is the version
    record = inner if isinstance(inner, dict) else record
    return {name: record[name] for name in RECORDED if record.get(name) is not None}


def _readable(value: object) -> str:
    """A value on one line, without characters that would do something to a terminal."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = "".join(character if character.isprintable() else " " for character in text[:_SHOWN])
    return shown + ("..." if len(text) > _SHOWN else "")


def _kind_of(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return f"text, {len(text)} characters"
    return f"JSON, {len(value)} fields" if isinstance(value, dict) else f"text, {len(text)} characters"
