"""T5 v1.1's encoder as transformers saves it (``T5EncoderModel``), and the encoder side of a whole T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.keymap import Row

_ATTENTION = "encoder.block.{i}.layer.0."
_FEED_FORWARD = "encoder.block.{i}.layer.1."
_BLOCK = "blocks[{i}]."


def _linear(source: str, target: str, outputs: str, inputs: str) -> Row:
    return Row(f"{source}.weight", f"{_BLOCK}{target}.kernel", (outputs, inputs), ("transpose",), repeat="layers")


def _norm(source: str, target: str) -> Row:
    return Row(f"{source}layer_norm.weight", f"{_BLOCK}{target}.scale", ("width",), repeat="layers")


ROWS: tuple[Row, ...] = (
    Row("shared.weight", "tokens.table", ("vocab", "width")),
    Row(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative.table",
        ("buckets", "heads"),
    ),
    _norm(_ATTENTION, "norm_attention"),
    _linear(_ATTENTION + "SelfAttention.q", "query", "heads*head", "width"),
    _linear(_ATTENTION + "SelfAttention.k", "key", "heads*head", "width"),
    _linear(_ATTENTION + "SelfAttention.v", "value", "heads*head", "width"),
    _linear(_ATTENTION + "SelfAttention.o", "out", "width", "heads*head"),
    _norm(_FEED_FORWARD, "norm_mlp"),
    _linear(_FEED_FORWARD + "DenseReluDense.wi_0", "gate", "inner", "width"),
    _linear(_FEED_FORWARD + "DenseReluDense.wi_1", "up", "inner", "width"),
    _linear(_FEED_FORWARD + "DenseReluDense.wo", "down", "width", "inner"),
    Row("encoder.final_layer_norm.weight", "norm.scale", ("width",)),
)


def rename(name: str) -> str | None:
    """The key map's name of a source tensor; None to ignore it.

    The token table is saved as ``shared``, as ``encoder.embed_tokens`` or as both; the decoder and the output
    projection of a whole T5 are not used.
    """
    if name == "encoder.embed_tokens.weight":
        return "shared.weight"
    return None if name.startswith("decoder.") or name == "lm_head.weight" else name


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of `ROWS` from a ``T5Config``."""
    return {
        "vocab": config["vocab_size"],
        "width": config["d_model"],
        "heads": config["num_heads"],
        "head": config["d_kv"],
        "inner": config["d_ff"],
        "buckets": config.get("relative_attention_num_buckets", 32),
        "layers": config["num_layers"],
    }
