"""Key map of the convolutional autoencoder (``AutoencoderKL``) in the layouts it is published in.

Which residual blocks change width, and whether there is attention at all, depends on the configuration, so the
table is made by `rows`.  Layouts:

* ``diffusers``: the ``vae/`` folder of a diffusers pipeline; attention weights are matrices.
* ``diffusers-conv``: the same names with attention weights kept as 1x1 convolutions.
* ``diffusers-old``: names of before diffusers 0.15 (``query``, ``proj_attn``).
* ``bfl``: Black Forest Labs' single file (``ae.safetensors``), the naming of latent diffusion; decoder levels
  are numbered fine to coarse, attention weights are 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converters.errors import CheckpointError
from converters.keymap import Row, Size

_DIFFUSERS = {
    "down": "encoder.down_blocks.{i}.resnets.{j}",
    "downsample": "encoder.down_blocks.{i}.downsamplers.0.conv",
    "up": "decoder.up_blocks.{i}.resnets.{j}",
    "upsample": "decoder.up_blocks.{i}.upsamplers.0.conv",
    "middle": "{half}.mid_block",
    "before": "resnets.0",
    "after": "resnets.1",
    "attention": "attentions.0",
    "norm_out": "conv_norm_out",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
_DIFFUSERS_OLD = _DIFFUSERS | {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}
_BFL = {
    "down": "encoder.down.{i}.block.{j}",
    "downsample": "encoder.down.{i}.downsample.conv",
    "up": "decoder.up.{mirrored}.block.{j}",
    "upsample": "decoder.up.{mirrored}.upsample.conv",
    "middle": "{half}.mid",
    "before": "block_1",
    "after": "block_2",
    "attention": "attn_1",
    "norm_out": "norm_out",
    "shortcut": "nin_shortcut",
    "norm": "norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
}
# name: (source names, attention weights are 1x1 convolutions)
LAYOUTS: dict[str, tuple[Mapping[str, str], bool]] = {
    "diffusers": (_DIFFUSERS, False),
    "diffusers-conv": (_DIFFUSERS, True),
    "diffusers-old": (_DIFFUSERS_OLD, False),
    "bfl": (_BFL, True),
}
_KEYS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)


def _check(config: Mapping[str, Any]) -> None:
    if missing := [key for key in _KEYS if key not in config]:
        raise ValueError(
            f"VAE key map: the configuration lacks {missing}; pass a complete one, such as "
            "dataclasses.asdict(VaeConfig.from_dict(config))"
        )


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Symbolic sizes of `rows`: ``image``, ``picture`` (channels in and out), ``latent``, ``width_<level>``.

    Args:
        config: a complete ``AutoencoderKL`` configuration (the fields of `sega_jax.models.vae.VaeConfig`).

    Raises:
        ValueError: if the configuration lacks a key.
    """
    _check(config)
    widths = {f"width_{level}": width for level, width in enumerate(config["block_out_channels"])}
    sizes = ("in_channels", "out_channels", "latent_channels")
    return dict(zip(("image", "picture", "latent"), (config[key] for key in sizes), strict=True)) | widths


def rows(config: Mapping[str, Any], layout: str = "diffusers") -> list[Row]:
    """The key map of one configuration in one of `LAYOUTS`.

    Args:
        config: a complete ``AutoencoderKL`` configuration (the fields of `sega_jax.models.vae.VaeConfig`).
        layout: name in `LAYOUTS`; `detect` finds it from a checkpoint.

    Raises:
        ValueError: if the layout is unknown or the configuration lacks a key.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"VAE key map: unknown layout {layout!r}; known are {sorted(LAYOUTS)}")
    _check(config)
    return list(_rows(config, *LAYOUTS[layout]))


def detect(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The layout of a checkpoint, given the shapes of its tensors by name.

    Raises:
        CheckpointError: if the names are of none of `LAYOUTS`.
    """
    if "decoder.up.0.block.0.conv1.weight" in shapes:
        return "bfl"
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in shapes:
        middle = "decoder.mid_block.attentions.0"
        if f"{middle}.query.weight" in shapes:
            return "diffusers-old"
        return "diffusers-conv" if len(shapes.get(f"{middle}.to_q.weight", ())) == 4 else "diffusers"
    raise CheckpointError(
        f"not an autoencoder in a known layout ({', '.join(LAYOUTS)}): expected names such as "
        f"'decoder.up_blocks.0.resnets.0.conv1.weight', got {sorted(shapes)[:3]}"
    )


