"""Opening a checkpoint, whatever layout it comes in, as the components it is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.cover import check_cover
from converters.errors import CheckpointError, CoverageError, naming
from converters.keymap import Slot, Tensor, canonical
from converters.keymaps import t5, vae
from converters.kinds import BY_NAME, FAMILIES, Family, Shapes
from converters.others import refuse_others, refuse_pipeline, refuse_quantised
from converters.reading.formats import PICKLE_SUFFIXES, choose_weights, read_json, read_pipeline
from converters.reading.gguf import GgufSource, is_gguf
from converters.reading.pickles import TorchSource
from converters.reading.quantised import dequantise
from converters.reading.sources import NamedSource, OrbaxSource, Source, is_orbax, open_safetensors
from converters.report import REPORT_FILE

CONFIG_KEY = "config"  # under which single files that we write keep the component's configuration

# Prefixes of components inside a ComfyUI single file, of which one may stand alone.
BUNDLE_PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("cond_stage_model.clip_l.transformer.", "text_encoder"),
    ("cond_stage_model.t5xxl.transformer.", "text_encoder_2"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)
_BUNDLE_IGNORED = tuple(
    f"{root}.{encoder}.logit_scale" for root in ("text_encoders", "cond_stage_model") for encoder in ("clip_l", "t5xxl")
)


@dataclass(frozen=True)
class Part:
    """One component of a checkpoint, opened.

    Attributes:
        family: what it is.
        layout: a layout of the family, or ``orbax``.
        origin: the layout it had before a conversion to Orbax that recorded it; else ``layout``.
        config: its configuration.
        config_from: where that comes from: ``config.json``, ``metadata`` or ``tensor shapes``.
        source: its tensors by the names of the key map.
        tensors: the expanded key map.
        names: key-map name -> its names in the checkpoint; for Orbax, in the one it was made from, if noted
            and different.
        ignored: tensors of the checkpoint that belong to parts the model does not use.
        folder: the component's folder, whose other files go along; None for single files.
    """

    family: Family
    layout: str
    origin: str
    config: dict
    config_from: str
    source: Source
    tensors: list[Tensor]
    names: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    folder: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as they are read."""
        kinds = ((tensor, self.source.storage(tensor.source)) for tensor in self.tensors)
        return sum(math.prod(tensor.shape) * kind.itemsize for tensor, kind in kinds)

    def names_for(self, layout: str) -> Callable[[str], tuple[str, ...]]:
        """The names under which a tensor of the key map is written in a layout."""
        if layout == "orbax":
            return lambda known: (known,)
        if layout == self.origin and layout != "bfl":
            return lambda known: self.names.get(known, (known,))
        return lambda known: (self.family.prefix + known,)

    def slots(self) -> dict[Slot, tuple[Tensor, int]]:
        """Every slot, with the tensor and the piece of it that fills the slot."""
        return {slot: (tensor, i) for tensor in self.tensors for i, slot in enumerate(tensor.slots)}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: its parts by component name, and the pipeline folder if it is one."""

    path: Path
    layout: str
    parts: dict[str, Part]
    pipeline: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Weight files."""
        return tuple(dict.fromkeys(file for part in self.parts.values() for file in part.source.files))

    def close(self) -> None:
        for part in self.parts.values():
            part.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _recognise(names: Collection[str], shapes: Shapes) -> tuple[Family, str] | None:
    for family in FAMILIES:
        known = canonical(names, family.rename)
        for layout, signature in family.signatures.items():
            if signature in known:
                return family, vae.detect(shapes) if family.name == "vae" else layout
    return None


