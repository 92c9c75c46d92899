"""The FLUX.1 transformer: double-stream blocks, then single-stream blocks, over any streams and any layout.

The model receives streams, per-stream noise levels and bound attention calls.  It knows no positional method and
no layout: positions live in the calls, and `attend` is the only place where streams meet.
Architecture as published with the weights (Black Forest Labs, FLUX.1); adaLN-Zero modulation as in DiT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sega_jax.attention import attend
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.streams import Call, Stream
from sega_jax.models import adapters as lowrank
from sega_jax.models.denoiser import StepInputs
from sega_jax.models.layers import LayerNorm, Linear, RMSNorm, stack, timestep_embedding, zeros
from sega_jax.models.packing import Packing
from sega_jax.sharding.rules import gathered
from sega_jax.sharding.split import Split

TIME_FEATURES = 256  # width of the sinusoidal features of sigma and guidance

PACKING = Packing()  # of latents into tokens
MLP_RATIO = 4  # hidden width of the MLPs over the model width, in every published checkpoint


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer.

    Attributes:
        in_channels: channels of a packed latent token (VAE channels times 4).
        double_layers, single_layers: block counts.
        heads, head_dim: attention heads and channels per head.
        text_dim, pooled_dim: widths of the T5 sequence and of the pooled CLIP vector.
        guidance_embeds: whether distilled guidance is an input (dev) or not (schnell).
        rope_dims: head channels per rotary axis (frame, row, column).
        theta: rotary base.
    """

    in_channels: int = 64
    double_layers: int = 19
    single_layers: int = 38
    heads: int = 24
    head_dim: int = 128
    text_dim: int = 4096
    pooled_dim: int = 768
    guidance_embeds: bool = True
    rope_dims: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0

    def __post_init__(self):
        if sum(self.rope_dims) != self.head_dim:
            raise ValueError(f"rope_dims={self.rope_dims}: must add up to head_dim={self.head_dim}")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        return MLP_RATIO * self.width

    @property
    def blocks(self) -> int:
        return self.double_layers + self.single_layers

    @property
    def reductions(self) -> int:
        """Attention and MLP of a double block sum on their own, those of a single block together."""
        return 2 * self.double_layers + self.single_layers

    @property
    def block_parameters(self) -> int:
        """A double block has two sets of 18 width^2 (projections 4, MLP 8, modulation 6), a single block 15."""
        return (36 * self.double_layers + 15 * self.single_layers) * self.width**2

    def step_flops(self, tokens: int, text_tokens: int, pairs: int) -> float:
        """Multiply-adds times two of a model row: linear layers, and ``pairs`` query-key pairs per attention layer."""
        width, layers = self.width, self.blocks
        linear = (4 + 2 * self.mlp_width / width) * width**2 * (tokens + text_tokens) * layers
        ends = width * (2 * self.in_channels * tokens + self.text_dim * text_tokens)
        modulation = (12 * self.double_layers + 3 * self.single_layers + 2) * width**2
        return 2.0 * (linear + ends + modulation) + 4.0 * width * pairs * layers

    def rope_spec(self, trained: tuple[int, int] = (64, 64), pixels_per_token: int = 16) -> RopeSpec:
        """Rotary geometry of this family: corner ids, trained on ``trained`` tokens per side."""
        return RopeSpec(self.rope_dims, self.theta, trained, "corner", pixels_per_token)

    @classmethod
    def dev(cls) -> FluxConfig:
        """FLUX.1-dev: 11,901,408,320 parameters."""
        return cls()

    @classmethod
    def krea_dev(cls) -> FluxConfig:
        """FLUX.1-Krea-dev: the sizes of FLUX.1-dev."""
        return cls.dev()

    @classmethod
    def schnell(cls) -> FluxConfig:
        """FLUX.1-schnell: no guidance input, 11,891,178,560 parameters."""
        return cls(guidance_embeds=False)

    @classmethod
    def from_dict(cls, config: Mapping) -> FluxConfig:
        """From a diffusers ``transformer/config.json``.

        Raises:
            ValueError: for keys this model does not implement, named.
        """
        names = {
            "in_channels": "in_channels",
            "num_layers": "double_layers",
            "num_single_layers": "single_layers",
            "num_attention_heads": "heads",
            "attention_head_dim": "head_dim",
            "joint_attention_dim": "text_dim",
            "pooled_projection_dim": "pooled_dim",
            "guidance_embeds": "guidance_embeds",
            "axes_dims_rope": "rope_dims",
        }
        fixed = {"patch_size", "out_channels"}  # checked below
        unknown = sorted(key for key in set(config) - set(names) - fixed if not key.startswith("_"))
        if unknown:
            raise ValueError(f"FLUX transformer config: unknown keys {unknown}; known: {sorted(names)}")
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"FLUX transformer config: patch_size={config['patch_size']}, only 1 is implemented")
        if config.get("out_channels") not in (None, config.get("in_channels", cls.in_channels)):
            raise ValueError(f"FLUX transformer config: out_channels={config['out_channels']} must equal in_channels")
        values = {names[key]: value for key, value in config.items() if key in names}
        if "rope_dims" in values:
            values["rope_dims"] = tuple(values["rope_dims"])
        return cls(**values)

    def to_dict(self) -> dict:
        """The diffusers ``config.json`` fields of this configuration."""
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": None,
            "num_layers": self.double_layers,
            "num_single_layers": self.single_layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_dim,
            "pooled_projection_dim": self.pooled_dim,
            "guidance_embeds": self.guidance_embeds,
            "axes_dims_rope": list(self.rope_dims),
        }


