"""Defaults per checkpoint and size: the guidance each is published with, and what ``auto`` means."""

import json
import shutil

import pytest

from sega_jax import positional as pe
from sega_jax.families.flux import PRESETS, outline_flux
from sega_jax.families.recipes import guided_recipe, recipe
from sega_jax.geometry import RopeSpec
from sega_jax.pipeline.planning import plan
from sega_jax.weights.hub import resolve

NANO = {"guidance_embeds": False, "dynamic_shift": True, "text_width": 128}
DEV = {"guidance_embeds": True, "dynamic_shift": True, "text_width": 4096}


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a folder of configurations, nano's with a guidance input, under a path of one's own."""

    def make(where, said=None):
        folder = tmp_path / where
        shutil.copytree(resolve("nano"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "transformer" / "config.json").read_text())
        config |= {"guidance_embeds": True} | ({} if said is None else {"_name_or_path": said})
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    ("where", "said", "guidance"),
    [
        ("FLUX.1-dev", None, 3.5),
        ("FLUX.1-Krea-dev", None, 4.5),
        ("flux1_krea_dev", None, 4.5),
        ("mine", "black-forest-labs/FLUX.1-Krea-dev", 4.5),
        ("krea/mine", None, 3.5),
        ("models--black-forest-labs--FLUX.1-Krea-dev/snapshots/0123abcd", None, 4.5),
        ("models--black-forest-labs--FLUX.1-dev/snapshots/0123abcd", None, 3.5),
    ],
)
def test_guidance_by_checkpoint(checkpoint, where, said, guidance):
    made = plan(outline_flux(checkpoint(where, said)), "x", width=64, height=64)
    assert made.guidance == guidance
    assert ("Krea" in made.recipe) == (guidance == 4.5)
    assert plan(outline_flux(checkpoint(f"{where}-2", said)), "x", guidance=2).guidance == 2


def test_another_transformer_decides(checkpoint):
    dev, krea = checkpoint("FLUX.1-dev"), checkpoint("FLUX.1-Krea-dev")
    assert outline_flux(dev, krea / "transformer").guidance == 4.5
    assert outline_flux(krea, dev / "transformer").guidance == 3.5


def test_presets():
    guidances = {name: plan(PRESETS[f"flux-{name}"](), "x").guidance for name in ("dev", "krea-dev", "schnell")}
    assert guidances == {"dev": 3.5, "krea-dev": 4.5, "schnell": None}


def grid(side, trained):
    return RopeSpec(trained=(trained, trained)).grid(side, side, 16)


def test_auto_is_plain_up_to_the_trained_size():
    assert recipe(grid(12, 12), **NANO).positional == "none"
    assert recipe(grid(64, 64), **DEV).positional == "none"


def test_auto_beyond_it_is_what_draws_most_pictures_right():
    known = recipe(grid(24, 12), **NANO)
    assert pe.parse(known.positional) == pe.chain(pe.pi(), pe.sega_magnitude())
    assert recipe(grid(128, 64), **DEV).positional == "yarn"


def test_scale_dit_keeps_the_method_its_lora_was_trained_with():
    beyond, native = recipe(grid(24, 12), **NANO), recipe(grid(12, 12), **NANO)
    assert guided_recipe(beyond, 1.0, nano=True).positional == "pi"
    assert guided_recipe(native, 1.0, nano=True).positional == "none"
    assert guided_recipe(beyond, 1.0, nano=True, positional="ntk").positional == "ntk"
    assert guided_recipe(recipe(grid(128, 64), **DEV), 1.0, nano=False).positional == "rebase(factor=10.0)"