def _part(source: Source, where: str, folder: Path | None, recorded: Mapping[str, Any]) -> Part:
    names = source.keys()
    shapes = {name: source.shape(name) for name in names}
    orbax = isinstance(source, OrbaxSource)
    config, config_from = None, "config.json"
    if folder is not None and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        refuse_quantised(config, where)
    elif CONFIG_KEY in source.metadata:
        config, config_from = _metadata_config(source, where), "metadata"
    if orbax:
        family = _orbax_family(names, where)
        if config is None:
            raise CheckpointError(f"{folder}: no config.json beside the Orbax arrays; copy the component's there")
        layout, aliases, ignored = "orbax", {name: (name,) for name in names}, ()
    else:
        file = folder if folder is not None else source.files[0] if source.files else Path()
        refuse_others(names, source.shape, source.metadata, where, file.name)
        found = _recognise(names, shapes)
        if found is None:
            raise CheckpointError(
                f"{where}: not a component this tool knows ({', '.join(BY_NAME)} of FLUX.1); its tensors begin with "
                f"{sorted(names)[:3]}"
            )
        family, layout = found
        aliases = canonical(names, family.rename)
        ignored = tuple(name for name in names if family.rename(name) is None)
        if config is None:
            by_key = {known: shapes[first] for known, (first, *_) in aliases.items()}
            try:
                config, config_from = family.infer(by_key, layout), "tensor shapes"
            except (KeyError, IndexError, ValueError, ZeroDivisionError) as exc:
                raise CheckpointError(f"{where}: incomplete {family.name}: no usable tensor {exc}") from exc
    config = {**family.implied(aliases), **config}
    _check_counts(config, len(names), where)
    named = NamedSource(source, aliases)
    tensors = family.tensors(config, layout)
    check_cover(tensors, named, where=where)
    named.check_aliases()
    # GGUF's names for T5 are no layout of their own: what is written has transformers' names.
    origin, names_there = layout, {} if any(t5.LLAMA.match(name) for name in names) else aliases
    if orbax:
        origin = recorded.get("origin")
        origin = origin if isinstance(origin, str) and origin in family.signatures else "orbax"
        names_there = _names(recorded.get("names"))
    return Part(family, layout, origin, config, config_from, named, tensors, names_there, ignored, folder)


def _names(recorded: Any) -> dict[str, tuple[str, ...]]:
    """Key-map name -> original names, from a report (an edited or damaged one counts as none)."""
    if not isinstance(recorded, dict):
        return {}
    lists = all(isinstance(v, list) and v and all(isinstance(name, str) for name in v) for v in recorded.values())
    return {known: tuple(given) for known, given in recorded.items()} if lists else {}


def _orbax_family(names: Collection[str], where: str) -> Family:
    present = set(names)
    for family in FAMILIES:
        if family.slot in present:
            return family
    raise CheckpointError(f"{where}: Orbax arrays of an unknown model, beginning with {sorted(names)[:3]}")


def _metadata_config(source: Source, where: str) -> dict:
    try:
        config = json.loads(source.metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{where}: its metadata {CONFIG_KEY!r} is not JSON ({exc})") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: its metadata {CONFIG_KEY!r} is not a JSON object")
    return config


def _recorded(folder: Path) -> dict:
    """What an earlier conversion noted about the component, so that the way back gives the same names."""
    path = folder / REPORT_FILE
    if not path.is_file():
        path = folder.parent / REPORT_FILE
        if not path.is_file():
            return {}
    components = read_json(path).get("components")
    noted = components.get(folder.name) if isinstance(components, dict) else None
    if noted is None and isinstance(components, dict) and len(components) == 1:
        noted = next(iter(components.values()))
    return noted if isinstance(noted, dict) else {}


_COUNTS = ("num_layers", "num_single_layers", "num_hidden_layers", "layers_per_block")


