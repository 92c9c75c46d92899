"""The benchmark of a step runs whole: ours, the plan, and diffusers' transformer of the same configuration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sega_jax.families.registry import skeleton

pytestmark = pytest.mark.parity
pytest.importorskip("diffusers")
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_step.py"


def test_nano_against_its_plan_and_diffusers(tmp_path):
    out = tmp_path / "step.json"
    arguments = ["--model", "nano", "--sizes", "64", "--rounds", "1", "--positional", "sega", "--json", str(out)]
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("64²: ")
    assert "the speed of diffusers" in run.stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert not any("error" in row[name] or "missing" in row[name] for name in ("ours", "planned", "theirs"))
    parts = skeleton("nano")
    tokens, text = 16, parts.text_tokens
    blocks = parts.transformer_config.step_flops(tokens, text, (tokens + text) ** 2)
    assert row["planned"]["flops"] == pytest.approx(blocks, rel=0.1)  # embeddings and SEGA's spectrum come on top


def test_what_fails_is_said(tmp_path):
    arguments = ["--model", "nano", "--sizes", "72", "--rounds", "1"]
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    assert "72" in run.stdout
    assert "multiple of" in run.stdout
