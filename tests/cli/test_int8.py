"""--weights of the command line."""

import json
import sys

import numpy as np
import pytest

from tests.cli.helpers import PROMPT, QUICK, nothing_is_loaded, pixels


def test_a_picture_is_repeated_with_its_weights(run, make, model):
    made = make("--weights", "int8")
    assert made["images"][0]["record"]["weights"] == "int8"
    code, out, err = run("generate", "--from-image", "out.png", "--out", "again.png", "--json")
    assert code == 0, err
    assert json.loads(out)["images"][0]["record"]["weights"] == "int8"
    np.testing.assert_array_equal(pixels("again.png"), pixels("out.png"))
    code, out, err = run("generate", "--from-image", "out.png", "--out", "full.png", "--weights", "full", "--json")
    assert code == 0, err
    assert "weights" not in json.loads(out)["images"][0]["record"]
    assert np.abs(pixels("full.png").astype(int) - pixels("out.png")).max() > 0
    assert "weights" in run("generate", PROMPT, *QUICK, "--model", model)[2]  # out.png is of another request


def test_they_are_planned_and_said(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    code, out, _ = run("generate", PROMPT, "--size", "64", "--weights", "int8", "--dry-run")
    assert code == 0
    assert ", int8 weights, attention auto" in out
    code, out, _ = run("plan", "--model", "flux-dev", "--target", "h200:1", "--weights", "int8", "--compile", "no")
    assert code == 0
    assert "bfloat16, int8 weights" in out
    assert any(line.split()[:2] == ["denoise", "11.98"] for line in out.splitlines())


@pytest.mark.parametrize("words", [("generate", PROMPT), ("plan",)])
def test_refusals(run, monkeypatch, words):
    nothing_is_loaded(monkeypatch)
    assert run(*words, "--weights", "int4")[0] == 2
    monkeypatch.setitem(sys.modules, "qwix", None)
    code, _, err = run(*words, "--weights", "int8")
    assert code == 2
    assert "pip install 'sega-jax[quant]'" in err
