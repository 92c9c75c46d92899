"""What the layers of each layout compute, written down independently of the key maps (in torch, float32).

`converters.verify.forward` runs these where a checkpoint is in a layout that diffusers and transformers have no module
for: Black Forest Labs' names and the parameter paths of Orbax.  Sources: the published FLUX.1 code and model cards
for BFL's order of fused parts; DiT (arXiv 2212.09748) for adaLN; T5 v1.1 (arXiv 1910.10683); CLIP (arXiv
2103.00020); latent diffusion (arXiv 2112.10752) for the autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Layer = Callable[[Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """``x @ weight.T + bias`` with the weight as torch stores it, ``[out, in]``."""
    return lambda x: F.linear(x, weight, bias)


def _slot(weights: Weights, name: str) -> Layer:
    return linear(weights[f"{name}.kernel"].T, weights.get(f"{name}.bias"))


def _published(weights: Weights, name: str) -> Layer:
    return linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _rms(x: Tensor, scale: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale


def _plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring channels of ``[B, N, heads, D]`` by angles whose cosines are ``[N, D]``, each twice."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos[None, :, None] + turned * sin[None, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# -- FLUX.1 --------------------------------------------------------------------------------------------------------


def _half(weights: Weights, layout: str, name: str) -> dict:
    """The layers of one half of a double block, or of a single block: query, key, value, out and the rest."""
    if layout == "orbax":
        norms = {part: weights[f"{name}attention.{part}_norm.scale"] for part in ("query", "key")}
        layers = {part: _slot(weights, f"{name}attention.{part}") for part in ("query", "key", "value")}
        layers |= {"modulation": _slot(weights, f"{name}modulation"), "mlp_in": _slot(weights, f"{name}mlp_in")}
        if f"{name}out.kernel" in weights:
            return layers | _norms(norms) | {"out": _slot(weights, f"{name}out")}
        out = {"attention_out": _slot(weights, f"{name}attention_out"), "mlp_out": _slot(weights, f"{name}mlp_out")}
        return layers | _norms(norms) | out
    if name == "single":
        fused, bias = weights["linear1.weight"], weights["linear1.bias"]
        norms = {part: weights[f"norm.{part}_norm.scale"] for part in ("query", "key")}
        rest = {"modulation": _published(weights, "modulation.lin"), "out": _published(weights, "linear2")}
    else:
        fused, bias = weights[f"{name}_attn.qkv.weight"], weights[f"{name}_attn.qkv.bias"]
        norms = {part: weights[f"{name}_attn.norm.{part}_norm.scale"] for part in ("query", "key")}
        rest = {
            "modulation": _published(weights, f"{name}_mod.lin"),
            "attention_out": _published(weights, f"{name}_attn.proj"),
            "mlp_in": _published(weights, f"{name}_mlp.0"),
            "mlp_out": _published(weights, f"{name}_mlp.2"),
        }
    width = fused.shape[1]
    parts = {part: linear(fused[i * width : (i + 1) * width], bias[i * width : (i + 1) * width])
             for i, part in enumerate(("query", "key", "value"))}  # fmt: skip
    if name == "single":
        parts["mlp_in"] = linear(fused[3 * width :], bias[3 * width :])
    return parts | _norms(norms) | rest


def _norms(scales: Mapping[str, Tensor]) -> dict[str, Layer]:
    return {f"{part}_norm": (lambda x, s=scale: _rms(x, s)) for part, scale in scales.items()}


def _project(half: dict, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (half[part](x).unflatten(-1, (heads, -1)) for part in ("query", "key", "value"))
    return half["query_norm"](q), half["key_norm"](k), v


def double_block(
    weights: Weights, layout: str, image: Tensor, text: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """A double-stream block over text, then image: returns (text, image)."""
    names = {"orbax": ("text.", "image."), "bfl": ("txt", "img")}[layout]
    halves = [_half(weights, layout, name) for name in names]
    streams = [text, image]
    modulations = [half["modulation"](F.silu(condition))[:, None].chunk(6, -1) for half in halves]
    projected = [
        _project(half, _plain_norm(x) * (1 + m[1]) + m[0], heads)
        for half, x, m in zip(halves, streams, modulations, strict=True)
    ]
    q, k, v = (torch.cat([p[i] for p in projected], 1) for i in range(3))
    attended = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v).split([text.shape[1], image.shape[1]], 1)
    done = []
    for half, x, m, y in zip(halves, streams, modulations, attended, strict=True):
        x = x + m[2] * half["attention_out"](y)
        hidden = F.gelu(half["mlp_in"](_plain_norm(x) * (1 + m[4]) + m[3]), approximate="tanh")
        done.append(x + m[5] * half["mlp_out"](hidden))
    return done[0], done[1]


def single_block(
    weights: Weights, layout: str, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """A single-stream block over all tokens."""
    half = _half(weights, layout, "" if layout == "orbax" else "single")
    shift, scale, gate = half["modulation"](F.silu(condition))[:, None].chunk(3, -1)
    y = _plain_norm(x) * (1 + scale) + shift
    q, k, v = _project(half, y, heads)
    attended = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    hidden = F.gelu(half["mlp_in"](y), approximate="tanh")
    return x + gate * half["out"](torch.cat([attended, hidden], -1))


def flux_ends(weights: Weights, layout: str, tokens: Tensor, text: Tensor, pooled: Tensor, features: Mapping) -> list:
    """Everything outside the blocks: [the image after embedding, final layer; the embedded text]."""
    if layout == "orbax":
        names = ["image_embed", "text_embed", "out_modulation", "out"]
        image, context, modulation, out = (_slot(weights, name) for name in names)
        pairs = {name: [_slot(weights, f"{name}.{end}") for end in ("into", "out")] for name in (*features, "pooled")}
    else:
        names = ["img_in", "txt_in", "final_layer.adaLN_modulation.1", "final_layer.linear"]
        image, context, modulation, out = (_published(weights, name) for name in names)
        stems = {"time": "time_in", "guidance": "guidance_in", "pooled": "vector_in"}
        pairs = {
            name: [_published(weights, f"{stems[name]}.{end}_layer") for end in ("in", "out")]
            for name in (*features, "pooled")
        }
    condition = sum(second(F.silu(first(x))) for (first, second), x in (
        (pairs[name], {**features, "pooled": pooled}[name]) for name in pairs
    ))  # fmt: skip
    shift, scale = modulation(F.silu(condition))[:, None].chunk(2, -1)
    return [out(_plain_norm(image(tokens)) * (1 + scale) + shift), context(text)]


# -- text encoders -------------------------------------------------------------------------------------------------


def clip_layer(weights: Weights, ids: Tensor, heads: int, activation: str, epsilon: float) -> Tensor:
    """Embedding, one causal block and the final norm, from parameter paths."""

    def norm(name: str) -> Layer:
        scale, bias = weights[f"{name}.scale"], weights[f"{name}.bias"]
        return lambda x: F.layer_norm(x, x.shape[-1:], scale, bias, epsilon)

    x = weights["tokens.table"][ids] + weights["positions.table"][: ids.shape[1]]
    y = norm("blocks.norm_attention")(x)
    q, k, v = (_slot(weights, f"blocks.{part}")(y).unflatten(-1, (heads, -1)) for part in ("query", "key", "value"))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + _slot(weights, "blocks.out")(attended)
    y = _slot(weights, "blocks.up")(norm("blocks.norm_mlp")(x))
    y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else F.gelu(y)
    return norm("norm")(x + _slot(weights, "blocks.down")(y))


def t5_layer(weights: Weights, x: Tensor, heads: int, epsilon: float) -> Tensor:
    """One block and the final norm, from parameter paths; at most as many tokens as there are exact distances."""
    table = weights["relative.table"]
    position = torch.arange(x.shape[1])
    distance = position[None, :] - position[:, None]  # key minus query
    bucket = distance.abs() + (distance > 0) * (table.shape[0] // 2)
    y = _rms(x, weights["blocks.norm_attention.scale"], epsilon)
    q, k, v = (_slot(weights, f"blocks.{part}")(y).unflatten(-1, (heads, -1)) for part in ("query", "key", "value"))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) + table[bucket].permute(2, 0, 1)[None]
    x = x + _slot(weights, "blocks.out")(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))
    y = _rms(x, weights["blocks.norm_mlp.scale"], epsilon)
    hidden = F.gelu(_slot(weights, "blocks.gate")(y), approximate="tanh") * _slot(weights, "blocks.up")(y)
    return _rms(x + _slot(weights, "blocks.down")(hidden), weights["norm.scale"], epsilon)


# -- autoencoder ---------------------------------------------------------------------------------------------------


class Autoencoder:
    """Encoder and decoder halves from BFL's names or from parameter paths."""

    def __init__(self, weights: Weights, layout: str, config: Mapping):
        self.weights, self.orbax = weights, layout == "orbax"
        self.levels, self.layers = len(config["block_out_channels"]), config["layers_per_block"]
        self.groups = config["norm_num_groups"]

    def _conv(self, name: str, x: Tensor, **options) -> Tensor:
        if self.orbax:
            kernel = self.weights[f"{name}.kernel"]
            kernel = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T[:, :, None, None]
        else:
            kernel = self.weights[f"{name}.weight"]
        return F.conv2d(x, kernel, self.weights[f"{name}.bias"], **options)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = self.weights[f"{name}.scale" if self.orbax else f"{name}.weight"]
        return F.group_norm(x, self.groups, scale, self.weights[f"{name}.bias"], 1e-6)

    def _resnet(self, name: str, x: Tensor) -> Tensor:
        y = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)), padding=1)
        y = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", y)), padding=1)
        shortcut = f"{name}.{'shortcut' if self.orbax else 'nin_shortcut'}"
        return y + (self._conv(shortcut, x) if f"{shortcut}.bias" in self.weights else x)

    def _middle(self, half: str, x: Tensor) -> Tensor:
        name = f"{half}.{'middle' if self.orbax else 'mid'}"
        before, attention, after = ("before", "attention", "after") if self.orbax else ("block_1", "attn_1", "block_2")
        query, key, value, out = ("query", "key", "value", "out") if self.orbax else ("q", "k", "v", "proj_out")
        x = self._resnet(f"{name}.{before}", x)
        if f"{name}.{attention}.norm.bias" in self.weights:
            y = self._norm(f"{name}.{attention}.norm", x)
            q, k, v = (
                self._conv(f"{name}.{attention}.{part}", y).flatten(2).transpose(1, 2) for part in (query, key, value)
            )
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            x = x + self._conv(f"{name}.{attention}.{out}", y.transpose(1, 2).reshape(x.shape))
        return self._resnet(f"{name}.{after}", x)

    def encode(self, image: Tensor) -> Tensor:
        """Moments of the latent."""
        x = self._conv("encoder.conv_in", image, padding=1)
        for i in range(self.levels):
            for j in range(self.layers):
                x = self._resnet(f"encoder.down.{i}.{'resnets' if self.orbax else 'block'}.{j}", x)
            if i < self.levels - 1:
                name = f"encoder.down.{i}.{'downsample' if self.orbax else 'downsample.conv'}"
                x = self._conv(name, F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self._middle("encoder", x)
        x = self._conv("encoder.conv_out", F.silu(self._norm("encoder.norm_out", x)), padding=1)
        return self._conv("quant_conv", x) if "quant_conv.bias" in self.weights else x

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a latent."""
        x = self._conv("post_quant_conv", latent) if "post_quant_conv.bias" in self.weights else latent
        x = self._middle("decoder", self._conv("decoder.conv_in", x, padding=1))
        for i in range(self.levels):
            level = i if self.orbax else self.levels - 1 - i  # BFL numbers levels from fine to coarse
            for j in range(self.layers + 1):
                x = self._resnet(f"decoder.up.{level}.{'resnets' if self.orbax else 'block'}.{j}", x)
            if i < self.levels - 1:
                name = f"decoder.up.{level}.{'upsample' if self.orbax else 'upsample.conv'}"
                x = self._conv(name, F.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)
        return self._conv("decoder.conv_out", F.silu(self._norm("decoder.norm_out", x)), padding=1)
