"""The verbs beside `generate`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import sega_jax as sj
from sega_jax.attention.kernels.cpu import toolchain
from tests.cli.helpers import PROMPT, files, nothing_is_loaded, refused


def test_dry_run_plans_without_weights(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    words = ("generate", PROMPT, "--size", "1024x512", "--dry-run")
    code, out, _ = run(*words)
    assert code == 0
    assert "1024x512: positional pi()+sega_magnitude() (auto), mu 1.15 (clamp), 20 steps" in out
    assert "source: nano model card (20 steps); beyond the trained grid: PI" in out
    assert "64 x 32 tokens, 5.33333 x 2.66667 of the trained sides" in out
    plan = json.loads(run(*words, "--json", "--mu", "native")[1])["plans"][0]
    assert plan["record"]["mu"] == "native"
    assert plan["mu_value"] == pytest.approx(0.5 + 0.65 * (2048 - 64) / (144 - 64))
    assert files() == []


def test_inspect(run, make):
    make()
    code, out, _ = run("inspect", "out.png")
    assert code == 0
    assert "PNG image, 64x64" in out
    report = json.loads(run("inspect", "out.png", "--json")[1])
    assert report["ok"]
    assert "sega_jax" in report["metadata"]
    assert "nothing: no such file or folder" in refused(run("inspect", "nothing"))


def test_methods(run):
    code, out, _ = run("methods")
    assert code == 0
    told = " ".join(out.split())  # a line may end between two words
    for words in ("sega-release", "dype-yarn", "arXiv:2510.20766", "patent pending", "licence"):
        assert words in told
    assert run("methods", "ntk")[1].startswith("ntk ")
    assert "dype" not in run("methods", "ntk")[1]
    assert run("methods", "yarn", "--bibtex")[1].count("@article{") == 2
    code, _, err = run("methods", "bogus")
    assert code == 2
    assert "unknown method 'bogus'; known: none, pi" in err


def test_doctor(run, monkeypatch):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    compiled = toolchain.attention()[1] is None
    assert findings["attention"]["value"]["kernel"] == ("cpu" if compiled else "xla")
    assert findings["devices"]["value"][0]["platform"] == "cpu"
    assert findings["packages"]["value"]["jax"] == jax.__version__
    assert findings["hub"]["value"]["offline"]
    assert all(finding["state"] != "broken" for finding in findings.values())

    monkeypatch.setattr("sega_jax.weights.hub.resolve", lambda _model: Path("nowhere"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "! demo model" in out
    assert "-> reinstall sega-jax" in out
    assert out.splitlines()[-1] == "1 broken"


def test_import_is_light():
    code = "import sega_jax.cli, sys; sys.exit(bool({'tyro', 'jax', 'flax', 'huggingface_hub'} & set(sys.modules)))"
    root = str(Path(sj.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}).returncode == 0
