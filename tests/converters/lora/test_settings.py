"""The scale of a LoRA by PEFT's settings, wherever they stand, and settings under which it is no plain LoRA."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.lora import read_lora

WIDTH = 48
ATTENTION = {  # module -> the parameter it changes
    "transformer_blocks.0.attn.to_q": Slot("double.image.attention.query.kernel", 0),
    "transformer_blocks.1.attn.to_q": Slot("double.image.attention.query.kernel", 1),
    "transformer_blocks.0.attn.add_q_proj": Slot("double.text.attention.query.kernel", 0),
    "transformer_blocks.0.ff.net.0.proj": Slot("double.image.mlp_in.kernel", 0),
    "single_transformer_blocks.0.attn.to_q": Slot("single.attention.query.kernel", 0),
}
RANKS = dict(zip(ATTENTION, (2, 4, 2, 3, 8), strict=True))
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "init_lora_weights": True, "use_dora": False}


def tensors(prefix="base_model.model."):
    rng = np.random.default_rng(0)
    found = {}
    for module, rank in RANKS.items():
        rows = 4 * WIDTH if "ff" in module else WIDTH
        found[f"{prefix}{module}.lora_A.weight"] = rng.standard_normal((rank, WIDTH)).astype(np.float32)
        found[f"{prefix}{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    return found


def adapter_folder(folder, settings, name="adapter_model.safetensors", prefix="base_model.model."):
    folder.mkdir()
    save_file(tensors(prefix), folder / name)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | settings))
    return folder


def scales(lora):
    found = lora.factors["transformer"]
    return {module: found[slot].scale for module, slot in ATTENTION.items()}


def by_hand(alphas, default=8.0, root=False):
    return {m: alphas.get(m, default) / (np.sqrt(rank) if root else rank) for m, rank in RANKS.items()}


PATTERNS = {
    # PEFT's rule: a key is a regular expression for the end of the name, from its beginning or a dot on.
    "end of a part": ({"proj": 16}, {"transformer_blocks.0.ff.net.0.proj": 16}),
    "anchored": ({"^transformer_blocks.0.attn.to_q": 16}, {"transformer_blocks.0.attn.to_q": 16}),
    "whole name": ({"transformer_blocks.1.attn.to_q": 32}, {"transformer_blocks.1.attn.to_q": 32}),
    "part of several": (
        {"attn.to_q": 4},
        {m: 4 for m in ATTENTION if m.endswith("attn.to_q")},
    ),
    "expression": (
        {r"transformer_blocks\.\d+\.attn\.to_q": 4},
        {"transformer_blocks.0.attn.to_q": 4, "transformer_blocks.1.attn.to_q": 4},
    ),
    "alternatives": (
        {"to_q|add_q_proj": 4},
        {m: 4 for m in ATTENTION if m.endswith(("to_q", "add_q_proj"))},
    ),
    "first wins": (
        {"transformer_blocks.0.attn.to_q": 2, "to_q": 6},
        {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.1.attn.to_q": 6,
         "single_transformer_blocks.0.attn.to_q": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "alphas"), PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("home", ["folder", "file", "header", "prefixed header", "entries"])
def test_alpha_pattern_is_matched_as_peft_does(tmp_path, pattern, alphas, home):
    settings = {"alpha_pattern": pattern}
    if home in ("folder", "file"):
        path = adapter_folder(tmp_path / "adapter", settings)
        path = path / "adapter_model.safetensors" if home == "file" else path
    else:
        path, values = tmp_path / "style.safetensors", {"lora_alpha": 8, "r": 2, **settings}
        if home == "entries":
            header = {name: json.dumps(value) for name, value in values.items()}
        else:
            prefix = "transformer." if home == "prefixed header" else ""
            header = {"lora_adapter_metadata": json.dumps({prefix + name: value for name, value in values.items()})}
        save_file(tensors("transformer."), path, metadata=header)
    assert scales(read_lora(path)) == pytest.approx(by_hand(alphas))


def test_the_change_by_hand_in_float64(tmp_path):
    path = adapter_folder(tmp_path / "adapter", {"alpha_pattern": {"proj": 16}, "use_rslora": True})
    found = read_lora(path / "adapter_model.safetensors").deltas()
    for module, scale in by_hand({"transformer_blocks.0.ff.net.0.proj": 16}, root=True).items():
        a, b = (tensors()[f"base_model.model.{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        got = found["transformer", ATTENTION[module]]
        np.testing.assert_allclose(got, scale * (b @ a), rtol=1e-5, atol=1e-5)


def test_settings_beside_a_file_of_another_name(tmp_path):
    path = adapter_folder(tmp_path / "alone", {}, "style.safetensors") / "style.safetensors"
    assert scales(read_lora(path)) == pytest.approx(by_hand({}))
    folder = adapter_folder(tmp_path / "two", {})
    save_file(tensors(), folder / "other.safetensors")
    assert set(scales(read_lora(folder / "other.safetensors")).values()) == {1.0}  # the settings are the first file's


def test_a_folder_of_diffusers(tmp_path):
    (tmp_path / "lora").mkdir()
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})}
    save_file(tensors("transformer."), tmp_path / "lora" / "pytorch_lora_weights.safetensors", metadata=header)
    assert scales(read_lora(tmp_path / "lora")) == pytest.approx(by_hand({}))
    save_file(tensors(), tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"could all be meant; give one of the files"):
        read_lora(tmp_path / "lora")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), r"no LoRA in it; expected adapter_model\.safetensors"),
        (("a.safetensors", "b.safetensors"), r"a\.safetensors, b\.safetensors could all be meant"),
        (("pytorch_lora_weights.bin",), r"only pickled weights \(pytorch_lora_weights\.bin\)"),
    ],
)
def test_folders_that_are_none(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path))}: {words}"):
        read_lora(tmp_path)


UNUSED = {
    "a pattern of no module": ({}, {"lora_alpha": 8, "alpha_pattern": {"to_v": 4}}, "alpha_pattern 'to_v'"),
    "a pattern with prefixes": ({}, {"lora_alpha": 8, "alpha_pattern": {"transformer.x_embedder": 4}}, "x_embedder"),
    "another component": ({}, {"text_encoder.lora_alpha": 4, "transformer.lora_alpha": 8}, "lora_alpha 4"),
    "an unknown component": ({}, {"unet.lora_alpha": 4}, "unet.lora_alpha 4 is of no component"),
    "of the network": ({"ss_network_alpha": "4", "ss_network_dim": "16"}, {}, "ss_network_alpha is 4"),
    "of the network, no rank": ({"network_alpha": "4.0"}, {}, "network_alpha is 4"),
    "garbled": ({"lora_adapter_metadata": "{"}, {}, "lora_adapter_metadata is no JSON object"),
}


@pytest.mark.parametrize(("header", "settings", "words"), UNUSED.values(), ids=UNUSED)
def test_an_alpha_that_is_not_used_is_an_error(tmp_path, header, settings, words):
    if settings:
        header = header | {"lora_adapter_metadata": json.dumps(settings)}
    save_file(tensors("transformer."), tmp_path / "x", metadata=header)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'x'))}.*{re.escape(words)}"):
        read_lora(tmp_path / "x")
    if words != UNUSED["garbled"][2]:
        expected = by_hand({}) if "lora_alpha" in settings or "transformer.lora_alpha" in settings else by_hand(RANKS)
        assert scales(read_lora(tmp_path / "x", ignore_unknown=True)) == pytest.approx(expected)


def test_alpha_of_the_network_that_changes_nothing(tmp_path):
    """Every module has its own alpha, or the network's alpha is its rank."""
    owned = tensors("transformer.") | {f"transformer.{m}.alpha": np.array(1, np.float32) for m in RANKS}
    save_file(owned, tmp_path / "x", metadata={"ss_network_alpha": "1", "ss_network_dim": "16"})
    assert scales(read_lora(tmp_path / "x")) == pytest.approx(by_hand({}, 1))
    save_file(tensors("transformer."), tmp_path / "y", metadata={"ss_network_alpha": "16", "ss_network_dim": "16.0"})
    assert set(scales(read_lora(tmp_path / "y")).values()) == {1.0}


