"""CLIP's text encoder as transformers saves it (``CLIPTextModel``), and the text side of a whole CLIP model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.keymap import Row

_LAYER = "encoder.layers.{i}."
_BLOCK = "blocks[{i}]."


def _norm(source: str, target: str, repeat: str | None = None) -> list[Row]:
    return [
        Row(f"{source}.weight", f"{target}.scale", ("hidden",), repeat=repeat),
        Row(f"{source}.bias", f"{target}.bias", ("hidden",), repeat=repeat),
    ]


def _linear(source: str, target: str, outputs: str, inputs: str) -> list[Row]:
    source, target = _LAYER + source, _BLOCK + target
    return [
        Row(f"{source}.weight", f"{target}.kernel", (outputs, inputs), ("transpose",), repeat="layers"),
        Row(f"{source}.bias", f"{target}.bias", (outputs,), repeat="layers"),
    ]


ROWS: tuple[Row, ...] = (
    Row("embeddings.token_embedding.weight", "tokens.table", ("vocab", "hidden")),
    Row("embeddings.position_embedding.weight", "positions.table", ("positions", "hidden")),
    *_norm(_LAYER + "layer_norm1", _BLOCK + "norm_attention", "layers"),
    *_linear("self_attn.q_proj", "query", "hidden", "hidden"),
    *_linear("self_attn.k_proj", "key", "hidden", "hidden"),
    *_linear("self_attn.v_proj", "value", "hidden", "hidden"),
    *_linear("self_attn.out_proj", "out", "hidden", "hidden"),
    *_norm(_LAYER + "layer_norm2", _BLOCK + "norm_mlp", "layers"),
    *_linear("mlp.fc1", "up", "inner", "hidden"),
    *_linear("mlp.fc2", "down", "hidden", "inner"),
    *_norm("final_layer_norm", "norm"),
)

# A buffer 0..76 that old versions saved, and what a whole CLIP model has besides its text encoder.
_IGNORED = ("embeddings.position_ids", "logit_scale", "text_projection.weight", "visual_projection.weight")


def rename(name: str) -> str | None:
    """The key map's name of a source tensor (without the ``text_model.`` of older files); None to ignore it."""
    name = name.removeprefix("text_model.")
    return None if name in _IGNORED or name.startswith("vision_model.") else name


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of `ROWS` from a ``CLIPTextConfig``, or from the ``text_config`` inside a ``CLIPConfig``."""
    config = config.get("text_config", config)
    return {
        "vocab": config["vocab_size"],
        "positions": config.get("max_position_embeddings", 77),
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "layers": config["num_hidden_layers"],
    }
