"""The kinds of components a checkpoint is made of.

A `Family` is one kind (transformer, autoencoder, text encoders): its key maps by layout, and how to read its
configuration off its tensors where no ``config.json`` says.  A new family is a row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converters.errors import CheckpointError
from converters.keymap import Dims, Rename, Row, Slot, Tensor, expand
from converters.keymaps import clip, flux, t5, vae

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """One kind of component.

    Attributes:
        name: its folder in a pipeline.
        signatures: layout -> a tensor name that only this layout of this family has.
        slot: an Orbax name that only this family has.
        rows: key map for a (complete) configuration and a layout.
        dims: sizes of the key map from a configuration.
        infer: configuration from tensor shapes, by the names of the key map, with FLUX.1's values where shapes
            cannot tell.
        stem: file name of its weights in a diffusers folder.
        single: file name of its weights where every component is a single file.
        rename: declared variants of source names.
        prefix: put before the names when written for a diffusers folder or a single file.
        defaults: configuration values that may be left out of a ``config.json``.
        implied: configuration values that the names of the tensors tell (in the key map or in Orbax).
    """

    name: str
    signatures: Mapping[str, str]
    slot: str
    rows: Callable[[Mapping[str, Any], str], Sequence[Row]]
    dims: Callable[[Mapping[str, Any]], Dims]
    infer: Callable[[Shapes, str], dict]
    stem: str
    single: str
    rename: Rename = lambda name: name
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Callable[[Collection[str]], dict[str, Any]] = lambda names: {}

    def tensors(self, config: Mapping[str, Any], layout: str) -> list[Tensor]:
        """The expanded key map; for ``orbax``, one tensor per slot of the diffusers map."""
        config = {**self.defaults, **config}
        try:
            if layout != "orbax":
                return list(expand(self.rows(config, layout), self.dims(config)))
            reference = self.tensors(config, next(iter(self.signatures)))
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(f"{self.name}: the configuration lacks or garbles {exc}") from exc
        return [
            Tensor(slot_name(slot), shape, (slot,), (), ())
            for tensor in reference
            for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True)
        ]


def slot_name(slot: Slot) -> str:
    """Name of a slot in Orbax: the target path, and the layer's index."""
    return slot.path if slot.index is None else f"{slot.path}.{slot.index}"


# -- configurations read off tensors -------------------------------------------------------------------------------


def _layers(shapes: Shapes, prefix: str) -> int:
    depth = prefix.count(".")
    return len({name.split(".")[depth] for name in shapes if name.startswith(prefix)})


def _infer_flux(shapes: Shapes, layout: str) -> dict:
    if layout == "bfl":
        config = flux.config_from_bfl(shapes)
    else:
        width, tokens = shapes["x_embedder.weight"]
        head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        frame = head // 8
        config = {
            "in_channels": tokens,
            "num_layers": _layers(shapes, "transformer_blocks."),
            "num_single_layers": _layers(shapes, "single_transformer_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
            "axes_dims_rope": [frame, (head - frame) // 2, (head - frame) // 2],
        }
    return {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **config}


def _infer_vae(shapes: Shapes, layout: str) -> dict:
    if layout == "bfl":
        block, middle = "encoder.down.{i}.block.{j}.conv1.weight", "encoder.mid.attn_1.norm.weight"
    else:
        block, middle = "encoder.down_blocks.{i}.resnets.{j}.conv1.weight", "encoder.mid_block.attentions.0."
    levels, layers = 0, 0
    while block.format(i=levels, j=0) in shapes:
        levels += 1
    while block.format(i=0, j=layers) in shapes:
        layers += 1
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[block.format(i=i, j=0)][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(name.startswith(middle) for name in shapes),
    }


def _infer_clip(shapes: Shapes, _layout: str) -> dict:
    vocab, hidden = shapes["embeddings.token_embedding.weight"]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _layers(shapes, "encoder.layers."),
        "num_attention_heads": max(hidden // 64, 1),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "projection_dim": 768,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _infer_t5(shapes: Shapes, _layout: str) -> dict:
    vocab, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _layers(shapes, "encoder.block."),
        "num_decoder_layers": _layers(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-06,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "use_cache": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


FAMILIES: tuple[Family, ...] = (
    Family(
        "transformer",
        {"diffusers": "transformer_blocks.0.attn.add_q_proj.weight", "bfl": "double_blocks.0.img_attn.qkv.weight"},
        "double.image.attention.query.kernel.0",
        lambda _config, layout: {"diffusers": flux.DIFFUSERS, "bfl": flux.BFL}[layout],
        flux.dims,
        _infer_flux,
        "diffusion_pytorch_model",
        "flux1.safetensors",
        rename=flux.rename,
        implied=lambda names: {"guidance_embeds": any("guidance" in name for name in names)},
    ),
    Family(
        "vae",
        {
            "diffusers": "decoder.mid_block.resnets.0.conv1.weight",
            "diffusers-conv": "decoder.mid_block.resnets.0.conv1.weight",
            "diffusers-old": "decoder.mid_block.resnets.0.conv1.weight",
            "bfl": "decoder.mid.block_1.conv1.weight",
        },
        "decoder.middle.before.conv1.kernel",
        lambda config, layout: vae.rows(config, layout),
        vae.dims,
        _infer_vae,
        "diffusion_pytorch_model",
        "ae.safetensors",
        defaults={"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
    ),
    Family(
        "text_encoder",
        {"diffusers": "encoder.layers.0.self_attn.q_proj.weight"},
        "positions.table",
        lambda _config, _layout: clip.ROWS,
        clip.dims,
        _infer_clip,
        "model",
        "clip_l.safetensors",
        rename=clip.rename,
        prefix="text_model.",
    ),
    Family(
        "text_encoder_2",
        {"diffusers": "encoder.block.0.layer.0.SelfAttention.q.weight"},
        "relative.table",
        lambda _config, _layout: t5.ROWS,
        t5.dims,
        _infer_t5,
        "model",
        "t5xxl.safetensors",
        rename=t5.rename,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
