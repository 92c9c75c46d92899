"""What the text encoders share: reading a published configuration and attention with an additive bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Config = TypeVar("Config")

# What transformers writes into every config.json besides the architecture: provenance, output switches and
# (up to version 4) generation settings.  None of it changes what an encoder computes.
# fmt: off
BOOKKEEPING = frozenset({
    "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash", "_name_or_path",
    "add_cross_attention", "architectures", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})
# fmt: on


def read_config(kind: type[Config], config: Mapping[str, Any], ignored: Iterable[str] = ()) -> Config:
    """A configuration dataclass from a published dictionary.

    Args:
        kind: the dataclass; its fields carry the published names, those without a default are required.
        config: the dictionary, as read from ``config.json``.
        ignored: names, besides `BOOKKEEPING`, that are known not to matter.

    Raises:
        ValueError: for unknown or missing names, all of them at once.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(config) - set(fields) - BOOKKEEPING - set(ignored))
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in config]
    if unknown or missing:
        raise ValueError(
            f"{kind.__name__}: unknown settings {unknown}, missing settings {missing}; "
            f"expected the config.json of this kind of text encoder, with {sorted(fields)}"
        )
    return kind(**{name: config[name] for name in fields if name in config})


def biased_attention(
    query: Float[Array, "B T D"],
    key: Float[Array, "B T D"],
    value: Float[Array, "B T D"],
    bias: Float[Array, "#H T T"],
    *,
    heads: int,
    scale: float,
) -> Float[Array, "B T D"]:
    """Softmax attention among the tokens of one text, with scores, bias and softmax in float32.

    Args:
        query, key, value: projections with the heads side by side in the last axis.
        bias: added to the scaled scores of each head; float32.
        heads: number of heads.
        scale: factor on the scores.
    """
    batch, length, width = query.shape
    split = (batch, length, heads, width // heads)
    q, k, v = query.reshape(split), key.reshape(split), value.reshape(split)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale + bias[None], axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
