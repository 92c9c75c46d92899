"""Checkpoints that are often met and are not FLUX.1's base models: refused by name, with what to use instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from converters.errors import CheckpointError

_FULL = "use the bfloat16 checkpoint, a GGUF file or one of scaled float8"
_FLUX = "give a checkpoint of FLUX.1 [dev], [schnell] or [Krea-dev]"
_MERGED = "merge it with the tool that made it, and convert the merged checkpoint"
# What some tensor's name says -> what the file is, and what to do; the first that matches is said.
_BY_NAME: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), what, instead)
    for pattern, what, instead in (
        (r"\.quant_state\.bitsandbytes__|\.(nested_)?absmax$|\.quant_map$", "NF4 weights of bitsandbytes", _FULL),
        (r"\.SCB$|\.weight_format$", "8-bit weights of bitsandbytes", _FULL),
        (r"\.(wscales|smooth_factor|proj_down|qweight)$", "4-bit weights (SVDQuant of nunchaku, GPTQ or AWQ)", _FULL),
        (r"\.weight\._(data|scale)$", "weights quantised by quanto", _FULL),
        (r"^distilled_guidance_layer\.", "Chroma, whose modulation is another network", _FLUX),
        (r"^(redux_up|redux_down)\.", "FLUX.1 Redux, an adapter for pictures as prompts", _FLUX),
        (r"^controlnet_|^input_hint_block\.|^controlnet\.", "a ControlNet, which is no model of its own", _FLUX),
        (r"ip_adapter|^image_proj\.", "an IP-Adapter, which is no model of its own", _FLUX),
        (r"\.lokr_", "a LoKr, which is no plain LoRA", _MERGED),
        (r"\.hada_", "a LoHa, which is no plain LoRA", _MERGED),
        (r"\.lora_(A|B|up|down)\b|_lora[12]?\.(up|down)\.weight$", "a LoRA", "merge it into a checkpoint: --lora FILE"),
        (r"double_stream_modulation_img|single_stream_modulation", "FLUX.2", _FLUX),
        (r"^joint_blocks\.|\.joint_blocks\.", "Stable Diffusion 3", _FLUX),
        (r"input_blocks\.\d+\.\d+\.|^down_blocks\.\d+\.attentions\.", "a Stable Diffusion U-Net", _FLUX),
    )
)  # fmt: skip
# Diffusers' pipelines whose transformer has FLUX.1's class but another task.
_PIPELINES = {
    "FluxFillPipeline": "FLUX.1 Fill, which paints into pictures",
    "FluxKontextPipeline": "FLUX.1 Kontext, which edits pictures",
    "FluxKontextInpaintPipeline": "FLUX.1 Kontext, which edits pictures",
    "FluxPriorReduxPipeline": "FLUX.1 Redux, an adapter for pictures as prompts",
    "FluxControlPipeline": "FLUX.1 Depth or Canny, which follow a control picture",
    "FluxControlImg2ImgPipeline": "FLUX.1 Depth or Canny, which follow a control picture",
    "FluxControlInpaintPipeline": "FLUX.1 Depth or Canny, which follow a control picture",
    "FluxControlNetPipeline": "FLUX.1 with a ControlNet",
    "FluxControlNetImg2ImgPipeline": "FLUX.1 with a ControlNet",
    "FluxControlNetInpaintPipeline": "FLUX.1 with a ControlNet",
    "ChromaPipeline": "Chroma, whose modulation is another network",
    "ChromaImg2ImgPipeline": "Chroma, whose modulation is another network",
}
_SAYS = ("modelspec.title", "modelspec.architecture", "general.name", "general.basename")  # entries that name a model


def refuse_others(
    names: Collection[str], shape: Callable[[str], tuple[int, ...]], metadata: Mapping[str, str], where: str, file: str
) -> None:
    """Raises CheckpointError where tensors are of another known model or format.

    Args:
        names: of the tensors, without the prefixes of a bundle.
        shape: of a tensor by name.
        metadata: of the file.
        where: what to call the checkpoint.
        file: name of the file or folder, which is all that tells Kontext's weights from dev's.
    """
    for pattern, what, instead in _BY_NAME:
        found = [name for name in names if pattern.search(name)]
        if found:
            raise CheckpointError(f"{where}: {what} ({len(found)} tensors such as {found[0]}); {instead}")
    present = set(names)
    for into, out in (("x_embedder.weight", "proj_out.weight"), ("img_in.weight", "final_layer.linear.weight")):
        if not {into, out} <= present or not len(shape(into)) == len(shape(out)) == 2:
            continue
        if (wide := shape(into)[1]) > (own := shape(out)[0]):
            what = "FLUX.1 Fill, which paints into pictures" if wide == 6 * own else "FLUX.1 Depth or Canny"
            what = what if wide in (2 * own, 6 * own) else "a FLUX.1 model with a control picture"
            raise CheckpointError(f"{where}: {what} ({into} takes {wide} channels, {own} come out); {_FLUX}")
    said = " ".join([file, *(metadata.get(name, "") for name in _SAYS)])
    if re.search("kontext", said, re.IGNORECASE) and {"x_embedder.weight", "img_in.weight"} & present:
        raise CheckpointError(
            f"{where}: FLUX.1 Kontext, which edits pictures, by its name ({said.strip():.80}); {_FLUX}"
        )


def refuse_pipeline(name: Any, where: str) -> None:
    """Raises CheckpointError for a ``model_index.json`` whose ``_class_name`` is of another task."""
    if name in _PIPELINES:
        raise CheckpointError(f"{where}: {_PIPELINES[name]} ({name} in model_index.json); {_FLUX}")


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a ``config.json`` that says that its weights are quantised."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(f"{where}: weights quantised by {method or 'an unknown method'!s:.40}; {_FULL}")
