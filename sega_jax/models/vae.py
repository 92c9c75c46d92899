"""The convolutional autoencoder of FLUX.1 and its relatives: images to latents with 1/8 the side and back.

Architecture: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752), appendix E; residual blocks of group norm, SiLU and 3x3 convolutions, one attention block at the
lowest resolution.
Module and configuration names follow the diffusers ``AutoencoderKL`` layout closely enough that
`converters/keymaps/vae.py` is a plain table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sega_jax.attention import attention
from sega_jax.models.layers import Conv, GroupNorm, Linear

# Keys of an AutoencoderKL config.json that change nothing in the computation.
_BOOKKEEPING = frozenset(
    {"_class_name", "_diffusers_version", "_name_or_path", "sample_size", "force_upcast", "torch_dtype"}
)
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of an autoencoder; field names are those of a diffusers ``AutoencoderKL`` config.json.

    Attributes:
        in_channels, out_channels: channels of the image going in and coming out.
        latent_channels: channels of the latent.
        block_out_channels: width at each resolution, finest first; the side shrinks by 2 between them.
        layers_per_block: residual blocks per resolution in the encoder (the decoder has one more).
        norm_num_groups: groups of every group norm.
        scaling_factor, shift_factor: the transformer's latent is ``(z - shift_factor) * scaling_factor``.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions after the encoder and before the decoder.
        mid_block_add_attention: attention between the two residual blocks of the lowest resolution.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if not self.block_out_channels:
            raise ValueError("VaeConfig: block_out_channels is empty; give one width per resolution")
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"VaeConfig: {name} must be at least 1, got {getattr(self, name)}")
        if uneven := [width for width in self.block_out_channels if width < 1 or width % self.norm_num_groups]:
            raise ValueError(
                f"VaeConfig: widths {uneven} of block_out_channels do not divide into "
                f"norm_num_groups={self.norm_num_groups} groups"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def widest(self) -> int:
        """Channels of the largest activations: full resolution arrives with the width of the one below."""
        return self.block_out_channels[min(1, len(self.block_out_channels) - 1)]

    @property
    def narrowest_width(self) -> int:
        """Channels at the resolution of the latents."""
        return self.block_out_channels[-1]

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Raw latents as the transformer sees them: ``(z - shift) * scale``, same shape and dtype."""
        return (latents - self.shift_factor) * self.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """Inverse of `normalize`: ``z / scale + shift``, same shape and dtype."""
        return latents / self.scaling_factor + self.shift_factor

    @classmethod
    def flux(cls) -> VaeConfig:
        """The autoencoder of FLUX.1 (dev and schnell)."""
        return cls()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VaeConfig:
        """From the content of a diffusers ``AutoencoderKL`` config.json.

        Keys that are absent take the defaults of diffusers, which are not those of FLUX.1.

        Raises:
            ValueError: naming keys, block types or activations that are not implemented.
        """
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in config.items() if key not in _BOOKKEEPING}
        levels = len(given.get("block_out_channels", (64,)))
        for key, block_type in _BLOCK_TYPES.items():
            types = given.pop(key, (block_type,))
            if other := sorted(set(types) - {block_type}):
                raise ValueError(f"VAE config: {key} {other} not implemented; only {block_type!r} is")
            if len(types) != levels:
                raise ValueError(f"VAE config: {len(types)} {key} for {levels} block_out_channels")
        if (activation := given.pop("act_fn", "silu")) not in ("silu", "swish"):
            raise ValueError(f"VAE config: act_fn {activation!r} is not implemented; only 'silu' is")
        for key in ("latents_mean", "latents_std"):
            if given.pop(key, None) is not None:
                raise ValueError(f"VAE config: per-channel {key} is not implemented; expected null")
        if unknown := sorted(set(given) - known):
            raise ValueError(f"VAE config: unknown keys {unknown}; known are {sorted(known)}")
        published = {
            "latent_channels": 4,
            "block_out_channels": (64,),
            "layers_per_block": 1,
            "scaling_factor": 0.18215,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        }
        values = published | given
        values["block_out_channels"] = tuple(values["block_out_channels"])
        values["shift_factor"] = 0.0 if values.get("shift_factor") is None else values["shift_factor"]
        return cls(**values)


