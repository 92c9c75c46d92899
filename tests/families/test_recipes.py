"""Defaults per checkpoint: the guidance each is published with."""

import json
import shutil

import pytest

from sega_jax.families.flux import PRESETS, outline_flux
from sega_jax.pipeline.planning import plan
from sega_jax.weights.hub import resolve


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
