"""What lies at a path, by names and headers alone."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import CheckpointError
from converters.reading.formats import (
    PICKLE_REMEDY,
    PICKLE_SUFFIXES,
    SafetensorsSource,
    choose_weights,
    listing,
    parse_pipeline,
    read_json,
)


class Kind(enum.Enum):
    """How a checkpoint is laid out on disk."""

    PIPELINE = "diffusers pipeline folder"
    COMPONENT = "component folder"
    BFL_TRANSFORMER = "BFL single-file transformer"
    SAFETENSORS = "safetensors file"
    PICKLE = "pickle file"
    OTHER = "not a checkpoint"


@dataclass(frozen=True)
class Layout:
    """What `detect` found.

    Attributes:
        kind: the layout.
        path: the folder or file.
        description: one line for people.
        components: pipelines only: component name -> (library, class) as ``model_index.json`` says.
        class_name: the class a component's or pipeline's configuration names, if any.
    """

    kind: Kind
    path: Path
    description: str
    components: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    class_name: str | None = None


_CONFIGURATIONS = (  # file, key naming the class
    ("config.json", "_class_name"),
    ("config.json", "architectures"),
    ("scheduler_config.json", "_class_name"),
    ("tokenizer_config.json", "tokenizer_class"),
    ("preprocessor_config.json", "image_processor_type"),
)


def _class_of(folder: Path) -> str | None:
    """The class that a component's configuration names."""
    for file, key in _CONFIGURATIONS:
        if (folder / file).is_file():
            value = read_json(folder / file).get(key)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, str):
                return value
    return None


_SIGNATURES = (  # (all of these names are present, what it is); first match wins
    (("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"), Kind.BFL_TRANSFORMER),
    (("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",), "ComfyUI single-file FLUX checkpoint"),
    (("transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"), "transformer in diffusers' names"),
    (("decoder.up_blocks.0.resnets.0.conv1.weight",), "VAE in diffusers' names"),
    (("decoder.up.0.block.0.conv1.weight",), "VAE in BFL's names"),
    (("text_model.embeddings.token_embedding.weight",), "CLIP text encoder"),
    (("encoder.block.0.layer.0.SelfAttention.q.weight",), "T5 encoder"),
)
_LORA = re.compile(r"\.lora_(A|B|up|down)\b|^lora_unet_|\.lora_linear_layer\.")


def _count(names: Iterable[str], prefix: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(prefix)})


def recognise(names: Collection[str]) -> tuple[Kind, str]:
    """What a single file most likely holds, judged by its tensor names."""
    present = set(names)
    for needed, what in _SIGNATURES:
        if present.issuperset(needed):
            if what is not Kind.BFL_TRANSFORMER:
                return Kind.SAFETENSORS, str(what)
            double, single = _count(present, "double_blocks."), _count(present, "single_blocks.")
            guidance = "with" if "guidance_in.in_layer.weight" in present else "without"
            return what, f"BFL FLUX transformer: {double} double and {single} single blocks, {guidance} guidance input"
    if any(_LORA.search(name) for name in present):
        return Kind.SAFETENSORS, "LoRA"
    if present == {"latents"}:
        return Kind.SAFETENSORS, "latents"
    return Kind.SAFETENSORS, "tensors of an unknown model"


def detect(path: str | Path) -> Layout:
    """What lies at a path, by names and headers alone.

    A folder with ``model_index.json`` is a pipeline whatever single files lie beside it.

    Raises:
        CheckpointError: nothing is there, or a file that decides the answer is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    try:
        with SafetensorsSource([path]) as source:
            kind, what = recognise(source.keys())
    except CheckpointError as exc:
        if path.suffix in PICKLE_SUFFIXES or PICKLE_REMEDY in str(exc):
            return Layout(Kind.PICKLE, path, f"pickle. {PICKLE_REMEDY}")
        if path.suffix == ".safetensors":
            raise
        return Layout(Kind.OTHER, path, f"a {path.suffix or 'plain'} file, not a checkpoint")
    return Layout(kind, path, what)


def _detect_folder(path: Path) -> Layout:
    if (path / "model_index.json").exists():
        index = read_json(path / "model_index.json")
        components = parse_pipeline(index, str(path / "model_index.json"))
        name = index.get("_class_name")
        name = name if isinstance(name, str) else None
        return Layout(
            Kind.PIPELINE, path, f"diffusers pipeline {name or ''} with {', '.join(components)}", components, name
        )
    files = [entry.name for entry in listing(path) if not entry.is_dir()]
    name = _class_of(path)
    weights = choose_weights(files, str(path))
    if weights is not None or any(file in files for file, _ in _CONFIGURATIONS):
        holds = "no weights" if weights is None else f"{len(weights.files)} weight file(s)"
        return Layout(Kind.COMPONENT, path, f"component folder: {name or 'unnamed class'}, {holds}", class_name=name)
    singles = [file for file in files if file.endswith(".safetensors")]
    if singles:
        return Layout(Kind.OTHER, path, f"a folder of single files; give one of them: {', '.join(singles)}")
    return Layout(Kind.OTHER, path, "a folder without model_index.json, config.json or safetensors weights")
