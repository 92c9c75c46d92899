"""FLUX.1-dev planned for hardware nobody here owns: what compiles, what it takes, and what planning takes."""

import json
import subprocess
import sys

import pytest

from sega_jax.costs import topologies
from sega_jax.costs.report import plan

pytestmark = pytest.mark.aot
MATRIX = {
    "v5p:2x2x1": ((6144, 6144), True),
    "v6e:2x4": ((6144, 6144), True),
    "h200:1": ((6144, 6144), True),
    "h100:8": ((6144, 6144), True),
}


def needs(target: str) -> None:
    if lacking := topologies.missing(target):
        pytest.skip(lacking)


@pytest.mark.parametrize(("target", "kernel"), [("v6e:2x2", "tpu"), ("h200:1", "hopper")])
def test_nano_compiles_with_our_kernel(target, kernel):
    """The whole path at the size of the demo, whose heads are those of FLUX.1."""
    needs(target)
    report = plan("nano", size=(256, 256), target=target, positional="sega")
    assert report["compiled"]
    assert report["fits"]
    assert report["kernel"] == kernel
    encode, step, decode = report["programs"]
    assert step["seconds"] > 0
    assert step["peak"] > step["parameters"] > 0
    assert sum(step["collectives"].values()) > 0 or report["devices"] == 1
    assert encode["failure"] is decode["failure"] is None


@pytest.mark.slow
@pytest.mark.parametrize("target", MATRIX)
def test_flux_dev_at_36_megapixels(target):
    needs(target)
    size, expected = MATRIX[target]
    # a process of its own, whose greatest memory is the plan's
    arguments = ["--model", "flux-dev", "--size", "x".join(map(str, size)), "--target", target, "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "sega_jax.cli", "plan", *arguments], capture_output=True, text=True, check=True
    )
    report = json.loads(run.stdout)
    print(report["peak"] / 1e9, report["host"])
    assert report["compiled"]
    assert report["fits"] == expected
    step = report["programs"][1]
    assert step["flops"] * report["devices"] == pytest.approx(17.25e15, rel=0.03)
    if report["devices"] > 1:
        # the closed form of `sega_jax.costs.closed_form`
        assert sum(step["collectives"].values()) == pytest.approx(step["sent"], rel=0.2)
    assert report["host"]["peak_bytes"] < 4e9