def test_contradictions(tmp_path):
    owned = tensors("transformer.") | {f"transformer.{m}.alpha": np.array(1, np.float32) for m in RANKS}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    save_file(owned, tmp_path / "x", metadata=header)
    with pytest.raises(CheckpointError, match=r"scaled by 0\.125 according to its alpha, by 1 according to the"):
        read_lora(tmp_path / "x")
    folder = adapter_folder(tmp_path / "adapter", {"lora_alpha": 4})
    save_file(tensors(), folder / "adapter_model.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=r"according to adapter_config\.json"):
        read_lora(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": "x"}, {"lora_alpha": [1]}, {"lora_alpha": 1e999}, {"lora_alpha": True}, {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}}, {"alpha_pattern": {"(a+)+b": 1}}, {"alpha_pattern": {".*.*.*.*x": 1}},
        {"alpha_pattern": {f"a{i}": 1 for i in range(2000)}}, {"alpha_pattern": {"to_q": None, "x" * 600: 2}},
    ],
)  # fmt: skip
def test_garbled_settings(tmp_path, settings):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "adapter"))):
        read_lora(adapter_folder(tmp_path / "adapter", settings))


METHODS = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "started with 'pissa'"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "started with 'pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "started with 'olora'"),
    "CorDA": ({"init_lora_weights": "corda"}, "started with 'corda'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "started with 'loftq'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "started with 'lora_ga'"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "DoRA as text": ({"use_dora": "True"}, "DoRA"),
    "QA-LoRA": ({"use_qalora": True}, "QA-LoRA"),
    "repeated layers": ({"layer_replication": [[0, 4], [2, 5]]}, "repeated layers"),
    "LoHa": ({"peft_type": "LOHA"}, "LOHA"),
}


@pytest.mark.parametrize(("settings", "words"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("home", ["beside", "header", "prefixed", "entries", "nested"])
def test_other_methods_are_refused_by_name_wherever_it_is_written(tmp_path, settings, words, home):
    if home == "beside":
        path = adapter_folder(tmp_path / "adapter", settings) / "adapter_model.safetensors"
    else:
        path = tmp_path / "x.safetensors"
        header = {
            "header": {"lora_adapter_metadata": json.dumps(settings)},
            "prefixed": {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})},
            "entries": {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()},
            "nested": {"training": json.dumps({"network": settings})},
        }[home]
        save_file(tensors("transformer."), path, metadata=header)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{words}"):
        read_lora(path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_as_it_is(tmp_path, start):
    assert scales(read_lora(adapter_folder(tmp_path / "adapter", {"init_lora_weights": start}))) == by_hand({})


def test_lycoris_says_dora_in_its_arguments(tmp_path):
    arguments = {"ss_network_args": json.dumps({"algo": "locon", "dora_wd": "True"})}
    save_file(tensors("transformer."), tmp_path / "x", metadata=arguments)
    with pytest.raises(CheckpointError, match=r"DoRA \(dora_wd in the header's 'ss_network_args'\)"):
        read_lora(tmp_path / "x")
