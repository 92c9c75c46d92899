"""What a LoRA says about its own training: PEFT's settings, beside the file or in its header.

The scale of a module without an alpha tensor follows from them as PEFT computes it (``LoraLayer.update_layer`` and
``get_pattern_key`` of peft 0.21): ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` with ``use_rslora``
(Kalajdzievski, arXiv 2312.03732), where the first entry of ``alpha_pattern`` that matches the end of the module's name,
from the beginning or from a dot on, gives ``lora_alpha``.  Settings under which the factors are not a plain change of
the base model are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from converters.errors import CheckpointError

COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
ADAPTER_KEY = "lora_adapter_metadata"  # of a header: where diffusers puts PEFT's settings, by component
_ALPHAS = ("lora_alpha", "alpha_pattern")
# alpha and rank of the whole network in headers of kohya's kind, whose files say each module's alpha as well
_NETWORK = (("ss_network_alpha", "ss_network_dim"), ("network_alpha", "network_dim"), ("alpha", "rank"))
_SOUND_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # the base stays as it is
_METHODS = {  # settings that say, when they are set, that the factors are no plain LoRA
    "use_dora": "DoRA",
    "dora_wd": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "a LoRA of a model with repeated layers",
    "trainable_token_indices": "a LoRA that also trains tokens",
}
_MOST_PATTERNS = 1000
_MOST_OPEN = 32  # patterns with repetitions, each at most twice: what can be matched in no time
_PATTERN_LENGTH = 500


@dataclass(frozen=True)
class _Record:
    """PEFT's settings of one component, or of every component (None), and the place they were found in."""

    component: str | None
    values: Mapping[str, Any]
    place: str
    patterns: tuple[tuple[str, re.Pattern[str], Any], ...]


@dataclass
class Settings:
    """All settings of a LoRA.

    Attributes:
        where: the file, for messages.
        records: in the order they were found.
        network: (entry of the header, alpha, rank) of the whole network, if the header states an alpha so; the rank is
            None where it does not say.
    """

    where: str
    records: tuple[_Record, ...] = ()
    network: tuple[str, float, float | None] | None = None
    _used: set[tuple[int, str | None]] = field(default_factory=set)

    def scale(self, component: str, name: str, rank: int, own: float | None) -> float:
        """``alpha / rank`` of a module: from its own alpha, else from the settings, else 1.

        Args:
            component: the module's component.
            name: the module's name in it, without prefixes.
            rank: of its factors.
            own: its own alpha, if the file has one.

        Raises:
            CheckpointError: settings that contradict each other or the alpha, or that are garbled.
        """
        found: list[tuple[float, str]] = [] if own is None else [(own / rank, "its alpha")]
        for number, record in enumerate(self.records):
            if record.component in (None, component):
                scale = self._stated(number, record, name, rank)
                if scale is not None:
                    found.append((scale, record.place))
        for scale, place in found[1:]:
            if not math.isclose(scale, found[0][0], rel_tol=2**-7):  # an alpha may be stored in bfloat16
                raise CheckpointError(
                    f"{self.where}: {name}: scaled by {found[0][0]:g} according to {found[0][1]}, by {scale:g} "
                    f"according to {place}; remove the settings that are wrong"
                )
        if found:
            return found[0][0]
        if self.network is not None:
            entry, alpha, stated = self.network
            if alpha != (rank if stated is None else stated):
                raise CheckpointError(
                    f"{self.where}: {name} of rank {rank} has no alpha, but the header's {entry} is {alpha:g}; whether "
                    "the factors hold that scale already cannot be known: use the file as its trainer wrote it, or "
                    "--ignore-unknown to take the factors as they are"
                )
        return 1.0

    def _stated(self, number: int, record: _Record, name: str, rank: int) -> float | None:
        matching = [(key, value) for key, pattern, value in record.patterns if pattern.match(name)]
        self._used |= {(number, key) for key, _ in matching}
        alpha = matching[0][1] if matching else record.values.get("lora_alpha")
        if alpha is None:
            return None
        self._used.add((number, None))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.where}: {record.place}: lora_alpha {alpha!r:.80}; expected a finite number")
        return float(alpha) / (math.sqrt(rank) if _is_set(record.values.get("use_rslora")) else rank)

    def unused(self) -> list[str]:
        """Statements about alpha that no module of the file has asked for."""
        left = []
        for number, record in enumerate(self.records):
            asked = {key for used, key in self._used if used == number}
            left += [f"{record.place}: alpha_pattern {key!r:.80}" for key, _, _ in record.patterns if key not in asked]
            if "lora_alpha" in record.values and None not in asked:
                left.append(f"{record.place}: lora_alpha {record.values['lora_alpha']!r:.80}")
        return left


