"""Sizes of `nano`'s coming weights and its four networks, built from the same classes as FLUX.1."""

from __future__ import annotations

from flax import nnx

from sega_jax.geometry import Grid
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.models.t5 import T5Config, T5Encoder
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.nano.next import grammar
from sega_jax.nano.vocabulary import CLIP_LENGTH, T5_LENGTH, clip_tables, t5_pieces

WORDS = tuple(grammar.words())
TRAINED = (16, 16)  # tokens per side; 256 x 256 pixels
PIXELS_PER_TOKEN = 16

VAE = VaeConfig(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,
    shift_factor=0.0,
)
TRANSFORMER = FluxConfig(
    in_channels=64,
    double_layers=1,
    single_layers=6,
    heads=2,
    head_dim=64,
    rope_dims=(8, 28, 28),
    text_dim=128,
    pooled_dim=128,
    guidance_embeds=False,
)
T5 = T5Config(vocab_size=len(t5_pieces(WORDS)), d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2)
CLIP = ClipConfig(
    vocab_size=len(clip_tables(WORDS)[0]),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=CLIP_LENGTH,
    eos_token_id=clip_tables(WORDS)[0]["<|endoftext|>"],
)
# The scheduler's anchors (tokens, mu).  nano's native 256 tokens play the part of FLUX.1's native 4,096: both have
# mu 1.15.
SHIFT_ANCHORS = ((64, 0.5), (TRAINED[0] * TRAINED[1], 1.15))


def shift_mu(tokens: int) -> float:
    """Schedule shift of a token count, on the line through `SHIFT_ANCHORS`."""
    (few, low), (many, high) = SHIFT_ANCHORS
    return low + (high - low) * (tokens - few) / (many - few)


def grid(rows: int, columns: int) -> Grid:
    """Token grid of a picture with nano's text length."""
    return TRANSFORMER.rope_spec(TRAINED, PIXELS_PER_TOKEN).grid(rows, columns, T5_LENGTH)


def build_vae(rngs: nnx.Rngs, config: VaeConfig = VAE) -> Vae:
    """The autoencoder."""
    return Vae(config, rngs=rngs)


def build_generator(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """What is trained together: transformer, CLIP (``text_encoder``) and T5 (``text_encoder_2``).

    T5 does not scale its attention scores and leaves the width of its embeddings to the initialisation, so the
    queries start small and the embeddings at the scale of what the layers add to them.
    """
    modules = {
        "transformer": Flux(TRANSFORMER, rngs=rngs),
        "text_encoder": ClipTextEncoder(CLIP, rngs=rngs),
        "text_encoder_2": T5Encoder(T5, rngs=rngs),
    }
    t5, clip = modules["text_encoder_2"], modules["text_encoder"]
    for param, factor in (
        (t5.blocks.query.kernel, T5.d_kv**-0.5),
        (t5.tokens.table, 50.0),
        (clip.tokens.table, 25.0),
        (clip.positions.table, 10.0),
    ):
        param.set_value(param[...] * factor)
    return modules
