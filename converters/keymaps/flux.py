"""FLUX.1 transformer: diffusers and Black Forest Labs names of every tensor.

Symbols: ``width`` model width, ``mlp`` MLP width, ``double`` and ``single`` block counts, ``guidance`` 0 or 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from converters.errors import CheckpointError
from converters.keymap import Row


def dims(config: Mapping) -> dict[str, int]:
    """Sizes and counts from a diffusers ``transformer/config.json``."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        "width": width,
        "mlp": 4 * width,
        "head": config["attention_head_dim"],
        "tokens": config["in_channels"],
        "text": config["joint_attention_dim"],
        "pooled": config["pooled_projection_dim"],
        "double": config["num_layers"],
        "single": config["num_single_layers"],
        "guidance": int(config["guidance_embeds"]),
        "features": 256,
    }


_NORM = re.compile(r"((double|single)_blocks\.\d+\.(\w+\.)?norm\.(query|key)_norm)\.weight")


def rename(name: str) -> str:
    """The key map's name of a source tensor: BFL's norms are ``scale``, in newer files and many GGUF ``weight``."""
    match = _NORM.fullmatch(name)
    return f"{match[1]}.scale" if match else name


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The diffusers configuration of a BFL single file, read off its tensor shapes.

    Raises:
        CheckpointError: if the tensors that fix the sizes are missing.
    """
    try:
        width, tokens = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        text, pooled = shapes["txt_in.weight"][1], shapes["vector_in.in_layer.weight"][1]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"not a Black Forest Labs FLUX.1 transformer: no usable tensor {error}") from error

    def count(prefix: str) -> int:
        indices = {name.split(".")[1] for name in shapes if name.startswith(f"{prefix}.")}
        return len(indices)

    frame = head // 8  # (16, 56, 56) of 128 in every FLUX.1 checkpoint
    return {
        "in_channels": tokens,
        "num_layers": count("double_blocks"),
        "num_single_layers": count("single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [frame, (head - frame) // 2, (head - frame) // 2],
    }


def _linear(source: str, target: str, outputs, inputs, **options) -> tuple[Row, Row]:
    return (
        Row(f"{source}.weight", f"{target}.kernel", (outputs, inputs), ("transpose",), **options),
        Row(f"{source}.bias", f"{target}.bias", (outputs,), **options),
    )


def _embedder(first: str, second: str, target: str, inputs, **options) -> tuple[Row, ...]:
    return (
        *_linear(first, f"{target}.into", "width", inputs, **options),
        *_linear(second, f"{target}.out", "width", "width", **options),
    )


def _diffusers_double() -> tuple[Row, ...]:
    block = {"repeat": "double"}
    rows: list[Row] = []
    halves = (
        ("image", "norm1", "attn.to_{}", "attn.norm_{}", "attn.to_out.0", "ff"),
        ("text", "norm1_context", "attn.add_{}_proj", "attn.norm_added_{}", "attn.to_add_out", "ff_context"),
    )
    for half, modulation, projection, norm, out, mlp in halves:
        source, target = "transformer_blocks.{i}.", f"double[{{i}}].{half}."
        rows += _linear(f"{source}{modulation}.linear", f"{target}modulation", "6*width", "width", **block)
        for name in ("query", "key", "value"):
            rows += _linear(source + projection.format(name[0]), f"{target}attention.{name}", "width", "width", **block)
        for name in ("query", "key"):
            scale = f"{source}{norm.format(name[0])}.weight"
            rows.append(Row(scale, f"{target}attention.{name}_norm.scale", ("head",), **block))
        rows += _linear(source + out, f"{target}attention_out", "width", "width", **block)
        rows += _linear(f"{source}{mlp}.net.0.proj", f"{target}mlp_in", "mlp", "width", **block)
        rows += _linear(f"{source}{mlp}.net.2", f"{target}mlp_out", "width", "mlp", **block)
    return tuple(rows)


def _diffusers_single() -> tuple[Row, ...]:
    block, source, target = {"repeat": "single"}, "single_transformer_blocks.{i}.", "single[{i}]."
    rows = [*_linear(f"{source}norm.linear", f"{target}modulation", "3*width", "width", **block)]
    for name in ("query", "key", "value"):
        rows += _linear(f"{source}attn.to_{name[0]}", f"{target}attention.{name}", "width", "width", **block)
    for name in ("query", "key"):
        norm = f"{source}attn.norm_{name[0]}.weight"
        rows.append(Row(norm, f"{target}attention.{name}_norm.scale", ("head",), **block))
    rows += _linear(f"{source}proj_mlp", f"{target}mlp_in", "mlp", "width", **block)
    rows += _linear(f"{source}proj_out", f"{target}out", "width", "width + mlp", **block)
    return tuple(rows)


DIFFUSERS: tuple[Row, ...] = (
    *_linear("x_embedder", "image_embed", "width", "tokens"),
    *_linear("context_embedder", "text_embed", "width", "text"),
    *_embedder(
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2", "time", "features"
    ),
    *_embedder(
        "time_text_embed.guidance_embedder.linear_1",
        "time_text_embed.guidance_embedder.linear_2",
        "guidance",
        "features",
        optional="guidance",
    ),
    *_embedder("time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2", "pooled", "pooled"),
    *_diffusers_double(),
    *_diffusers_single(),
    # diffusers stores (scale, shift) here and (shift, scale) everywhere else
    Row("norm_out.linear.weight", "out_modulation.kernel", ("2*width", "width"), ("swap_halves", "transpose")),
    Row("norm_out.linear.bias", "out_modulation.bias", ("2*width",), ("swap_halves",)),
    *_linear("proj_out", "out", "tokens", "width"),
)


def _fused(source: str, target: str, extra: tuple[str, ...] = (), **options) -> tuple[Row, Row]:
    """BFL's fused query, key, value (and, in single blocks, MLP) projection."""
    names = tuple(f"{target}attention.{name}" for name in ("query", "key", "value")) + extra
    sizes = ("width",) * 3 + ("mlp",) * len(extra)
    total = "3*width" + " + mlp" * len(extra)
    return (
        Row(
            f"{source}.weight", tuple(f"{n}.kernel" for n in names), (total, "width"), ("transpose",), sizes=sizes,
            **options,
        ),
        Row(f"{source}.bias", tuple(f"{n}.bias" for n in names), (total,), sizes=sizes, **options),
    )  # fmt: skip