class Embedder(nnx.Module):
    """Two linear layers with SiLU between: features of sigma, guidance or pooled text to the model width."""

    def __init__(self, inputs: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.into = Linear(inputs, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.silu(self.into(x)))


class Projections(nnx.Module):
    """Queries, keys and values of one weight set, with RMS-normalised queries and keys."""

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, axes = config.width, ("embed", "heads")
        self.query = Linear(width, width, axes=axes, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, axes=axes, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, axes=axes, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, dtype=dtype, rngs=rngs)
        self.key_norm = RMSNorm(config.head_dim, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, width] -> three times [B, N, heads, head_dim], not rotated."""
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (self.query(x), self.key(x), self.value(x)))
        return self.query_norm(q), self.key_norm(k), v


def _modulation(layer: Callable[[jax.Array], jax.Array], conditioning: jax.Array, parts: int) -> list[jax.Array]:
    """Shift, scale and gate vectors, each [B, 1, width]."""
    return jnp.split(layer(jax.nn.silu(conditioning))[:, None, :], parts, axis=-1)


class DoubleHalf(nnx.Module):
    """One weight set (image or text) of a double-stream block."""

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 6 * width, init=zeros, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, affine=False)
        self.attention = Projections(config, dtype=dtype, rngs=rngs)
        self.attention_out = Linear(width, width, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(config.mlp_width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def modulate(self, conditioning: jax.Array) -> list[jax.Array]:
        return _modulation(self.modulation, conditioning, 6)

    def project(self, x: jax.Array, modulation: list[jax.Array]):
        shift, scale = modulation[:2]
        return self.attention(self.norm(x) * (1 + scale) + shift)

    def finish(self, x: jax.Array, attended: jax.Array, modulation: list[jax.Array]) -> jax.Array:
        gate, shift, scale, mlp_gate = modulation[2:]
        x = x + gate * self.attention_out(attended)
        hidden = self.mlp_in(self.norm(x) * (1 + scale) + shift)
        return x + mlp_gate * self.mlp_out(jax.nn.gelu(hidden, approximate=True))


class DoubleBlock(nnx.Module):
    """Text and image streams with weights of their own, joined in attention."""

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.image = DoubleHalf(config, dtype=dtype, rngs=rngs)
        self.text = DoubleHalf(config, dtype=dtype, rngs=rngs)

    def half(self, kind: str) -> DoubleHalf:
        return self.text if kind == "text" else self.image


class SingleBlock(nnx.Module):
    """All streams share these weights; attention and MLP run side by side."""

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 3 * width, init=zeros, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, affine=False)
        self.attention = Projections(config, dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.out = Linear(width + config.mlp_width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def finish(
        self, x: jax.Array, attended: jax.Array, normed: jax.Array, gate: jax.Array, *, apart: bool = False
    ) -> jax.Array:
        """``apart`` multiplies attention and MLP one by one: their channels are sharded, joining would move them."""
        hidden = jax.nn.gelu(self.mlp_in(normed), approximate=True)
        if apart:
            return x + gate * self.out.of_parts(attended, hidden)
        return x + gate * self.out(jnp.concatenate([attended, hidden], axis=-1))


def _split(mesh: Mesh | None, inputs: Mapping[str, jax.Array], streams: tuple[Stream, ...]) -> Split | None:
    return Split.of(mesh, {s.name: inputs[s.name].shape[1] for s in streams if s.kind == "image"})


StreamArrays = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]


class KeysValues(NamedTuple):
    """Keys and values of a stream in every block, not rotated: two arrays [layers, B, N, heads, head_dim] each."""

    double: Pair
    single: Pair


def _attend(
    projected: Mapping[str, tuple],
    given: Mapping[str, Pair],
    calls: tuple[Call, ...],
    backend: str,
    split: Split | None,
) -> StreamArrays:
    q, k, v = ({name: p[i] for name, p in projected.items()} for i in range(3))
    k |= {name: pair[0] for name, pair in given.items()}
    v |= {name: pair[1] for name, pair in given.items()}
    out = attend(q, k, v, calls, backend=backend, split=split)
    return {name: y.reshape(*y.shape[:2], -1) for name, y in out.items()}


class Flux(nnx.Module):
    """FLUX.1 transformer.

    Example::

        layout, grid = Dense(), config.rope_spec().grid(64, 64, text_tokens=512)
        calls = bind(layout.calls(grid), {"image": {"text": plain(grid), "image": plain(grid)}})
        inputs = StepInputs({"text": text, "image": tokens}, sigma, {"pooled": pooled, "guidance": guidance})
        velocity = flux(inputs, calls)["image"]
    """

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        self.image_embed = Linear(config.in_channels, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.text_embed = Linear(config.text_dim, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.time = Embedder(TIME_FEATURES, width, dtype=dtype, rngs=rngs)
        self.guidance = Embedder(TIME_FEATURES, width, dtype=dtype, rngs=rngs) if config.guidance_embeds else None
        self.pooled = Embedder(config.pooled_dim, width, dtype=dtype, rngs=rngs)
        self.double = stack(lambda r: DoubleBlock(config, dtype=dtype, rngs=r), config.double_layers, rngs)
        self.single = stack(lambda r: SingleBlock(config, dtype=dtype, rngs=r), config.single_layers, rngs)
        self.out_modulation = Linear(width, 2 * width, init=zeros, dtype=dtype, rngs=rngs)
        self.out_norm = LayerNorm(width, affine=False)
        self.out = Linear(width, config.in_channels, axes=("embed", None), init=zeros, dtype=dtype, rngs=rngs)
        self.adapters: lowrank.Adapters | None = None  # for streams that ask for them

    def probe(self) -> jax.Array:
        """See `Denoiser.probe`."""
        return self.image_embed.kernel[...].astype(jnp.float32).mean(-1)

    def condition(self, sigma: jax.Array, extras: Mapping[str, jax.Array]) -> jax.Array:
        """The vector that modulates a stream: float32 [B, width]."""
        vector = self.time(timestep_embedding(sigma * 1000.0, TIME_FEATURES))
        vector = vector + self.pooled(extras["pooled"].astype(jnp.float32))
        if self.guidance is None:
            return vector
        if extras.get("guidance") is None:
            raise ValueError("guidance=None: this checkpoint has a guidance embedding and needs a value")
        return vector + self.guidance(timestep_embedding(extras["guidance"] * 1000.0, TIME_FEATURES))

    def __call__(
        self,
        inputs: StepInputs,
        calls: tuple[Call, ...],
        *,
        streams: tuple[Stream, ...] = (Stream("text", "text"), Stream("image", "image")),
        backend: str = "auto",
        remat: bool = False,
        mesh: Mesh | None = None,
        given: Mapping[str, tuple[Pair, Pair]] | None = None,
        unroll: bool = False,
    ) -> StreamArrays:
        """Velocity of every image stream.

        Args:
            inputs: of this evaluation; extras are ``pooled``, the pooled CLIP text [B, pooled_dim], and ``guidance``,
                the distilled guidance scale f32 [B], ignored by models without the embedding.
            calls: bound attention calls of the layout.
            streams: how each stream is treated, in the order of attention.
            backend: attention kernel.
            remat: recompute blocks in the backward pass instead of storing their activations.
            mesh: devices to lay streams and weights on (`sega_jax.sharding`); the batch divides by its data axis.
            given: keys and values of further streams (`keys_values`), which are asked but not computed.
            unroll: compile every block by itself: slower to compile, a quarter faster to train on a CPU.

        Returns:
            Image stream name -> velocity ``noise - clean``, [B, N, in_channels], in the dtype of the input.
        """
        conditioning, hidden, _ = self._blocks(
            inputs, calls, streams, backend, remat=remat, mesh=mesh, given=given, unroll=unroll
        )
        split = _split(mesh, inputs.streams, streams)
        out = {}
        for stream in streams:
            if stream.kind == "image":
                shift, scale = _modulation(self.out_modulation, conditioning[stream.name], 2)
                velocity = self.out(self.out_norm(hidden[stream.name]) * (1 + scale) + shift)
                out[stream.name] = velocity if split is None else split.leave(stream.name, velocity)
        return out

    def keys_values(
        self,
        inputs: StepInputs,
        calls: tuple[Call, ...],
        *,
        streams: tuple[Stream, ...],
        backend: str = "auto",
    ) -> dict[str, KeysValues]:
        """Keys and values of every stream, for streams that stay as they are from step to step; as `__call__`."""
        _, _, (double, single) = self._blocks(inputs, calls, streams, backend, keep=tuple(s.name for s in streams))
        return {stream.name: KeysValues(double[stream.name], single[stream.name]) for stream in streams}

    def _blocks(
        self,
        inputs: StepInputs,
        calls: tuple[Call, ...],
        streams: tuple[Stream, ...],
        backend: str,
        *,
        remat: bool = False,
        mesh: Mesh | None = None,
        given: Mapping[str, tuple[Pair, Pair]] | None = None,
        keep: tuple[str, ...] = (),
        unroll: bool = False,
    ) -> tuple[StreamArrays, StreamArrays, tuple[dict[str, Pair], dict[str, Pair]]]:
        """Embeddings and all blocks: the conditioning and last hidden state of every stream, and kept keys and values.

        ``keep`` names streams whose keys and values are returned per block.
        """
        sigma, extras = inputs.sigma, inputs.extras
        shared = self.condition(sigma, extras)
        conditioning, hidden = {}, {}
        adapters = self.adapters
        split = _split(mesh, inputs.streams, streams)
        if mesh is not None and given:
            raise ValueError(f"keys and values given for {', '.join(given)}: on a mesh every stream has to run along")
        apart = mesh is not None and mesh.shape["tensor"] > 1

        def hold(hidden: StreamArrays) -> StreamArrays:
            return hidden if split is None else {name: split.hold(name, x) for name, x in hidden.items()}

        for stream in streams:
            x = inputs.streams[stream.name]
            if split is not None:
                x = split.enter(stream.name, x)
            vector = shared
            if stream.sigma is not None:
                vector = self.condition(jnp.full_like(sigma, stream.sigma), extras)
            conditioning[stream.name] = vector.astype(x.dtype)
            hidden[stream.name] = self.text_embed(x) if stream.kind == "text" else self.image_embed(x)
            if stream.adapter == "all" and adapters is not None and adapters.image_embed is not None:
                hidden[stream.name] = hidden[stream.name] + adapters.image_embed(x)

        def double(hidden: StreamArrays, layer: tuple) -> tuple[StreamArrays, dict[str, Pair]]:
            block, changes, others = layer
            block, changes = gathered(block, mesh), gathered(changes, mesh)
            halves = {
                s.name: lowrank.adapted(block.half(s.kind), changes if s.kind == "image" else None, s.adapter)
                for s in streams
            }
            modulation = {name: half.modulate(conditioning[name]) for name, half in halves.items()}
            projected = {name: half.project(hidden[name], modulation[name]) for name, half in halves.items()}
            attended = _attend(projected, others, calls, backend, split)
            finished = {n: half.finish(hidden[n], attended[n], modulation[n]) for n, half in halves.items()}
            return hold(finished), {name: projected[name][1:] for name in keep}

        def single(hidden: StreamArrays, layer: tuple) -> tuple[StreamArrays, dict[str, Pair]]:
            block, changes, others = layer
            block, changes = gathered(block, mesh), gathered(changes, mesh)
            blocks = {s.name: lowrank.adapted(block, changes, s.adapter) for s in streams}
            normed, gates, projected = {}, {}, {}
            for name, x in hidden.items():
                shift, scale, gates[name] = _modulation(blocks[name].modulation, conditioning[name], 3)
                normed[name] = block.norm(x) * (1 + scale) + shift
                projected[name] = blocks[name].attention(normed[name])
            attended = _attend(projected, others, calls, backend, split)
            finished = {
                n: blocks[n].finish(x, attended[n], normed[n], gates[n], apart=apart) for n, x in hidden.items()
            }
            return hold(finished), {name: projected[name][1:] for name in keep}

        if remat:
            double, single = jax.checkpoint(double), jax.checkpoint(single)
        changes = (None, None) if adapters is None else (adapters.double, adapters.single)
        others = [{name: kv[i] for name, kv in (given or {}).items()} for i in range(2)]
        hidden, doubles = jax.lax.scan(double, hold(hidden), (self.double, changes[0], others[0]), unroll=unroll)
        hidden, singles = jax.lax.scan(single, hidden, (self.single, changes[1], others[1]), unroll=unroll)
        return conditioning, hidden, (doubles, singles)
