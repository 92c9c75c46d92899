"""T5 v1.1's encoder as transformers saves it (``T5EncoderModel``), and the encoder side of a whole T5."""

from __future__ import annotations

import re
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


# llama.cpp's names, in which T5 goes by GGUF files (its gguf-py/gguf/tensor_mapping.py)
_LLAMA = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_LLAMA_ENDS = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
LLAMA = re.compile(r"enc\.|token_embd\.")  # how its names begin
_LLAMA_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")


def rename(name: str) -> str | None:
    """The key map's name of a source tensor; None to ignore it.

    The token table is saved as ``shared``, as ``encoder.embed_tokens`` or as both; the decoder and the output
    projection of a whole T5 are not used.  GGUF files have llama.cpp's names.
    """
    if name == "encoder.embed_tokens.weight":
        return "shared.weight"
    if (match := _LLAMA_BLOCK.fullmatch(name)) and match[2] in _LLAMA:
        return f"encoder.block.{match[1]}.{_LLAMA[match[2]]}.weight"
    unused = name.startswith(("decoder.", "dec.")) or name in ("lm_head.weight", "output.weight")
    return None if unused else _LLAMA_ENDS.get(name, name)


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
