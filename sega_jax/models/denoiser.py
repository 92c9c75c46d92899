"""What a denoising network is asked, whatever its family: the seam between a step and a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from sega_jax.layouts.streams import Call, Stream


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """One evaluation's inputs.

    Attributes:
        streams: tokens by stream: text [B, T, text_dim], image streams [B, N, channels].
        sigma: noise level in [0, 1], f32 [B]; streams with a sigma of their own ignore it.
        extras: what else the family conditions on, by name, a row per sample: a pooled text vector [B, D], a distilled
            guidance scale f32 [B].
    """

    streams: Mapping[str, Any]
    sigma: Any
    extras: Mapping[str, Any] = field(default_factory=dict)


class NetworkConfig(Protocol):
    """Sizes of a family's network, as far as planning asks for them.

    Attributes:
        in_channels: channels of a packed latent token.
        heads: attention heads; width: of the hidden state.
        blocks: how many there are, of all kinds.
        reductions: sums over the tensor axis of a mesh in one evaluation: products whose inputs are sharded.
        block_parameters: parameters of all blocks, biases and norms left aside.
    """

    in_channels: int

    @property
    def heads(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    @property
    def reductions(self) -> int: ...

    @property
    def block_parameters(self) -> int: ...

    def step_flops(self, tokens: int, text_tokens: int, pairs: int) -> float:
        """Multiply-adds times two of a model row: linear layers, and ``pairs`` query-key pairs per attention layer."""


class Denoiser(Protocol):
    """A network of a family; `sega_jax.sampling.denoise.predict` knows no more of it."""

    def probe(self) -> jax.Array:
        """f32 [channels]: a packed latent token times this is the mean over channels of its embedding.

        SEGA measures its spectrum on that mean (arXiv 2605.22668, released code: the embedder's output averaged over
        channels); where the embedder is affine it is a product with the latent.
        """

    def __call__(
        self,
        inputs: StepInputs,
        calls: tuple[Call, ...],
        *,
        streams: tuple[Stream, ...],
        backend: str = "auto",
        mesh: Mesh | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Mapping[str, jax.Array]:
        """The prediction of every image stream, [B, N, channels].

        Args:
            inputs: of this evaluation.
            calls: bound attention calls of the layout.
            streams: how each stream is treated, in the order of attention.
            backend: attention kernel.
            mesh: devices to lay streams and weights on.
            given: keys and values of further streams, which are asked but not computed.
        """