class ResnetBlock(nnx.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``, a 1x1 convolution on ``x`` where widths differ."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups=groups, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups=groups, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = (
            Conv(inputs, outputs, kernel=1, padding=(0, 0), dtype=dtype, rngs=rngs) if inputs != outputs else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
    """Single-head self-attention over all pixels, added to its input."""

    def __init__(self, width: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(axes: tuple[str, str]) -> Linear:
            return Linear(width, width, axes=axes, dtype=dtype, rngs=rngs)

        self.norm = GroupNorm(width, groups=groups, dtype=dtype, rngs=rngs)
        self.query = linear(("embed", "heads"))
        self.key = linear(("embed", "heads"))
        self.value = linear(("embed", "heads"))
        self.out = linear(("heads", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, height * width, channels)
        query, key, value = (layer(tokens)[:, :, None, :] for layer in (self.query, self.key, self.value))
        mixed = attention(query, key, value)[:, :, 0, :]
        return x + self.out(mixed).reshape(x.shape)


class MiddleBlock(nnx.Module):
    """Residual block, attention (where configured), residual block, at the lowest resolution."""

    def __init__(self, width: int, *, groups: int, attention: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.before = ResnetBlock(width, width, groups=groups, dtype=dtype, rngs=rngs)
        self.attention = SpatialAttention(width, groups=groups, dtype=dtype, rngs=rngs) if attention else None
        self.after = ResnetBlock(width, width, groups=groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.before(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.after(x)


class DownBlock(nnx.Module):
    """Residual blocks at one resolution, then a convolution of stride 2 unless it is the lowest."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        layers: int,
        downsample: bool,
        groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(outputs if i else inputs, outputs, groups=groups, dtype=dtype, rngs=rngs) for i in range(layers)
        )
        # Padding only below and to the right is what published weights were trained with.
        self.downsample = (
            Conv(outputs, outputs, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs) if downsample else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class UpBlock(nnx.Module):
    """Residual blocks at one resolution, then doubling by repetition and a convolution unless the finest."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        layers: int,
        upsample: bool,
        groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(outputs if i else inputs, outputs, groups=groups, dtype=dtype, rngs=rngs) for i in range(layers)
        )
        self.upsample = Conv(outputs, outputs, dtype=dtype, rngs=rngs) if upsample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsample is None else self.upsample(double(x))


def double(x: jax.Array) -> jax.Array:
    """Each pixel of ``x`` [B, H, W, C] repeated 2x2: [B, 2H, 2W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Encoder(nnx.Module):
    """Image [B, H, W, in_channels] to moments [B, H/f, W/f, 2 * latent_channels]."""

    def __init__(self, config: VaeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            DownBlock(
                widths[max(i - 1, 0)],
                width,
                layers=config.layers_per_block,
                downsample=i < len(widths) - 1,
                groups=groups,
                dtype=dtype,
                rngs=rngs,
            )
            for i, width in enumerate(widths)
        )
        self.middle = MiddleBlock(
            widths[-1], groups=groups, attention=config.mid_block_add_attention, dtype=dtype, rngs=rngs
        )
        self.norm_out = GroupNorm(widths[-1], groups=groups, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down:
            x = block(x)
        x = self.middle(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latent [B, h, w, latent_channels] to image [B, f*h, f*w, out_channels]; ``up`` runs coarse to fine."""

    def __init__(self, config: VaeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.middle = MiddleBlock(
            widths[0], groups=groups, attention=config.mid_block_add_attention, dtype=dtype, rngs=rngs
        )
        self.up = nnx.List(
            UpBlock(
                widths[max(i - 1, 0)],
                width,
                layers=config.layers_per_block + 1,
                upsample=i < len(widths) - 1,
                groups=groups,
                dtype=dtype,
                rngs=rngs,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(widths[-1], groups=groups, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for block in self.up:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Vae(nnx.Module):
    """Autoencoder with a diagonal Gaussian posterior.

    Args:
        config: sizes.
        rngs: source of the initial parameters.
        dtype: dtype of the parameters; computation follows the dtype of the input.
    """

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        def pointwise(channels: int) -> Conv:
            return Conv(channels, channels, kernel=1, padding=(0, 0), dtype=dtype, rngs=rngs)

        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = pointwise(2 * config.latent_channels) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(config.latent_channels) if config.use_post_quant_conv else None

    def encode(self, images: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w L"], Float[Array, "B h w L"]]:
        """Raw (not normalised) moments of the posterior.

        Args:
            images: [B, H, W, in_channels] in [-1, 1]; H and W divisible by ``config.factor``.

        Returns:
            Mean and log-variance, [B, H/f, W/f, latent_channels] each, in the dtype of ``images``; the
            log-variance is clipped to [-30, 20].

        Raises:
            ValueError: if the channels or sides do not fit.
        """
        _, height, width, channels = images.shape
        factor = self.config.factor
        if channels != self.config.in_channels or height % factor or width % factor or not height * width:
            raise ValueError(
                f"Vae.encode: got images {images.shape}; expected [B, H, W, {self.config.in_channels}] with "
                f"H and W multiples of {factor}; crop or pad the images first"
            )
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "B h w L"]) -> Float[Array, "B H W C"]:
        """Images of raw (not normalised) latents.

        Args:
            latents: [B, h, w, latent_channels]; see `denormalize` for latents that come from a transformer.

        Returns:
            [B, f*h, f*w, out_channels], nominally in [-1, 1] but not clipped, in the dtype of ``latents``.

        Raises:
            ValueError: if the channels do not fit.
        """
        if latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"Vae.decode: got latents {latents.shape}; expected [B, h, w, {self.config.latent_channels}]"
            )
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def sample_posterior(
    mean: Float[Array, "B h w L"], logvar: Float[Array, "B h w L"], key: jax.Array
) -> Float[Array, "B h w L"]:
    """A draw from the posterior ``N(mean, exp(logvar))``, float32, from moments of `Vae.encode`."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
