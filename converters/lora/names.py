"""The names of modules in LoRA files, whatever the dialect: which parameter of which component one stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from converters.keymap import Row, Slot, evaluate
from converters.keymaps import clip, flux, t5

_FUSED_XLABS = ("width",) * 3


def _xlabs_rows() -> tuple[Row, ...]:
    rows = []
    for half, number in (("image", 1), ("text", 2)):
        names = tuple(f"double[{{i}}].{half}.attention.{part}.kernel" for part in ("query", "key", "value"))
        source = f"double_blocks.{{i}}.processor.{{}}_lora{number}.weight"
        rows.append(
            Row(source.replace("{}", "qkv"), names, ("3*width", "width"), ("transpose",), "double", _FUSED_XLABS)
        )
        out = f"double[{{i}}].{half}.attention_out.kernel"
        rows.append(Row(source.replace("{}", "proj"), out, ("width", "width"), ("transpose",), "double"))
    names = tuple(f"single[{{i}}].attention.{part}.kernel" for part in ("query", "key", "value"))
    source = "single_blocks.{i}.processor.{}_lora.weight"
    rows.append(Row(source.replace("{}", "qkv"), names, ("3*width", "width"), ("transpose",), "single", _FUSED_XLABS))
    out = Row(source.replace("{}", "proj"), "single[{i}].out.kernel", ("width", "inner"), ("transpose",), "single")
    return (*rows, out)


TABLES: dict[str, dict[str, tuple[Row, ...]]] = {
    "transformer": {"diffusers": flux.DIFFUSERS, "bfl": flux.BFL, "xlabs": _xlabs_rows()},
    "text_encoder": {"diffusers": clip.ROWS},
    "text_encoder_2": {"diffusers": t5.ROWS},
}
# Names of a component's tensors that its key map declares unused, None among them.
_RENAME: dict[str, Callable[[str], str | None]] = {"text_encoder": clip.rename, "text_encoder_2": t5.rename}
_WRAPPER = "base_model.model."  # PEFT's own name for the model it wraps, before or after a component's prefix
# prefix, component, modules are written with underscores; the first under which a name is known is taken
_PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("text_encoders.clip_l.transformer.", "text_encoder", False),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", False),
    ("text_encoder_2.", "text_encoder_2", False),
    ("text_encoder.", "text_encoder", False),
    ("lora_te1_", "text_encoder", True),
    ("lora_te3_", "text_encoder_2", True),
    ("lora_te2_", "text_encoder_2", True),
    ("lora_te_", "text_encoder", True),
    ("model.diffusion_model.", "transformer", False),
    ("diffusion_model.", "transformer", False),
    ("transformer.", "transformer", False),
    ("lora_unet_", "transformer", True),
    ("lora_transformer_", "transformer", True),
    ("lycoris_", "transformer", True),
    ("", "transformer", False),
    ("", "text_encoder", False),
    ("", "text_encoder_2", False),
)


@dataclass(frozen=True)
class Module:
    """A module as a file names it.

    Attributes:
        component: the component it belongs to.
        name: its name there without prefixes, as the file spells it.
        source: its name in the key map.
        index: its layer; 0 where there is only one.
        weight, bias: rows of the key map; None where it has no such parameter.
    """

    component: str
    name: str
    source: str
    index: int
    weight: Row | None
    bias: Row | None

    @property
    def key(self) -> tuple[str, str, int]:
        """Equal for all spellings of one module of one layout."""
        return self.component, self.source, self.index

    @property
    def is_linear(self) -> bool:
        """Whether low-rank factors can change it."""
        return self.weight is not None and "transpose" in self.weight.ops


@cache
def _patterns(component: str, underscored: bool) -> tuple[tuple[re.Pattern[str], str, dict[str, Row]], ...]:
    """(spelling, name in the key map, rows by role) of every module of a component."""
    compiled = []
    for rows in TABLES[component].values():
        modules: dict[str, dict[str, Row]] = {}
        for row in rows:
            module, _, role = row.source.rpartition(".")
            modules.setdefault(module, {})["bias" if role == "bias" else "weight"] = row
        for module, roles in modules.items():
            spelled = module.replace(".", "_") if underscored else module
            pattern = re.escape(spelled).replace(re.escape("{i}"), r"(\d{1,4})")
            compiled.append((re.compile(pattern, re.ASCII), module, roles))
    return tuple(compiled)


def _readings(stem: str) -> Iterator[tuple[str, str, bool]]:
    """(component, name without prefixes, underscored) for every prefix a name begins with."""
    stem = stem.removeprefix(_WRAPPER)
    for prefix, component, underscored in _PREFIXES:
        if stem.startswith(prefix):
            yield component, stem.removeprefix(prefix).removeprefix(_WRAPPER), underscored


def resolve(stem: str) -> Module | None:
    """The module that a name stands for in any dialect; None if it is none of FLUX.1's."""
    for component, name, underscored in _readings(stem):
        plain = name
        if component == "text_encoder":
            plain = name.removeprefix("text_model_" if underscored else "text_model.")
        if underscored:
            plain = plain.removesuffix("_")  # some trainers end every module's name so
        for pattern, source, roles in _patterns(component, underscored):
            if match := pattern.fullmatch(plain):
                index = int(match[1]) if match.groups() else 0
                return Module(component, name, source, index, roles.get("weight"), roles.get("bias"))
    return None


def is_unused(stem: str) -> bool:
    """Whether a name is of a module that its component has but the pipeline does not use (CLIP's projection)."""
    for component, name, underscored in _readings(stem):
        rename = _RENAME.get(component)
        prefixed = name != stem.removeprefix(_WRAPPER)  # without a prefix nothing says that it is this component's
        if prefixed and rename is not None and not underscored and rename(f"{name}.weight") is None:
            return True
    return False


def slots(row: Row, index: int) -> list[Slot]:
    """The parameters that a row fills in a layer."""
    targets = (row.targets,) if isinstance(row.targets, str) else row.targets
    return [Slot(t.replace("[{i}]", ""), index if "[{i}]" in t else None) for t in targets]


def sizes(row: Row, inputs: int, outputs: int) -> Sequence[int]:
    """Rows of each part of a fused module; the model's width is its input's."""
    if not row.sizes:
        return [outputs]
    return [evaluate(size, {"width": inputs, "mlp": outputs - 3 * inputs}) for size in row.sizes]