def _check_counts(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """A configuration cannot ask for more blocks than there are tensors (and so for any amount of work)."""
    levels = config.get("block_out_channels", ())
    wrong = [key for key in _COUNTS if key in config and not (type(config[key]) is int and 0 <= config[key] <= tensors)]
    if not isinstance(levels, list | tuple) or len(levels) > tensors:
        wrong.append("block_out_channels")
    if wrong:
        raise CheckpointError(
            f"{where}: the configuration's {', '.join(f'{key}={config[key]!r:.60}' for key in wrong)} cannot be right "
            f"for a checkpoint of {tensors} tensors; download the configuration again"
        )


def _component_folder(folder: Path) -> tuple[str, Part]:
    if is_orbax(folder) and (weights := choose_weights([entry.name for entry in folder.iterdir()], str(folder))):
        raise CheckpointError(f"{folder}: holds Orbax arrays and {', '.join(weights.files[:3])}; keep one of the two")
    source: Source = OrbaxSource(folder) if is_orbax(folder) else dequantise(open_safetensors(folder))
    try:
        part = _part(source, str(folder), folder, _recorded(folder))
    except BaseException:
        source.close()
        raise
    return part.family.name, part


def _split_bundle(source: Source, where: str) -> dict[str, Source]:
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    prefixes: dict[str, set[str]] = {}
    unknown = []
    for name in source.keys():  # noqa: SIM118
        for prefix, component in BUNDLE_PREFIXES:
            if name.startswith(prefix):
                groups.setdefault(component, {})[name.removeprefix(prefix)] = (name,)
                prefixes.setdefault(component, set()).add(prefix)
                break
        else:
            if name not in _BUNDLE_IGNORED:
                unknown.append(name)
    for component, found in prefixes.items():
        if len(found) > 1:
            raise CoverageError(
                f"{where}: several sets of tensors for the {component} ({', '.join(sorted(found))}); which one is "
                "meant cannot be known: remove the others, or give the components as files of their own"
            )
    if unknown:
        raise CoverageError(
            f"{where}: {len(unknown)} tensors belong to no component of a FLUX.1 single file: {', '.join(unknown[:20])}"
        )
    return {component: NamedSource(source, names) for component, names in groups.items()}


def open_single(source: Source, path: Path) -> Checkpoint:
    """A checkpoint that is one set of tensors: a component, or a bundle of several under prefixes."""
    source = dequantise(source)
    try:
        names = source.keys()
        if any(name.startswith(prefix) for name in names for prefix, _ in BUNDLE_PREFIXES):
            parts = {
                component: _part(part, f"{path} ({component})", None, {})
                for component, part in _split_bundle(source, str(path)).items()
            }
            return Checkpoint(path, "comfy", parts)
        part = _part(source, str(path), None, {})
    except BaseException:
        source.close()
        raise
    return Checkpoint(path, part.layout, {part.family.name: part})


def open_checkpoint(path: str | Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Opens a pipeline, component or Orbax folder, a safetensors or a GGUF file; reads headers only.

    Args:
        path: the file or folder.
        trust_pickle: also open single ``.pt`` and ``.ckpt`` files, through torch's weights-only loader.

    Raises:
        CheckpointError: missing, damaged, of an unknown model, or not covered exactly by its key map.
    """
    path = Path(path)
    with naming(path):
        return _open_folder(path) if path.is_dir() else _open_file(path, trust_pickle)


def _open_file(path: Path, trust_pickle: bool) -> Checkpoint:
    if is_gguf(path):
        return open_single(GgufSource(path), path)
    pickled = trust_pickle and path.is_file() and path.suffix in PICKLE_SUFFIXES
    return open_single(TorchSource(path) if pickled else open_safetensors(path), path)


def _open_folder(path: Path) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        if is_orbax(path) or choose_weights([entry.name for entry in path.iterdir()], str(path)) is not None:
            name, part = _component_folder(path)
            return Checkpoint(path, part.layout, {name: part})
        singles = [path / family.single for family in FAMILIES if (path / family.single).is_file()]
        if singles:
            return _folder_of_singles(path, singles)
        folders = [path / name for name in BY_NAME if (path / name).is_dir()]
        if not folders:
            raise CheckpointError(f"{path}: no model_index.json, no weights and no component folders; not a checkpoint")
    else:
        refuse_pipeline(read_json(path / "model_index.json").get("_class_name"), str(path))
        present = read_pipeline(path)
        folders = [path / name for name in present if _has_weights(path / name)]
        if unknown := [folder.name for folder in folders if folder.name not in BY_NAME]:
            raise CheckpointError(f"{path}: components {', '.join(unknown)} are not of a FLUX.1 pipeline")
        if lacking := [name for name in present if name in BY_NAME and path / name not in folders]:
            raise CheckpointError(f"{path}: no weights in {', '.join(lacking)}; download them, or give one component")
    parts: dict[str, Part] = {}
    try:
        for folder in folders:
            name, part = _component_folder(folder)
            if name != folder.name:
                raise CheckpointError(f"{folder}: holds a {name}; expected a {folder.name}")
            parts[folder.name] = part
    except BaseException:
        for part in parts.values():
            part.source.close()
        raise
    layout = "orbax" if all(part.layout == "orbax" for part in parts.values()) else "diffusers"
    return Checkpoint(path, layout, parts, path)


def open_component(path: str | Path, name: str) -> Part:
    """One component of a checkpoint; close its source when done.

    Args:
        path: anything `open_checkpoint` takes.
        name: ``transformer``, ``vae``, ``text_encoder`` or ``text_encoder_2``.

    Raises:
        CheckpointError: as `open_checkpoint`, or there is no such component in it.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        refuse_pipeline(read_json(path / "model_index.json").get("_class_name"), str(path))
        path = path / name
    checkpoint = open_checkpoint(path)
    if name not in checkpoint.parts:
        checkpoint.close()
        raise CheckpointError(f"{path}: holds {', '.join(checkpoint.parts)}; expected a {name}")
    return checkpoint.parts[name]


def _folder_of_singles(path: Path, files: Sequence[Path]) -> Checkpoint:
    parts: dict[str, Part] = {}
    try:
        for file in files:
            opened = open_single(open_safetensors(file), file).parts
            twice = opened.keys() & parts.keys()
            parts |= opened
            if twice:
                raise CheckpointError(f"{path}: several files hold a {', '.join(sorted(twice))}; keep one of them")
    except BaseException:
        for part in parts.values():
            part.source.close()
        raise
    return Checkpoint(path, "bfl", parts)


def _has_weights(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return is_orbax(folder) or choose_weights([entry.name for entry in folder.iterdir()], str(folder)) is not None