def _bfl_double() -> tuple[Row, ...]:
    block = {"repeat": "double"}
    rows: list[Row] = []
    for half, prefix in (("image", "img"), ("text", "txt")):
        source, target = f"double_blocks.{{i}}.{prefix}_", f"double[{{i}}].{half}."
        rows += _linear(f"{source}mod.lin", f"{target}modulation", "6*width", "width", **block)
        rows += _fused(f"{source}attn.qkv", target, **block)
        for name in ("query", "key"):
            norm = f"{source}attn.norm.{name}_norm.scale"
            rows.append(Row(norm, f"{target}attention.{name}_norm.scale", ("head",), **block))
        rows += _linear(f"{source}attn.proj", f"{target}attention_out", "width", "width", **block)
        rows += _linear(f"{source}mlp.0", f"{target}mlp_in", "mlp", "width", **block)
        rows += _linear(f"{source}mlp.2", f"{target}mlp_out", "width", "mlp", **block)
    return tuple(rows)


def _bfl_single() -> tuple[Row, ...]:
    block, source, target = {"repeat": "single"}, "single_blocks.{i}.", "single[{i}]."
    rows = [*_linear(f"{source}modulation.lin", f"{target}modulation", "3*width", "width", **block)]
    rows += _fused(f"{source}linear1", target, (f"{target}mlp_in",), **block)
    for name in ("query", "key"):
        rows.append(Row(f"{source}norm.{name}_norm.scale", f"{target}attention.{name}_norm.scale", ("head",), **block))
    rows += _linear(f"{source}linear2", f"{target}out", "width", "width + mlp", **block)
    return tuple(rows)


BFL: tuple[Row, ...] = (
    *_linear("img_in", "image_embed", "width", "tokens"),
    *_linear("txt_in", "text_embed", "width", "text"),
    *_embedder("time_in.in_layer", "time_in.out_layer", "time", "features"),
    *_embedder("guidance_in.in_layer", "guidance_in.out_layer", "guidance", "features", optional="guidance"),
    *_embedder("vector_in.in_layer", "vector_in.out_layer", "pooled", "pooled"),
    *_bfl_double(),
    *_bfl_single(),
    *_linear("final_layer.adaLN_modulation.1", "out_modulation", "2*width", "width"),
    *_linear("final_layer.linear", "out", "tokens", "width"),
)