def _conv(source: str, target: str, inputs: Size, outputs: Size, kernel: int = 3) -> Iterator[Row]:
    yield Row(f"{source}.weight", f"{target}.kernel", (outputs, inputs, kernel, kernel), ("conv",))
    yield Row(f"{source}.bias", f"{target}.bias", (outputs,))


def _norm(source: str, target: str, width: Size) -> Iterator[Row]:
    yield Row(f"{source}.weight", f"{target}.scale", (width,))
    yield Row(f"{source}.bias", f"{target}.bias", (width,))


def _resnet(source: str, target: str, inputs: Size, outputs: Size, *, shortcut: str | None = None) -> Iterator[Row]:
    yield from _norm(f"{source}.norm1", f"{target}.norm1", inputs)
    yield from _conv(f"{source}.conv1", f"{target}.conv1", inputs, outputs)
    yield from _norm(f"{source}.norm2", f"{target}.norm2", outputs)
    yield from _conv(f"{source}.conv2", f"{target}.conv2", outputs, outputs)
    if shortcut:
        yield from _conv(f"{source}.{shortcut}", f"{target}.shortcut", inputs, outputs, kernel=1)


def _attention(source: str, target: str, width: Size, names: Mapping[str, str], convolutions: bool) -> Iterator[Row]:
    yield from _norm(f"{source}.{names['norm']}", f"{target}.norm", width)
    shape, op = ((width, width, 1, 1), "squeeze_conv") if convolutions else ((width, width), "transpose")
    for part in ("query", "key", "value", "out"):
        yield Row(f"{source}.{names[part]}.weight", f"{target}.{part}.kernel", shape, (op,))
        yield Row(f"{source}.{names[part]}.bias", f"{target}.{part}.bias", (width,))


def _rows(config: Mapping[str, Any], names: Mapping[str, str], convolutions: bool) -> Iterator[Row]:
    sizes = list(config["block_out_channels"])
    layers, last = config["layers_per_block"], len(sizes) - 1
    widths = [f"width_{level}" for level in range(len(sizes))]

    def level(name: str, i: int, j: int, levels: list[int]) -> Iterator[Row]:
        """Residual block ``j`` of level ``i``; ``levels`` are the width indices in the order of the half."""
        entering = levels[max(i - 1, 0)] if j == 0 else levels[i]
        half = {"down": "encoder", "up": "decoder"}[name]
        yield from _resnet(
            names[name].format(i=i, j=j, mirrored=last - i),
            f"{half}.{name}.{i}.resnets.{j}",
            widths[entering],
            widths[levels[i]],
            shortcut=names["shortcut"] if sizes[entering] != sizes[levels[i]] else None,
        )

    for half in ("encoder", "decoder"):
        source = names["middle"].format(half=half)
        for part in ("before", "after"):
            yield from _resnet(f"{source}.{names[part]}", f"{half}.middle.{part}", widths[-1], widths[-1])
        if config["mid_block_add_attention"]:
            target = f"{half}.middle.attention"
            yield from _attention(f"{source}.{names['attention']}", target, widths[-1], names, convolutions)

    fine_to_coarse = list(range(last + 1))
    yield from _conv("encoder.conv_in", "encoder.conv_in", "image", widths[0])
    for i in fine_to_coarse:
        for j in range(layers):
            yield from level("down", i, j, fine_to_coarse)
        if i < last:
            yield from _conv(names["downsample"].format(i=i), f"encoder.down.{i}.downsample", widths[i], widths[i])
    yield from _norm(f"encoder.{names['norm_out']}", "encoder.norm_out", widths[-1])
    yield from _conv("encoder.conv_out", "encoder.conv_out", widths[-1], "2*latent")

    coarse_to_fine = fine_to_coarse[::-1]
    yield from _conv("decoder.conv_in", "decoder.conv_in", "latent", widths[-1])
    for i, width in enumerate(coarse_to_fine):
        for j in range(layers + 1):
            yield from level("up", i, j, coarse_to_fine)
        if i < last:
            source = names["upsample"].format(i=i, mirrored=width)
            yield from _conv(source, f"decoder.up.{i}.upsample", widths[width], widths[width])
    yield from _norm(f"decoder.{names['norm_out']}", "decoder.norm_out", widths[0])
    yield from _conv("decoder.conv_out", "decoder.conv_out", widths[0], "picture")

    if config["use_quant_conv"]:
        yield from _conv("quant_conv", "quant_conv", "2*latent", "2*latent", kernel=1)
    if config["use_post_quant_conv"]:
        yield from _conv("post_quant_conv", "post_quant_conv", "latent", "latent", kernel=1)
