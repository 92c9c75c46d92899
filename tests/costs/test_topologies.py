"""Names of accelerators: what is refused and what is said; `tests/aot/test_topologies.py` compiles for them."""

import importlib.util
import re

import pytest

from sega_jax.costs import topologies


@pytest.mark.parametrize("target", ["v9:2x2", "h100", "h100:0x", "v5p:", "h100:2x2x2x2", "H100:1"])
def test_unknown_targets_are_refused(target):
    with pytest.raises(ValueError, match=r"expected a chip of v5e, v5p, v6e, tpu7x, h100, h200 with its arrangement"):
        topologies.devices(target)


def test_capacities_by_chip_and_by_target():
    assert topologies.capacity("h200") is topologies.capacity("h200:8")
    with pytest.raises(ValueError, match="'v9:1'"):
        topologies.capacity("v9")
    # one device of a chip of two
    assert topologies.capacity("tpu7x").flops == 2_307e12 / 2


@pytest.mark.parametrize(("target", "package"), [("v5p:2x2x1", "libtpu"), ("h100:1", "CUDA plugin.*aot-gpu")])
def test_what_is_missing_is_named(target, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert re.search(package, topologies.missing(target))
    with pytest.raises(ModuleNotFoundError, match=package):
        topologies.devices(target)


@pytest.mark.parametrize("target", ["h100:12", "h100:0", "h100:2x4"])
def test_gpus_fill_their_hosts(target, monkeypatch):
    monkeypatch.setattr(topologies, "missing", lambda target: None)
    with pytest.raises(ValueError, match="above 8 a multiple"):
        topologies.devices(target)