def _is_set(value: Any) -> bool:
    """Whether a setting is on; headers hold strings alone."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "false", "0", "none", "null", "[]", "{}")
    return bool(value)


def gather(adapter: Mapping[str, Any], header: Mapping[str, str], where: str, *, lenient: bool = False) -> Settings:
    """All settings of a LoRA.

    Args:
        adapter: PEFT's ``adapter_config.json``; empty where there is none.
        header: the string metadata of the file.
        where: the file, for messages.
        lenient: leave alpha records that name no component of FLUX.1 alone.

    Raises:
        CheckpointError: another method than LoRA, a start that changed the base model, garbled settings.
    """
    sources = [("adapter_config.json", dict(adapter))] if adapter else []
    objects = list(_objects(header))
    if ADAPTER_KEY in header and ADAPTER_KEY not in dict(objects):
        raise CheckpointError(f"{where}: the header's {ADAPTER_KEY} is no JSON object; the scale it states is lost")
    sources += [(f"the header's {name!r:.80}", value) for name, value in objects]
    records: list[_Record] = []
    for place, values in sources:
        _refuse_methods(values, place, where)
        records += _records(values, place, where, lenient)
    return Settings(where, tuple(records), None if lenient else _network(header))


def states_scale(name: str, text: str, of_network: bool = True) -> bool:
    """Whether an entry of a header states a scale, which may be false of factors written anew.

    Args:
        name, text: the entry.
        of_network: count the alpha of a whole network, which is true where every module has an alpha as well.
    """
    return (of_network and any(name in entries for entries in _NETWORK)) or any(
        key.rpartition(".")[2] in (*_ALPHAS, "use_rslora") for _, values in _objects({name: text}) for key in values
    )


def _objects(header: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects in a header, and the header's own entries as one."""
    plain = {}
    for name, text in header.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, dict) and name not in _ALPHAS:
            yield name, value
        else:
            plain[name] = value
    if plain:
        yield "entries", plain


def _records(values: Mapping[str, Any], place: str, where: str, lenient: bool) -> Iterator[_Record]:
    """The settings of each component, of which the keys may be prefixed with its name."""
    groups: dict[str | None, dict[str, Any]] = {}
    for key, value in values.items():
        prefix, _, name = key.rpartition(".")
        if name not in (*_ALPHAS, "use_rslora"):
            continue
        if prefix and prefix not in COMPONENTS:
            if name in _ALPHAS and not lenient:
                raise CheckpointError(
                    f"{where}: {place}: {key} {value!r:.80} is of no component of FLUX.1 "
                    f"({', '.join(COMPONENTS)}), and a scale would be lost; --ignore-unknown leaves it out"
                )
            continue
        groups.setdefault(prefix or None, {})[name] = value
    for component, found in groups.items():
        if found.keys() & set(_ALPHAS):
            yield _Record(component, found, place, _compiled(found.get("alpha_pattern"), place, where))


def _compiled(pattern: Any, place: str, where: str) -> tuple[tuple[str, re.Pattern[str], Any], ...]:
    """``alpha_pattern`` ready to be matched.  Its keys are regular expressions from a file, so they are kept simple."""
    if not pattern:
        return ()
    if not isinstance(pattern, dict) or len(pattern) > _MOST_PATTERNS:
        raise CheckpointError(f"{where}: {place}: alpha_pattern should be an object of names and numbers")
    result, repeating = [], 0
    for key, value in pattern.items():
        repetitions = len(re.findall(r"[*+{?]", key))
        repeating += repetitions > 0
        if len(key) > _PATTERN_LENGTH or repetitions > 2 or repeating > _MOST_OPEN or re.search(r"\)[*+{?]|\(\?", key):
            raise CheckpointError(
                f"{where}: {place}: alpha_pattern {key!r:.80} is too long or repeats too much to be matched safely; "
                "write the names of the modules out"
            )
        try:
            result.append((key, re.compile(rf"(.*\.)?({key})$"), value))
        except (re.error, OverflowError, RecursionError) as exc:
            raise CheckpointError(f"{where}: {place}: alpha_pattern {key!r:.80} is no pattern ({exc})") from exc
    return tuple(result)


def _network(header: Mapping[str, str]) -> tuple[str, float, float | None] | None:
    """The first alpha of the whole network that a header states as a number."""
    for entry, rank in _NETWORK:
        alpha, stated = _number(header.get(entry)), _number(header.get(rank))
        if alpha is not None:
            return entry, alpha, stated
    return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _refuse_methods(values: Mapping[str, Any], place: str, where: str) -> None:
    """Refuses, by name, settings under which the factors are not a plain change of the base model."""
    for key, value in _walk(values):
        name = key.rpartition(".")[2]
        if name in _METHODS and _is_set(value):
            raise CheckpointError(
                f"{where}: {_METHODS[name]} ({key} in {place}), not a plain LoRA; merge it with the tool that made it, "
                "or convert the merged checkpoint"
            )
        if name == "peft_type" and isinstance(value, str) and value.upper() not in ("LORA", ""):
            raise CheckpointError(
                f"{where}: {value:.40} (peft_type in {place}), not a LoRA; merge it with PEFT, or convert the merged "
                "checkpoint"
            )
        if name == "init_lora_weights" and not _sound_start(value):
            raise CheckpointError(
                f"{where}: a LoRA started with {value!r:.40} (init_lora_weights in {place}), which changed the base "
                "model too: its factors do not fit the published one. Save it again with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a plain LoRA, or "
                "convert the merged checkpoint"
            )


def _sound_start(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false", "none", *(s for s in _SOUND_STARTS if isinstance(s, str)))
    return value in _SOUND_STARTS


def _walk(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of settings, and of objects one level inside them."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, dict) and key.rpartition(".")[2] not in _METHODS:
            yield from value.items()
