"""Merging: what several LoRAs make of one parameter, and what fits nothing."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.__main__ import main
from converters.convert import convert
from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.lora import Factors, Lora, express

WIDTH = 48
NORM = "transformer_blocks.0.attn.norm_q.weight"


@pytest.fixture
def base(tmp_path, tiny):
    return tiny.component(tmp_path / "base", "transformer", dtype=np.float32)


def merged(base, out, *loras, **options):
    convert(base, out, to="diffusers", loras=[str(lora) for lora in loras], verify="exact", progress=False, **options)
    return load_file(next(out.glob("*.safetensors")))


def norms(path, value):
    save_file({f"transformer.{NORM}": np.full(16, value, np.float32)}, path)
    return path


def test_loras_that_replace_one_norm_do_so_in_any_order(tmp_path, base):
    paths = [norms(tmp_path / name, value) for name, value in (("a", 3.0), ("b", -1.5), ("c", 0.1))]
    asked = [f"{path}:{weight}" for path, weight in zip(paths, (0.5, 0.7, 0.9), strict=True)]
    before = load_file(next(base.glob("*.safetensors")))[NORM].astype(np.float64)
    results = [
        merged(base, tmp_path / f"out{number}", *order)[NORM]
        for number, order in enumerate(itertools.permutations(asked))
    ]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    # each is the change "towards its values by its weight", and changes are added up
    expected = before + sum(w * (v - before) for v, w in ((3.0, 0.5), (-1.5, 0.7), (np.float32(0.1), 0.9)))
    np.testing.assert_allclose(results[0], expected, atol=1e-6)


def test_one_that_replaces_gives_its_own_bits(tmp_path, base):
    assert np.array_equal(merged(base, tmp_path / "out", norms(tmp_path / "a", 0.1))[NORM], np.full(16, 0.1, "f4"))


def test_differences_are_added_by_weight(tmp_path, base):
    rng = np.random.default_rng(0)
    bias, norm = rng.standard_normal(3 * WIDTH).astype(np.float32), rng.standard_normal(16).astype(np.float32)
    final = rng.standard_normal(2 * WIDTH).astype(np.float32)
    stem = "diffusion_model.double_blocks.0.img_attn."
    save_file(
        {f"{stem}qkv.diff_b": bias, f"{stem}norm.query_norm.diff": norm,
         "diffusion_model.final_layer.adaLN_modulation.1.diff_b": final},
        tmp_path / "x",
    )  # fmt: skip
    before, after = load_file(next(base.glob("*.safetensors"))), merged(base, tmp_path / "out", f"{tmp_path / 'x'}:0.5")
    expected = {NORM: norm, "norm_out.linear.bias": np.roll(final, WIDTH)}  # (scale, shift) in diffusers
    expected |= {f"transformer_blocks.0.attn.to_{p}.bias": bias[i * WIDTH :][:WIDTH] for i, p in enumerate("qkv")}
    for name, value in before.items():
        wanted = value + 0.5 * expected[name] if name in expected else value
        np.testing.assert_allclose(after[name], wanted, atol=1e-6, err_msg=name)


# -- what fits nothing ---------------------------------------------------------------------------------------------


def factors(inputs, outputs):
    return Factors(np.ones((2, inputs), np.float32), np.ones((outputs, 2), np.float32))


def write(path, extra):
    fits = {Slot("single.attention.query.kernel", 0): factors(WIDTH, WIDTH)}
    lora = Lora(
        {"transformer": fits | extra.get("transformer", {}), **{k: v for k, v in extra.items() if k != "transformer"}}
    )
    save_file(express(lora, "diffusers"), path)
    return path


EXTRA = {
    "a text encoder": (
        {"text_encoder": {Slot("blocks.query.kernel", 1): factors(64, 64)}},
        "text_encoder: blocks.query.kernel.1",
    ),
    "a block": (
        {"transformer": {Slot("single.attention.key.kernel", 9): factors(WIDTH, WIDTH)}},
        "transformer: single.attention.key.kernel.9",
    ),
}


@pytest.mark.parametrize(("extra", "name"), EXTRA.values(), ids=EXTRA)
def test_what_the_checkpoint_lacks_can_be_left_out(tmp_path, base, extra, name, capsys):
    path = write(tmp_path / "x", extra)
    with pytest.raises(CheckpointError, match="does not fit"):
        merged(base, tmp_path / "never", path)
    plain, left = merged(base, tmp_path / "plain", write(tmp_path / "y", {})), tmp_path / "left"
    arguments = ["convert", str(base), str(left), "--to", "diffusers", "--lora", str(path), "--ignore-unknown"]
    assert main(arguments) == 0
    assert f"without 1 changes that fit nothing ({name}" in capsys.readouterr().out
    after = load_file(next(left.glob("*.safetensors")))
    assert after.keys() == plain.keys()
    assert all(np.array_equal(after[key], value) for key, value in plain.items())


def test_nothing_left_and_wrong_shapes_are_errors(tmp_path, base):
    text = Lora({"text_encoder": {Slot("blocks.query.kernel", 1): factors(64, 64)}})
    save_file(express(text, "diffusers"), tmp_path / "text")
    with pytest.raises(CheckpointError, match=r"text: nothing in it fits .*text_encoder: blocks\.query\.kernel\.1"):
        merged(base, tmp_path / "out", tmp_path / "text", ignore_unknown=True)
    wide = write(tmp_path / "wide", {"transformer": {Slot("image_embed.kernel"): factors(32, WIDTH)}})
    with pytest.raises(CheckpointError, match=r"is \(16, 48\), the LoRA is for \(32, 48\)"):
        merged(base, tmp_path / "out", wide, ignore_unknown=True)
