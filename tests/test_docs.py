"""What the documentation shows is run, and what it lists is what there is."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sega_jax import positional as pe
from sega_jax.attention import kernels
from sega_jax.attention.bench import headlines, table
from sega_jax.cli import main
from sega_jax.nano import check
from sega_jax.weights.hub import resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_python_runs(tmp_path, monkeypatch):
    """All blocks share a namespace, as a reader pasting them in order would have it."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    with Image.open(tmp_path / "square.png") as picture:
        seen = check.read(np.asarray(picture.convert("RGB")))
    assert (seen.colour, seen.place, seen.background) == ("purple", "centre", "white")  # as the example asks


def test_readme_lists_every_preset():
    table = README.split("## Positional methods")[1].split("##")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) - {"auto"} >= set(pe.presets())


def test_committed_measurements_are_shown():
    reports = [json.loads(path.read_text()) for path in sorted(ROOT.glob("benchmarks/attention-*.json"))]
    assert reports
    assert table(reports) in (ROOT / "docs" / "attention.md").read_text()
    assert table(headlines(reports)) in README


def test_the_code_of_the_page_on_concepts_runs():
    """All blocks share a namespace; what is printed is what the text says of the example."""
    page = (ROOT / "docs" / "concepts.md").read_text()
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "concepts.md", "exec"), namespace)
    grid, ropes = namespace["grid"], namespace["ropes"]
    assert (grid.height, grid.width) == (4, 24)
    assert max(grid.stretch) > 1
    assert len(ropes["image"].magnitude) == len(grid.spec.dims)
    assert len(page.splitlines()) < 80


def test_the_page_on_attention_lists_every_kernel_and_its_code_runs(capsys):
    page = (ROOT / "docs" / "attention.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    built_in = [module.KERNEL.name for module in kernels.ORDER]
    assert listed == built_in
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "attention.md", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told][: len(listed)] == listed


def test_the_code_of_the_page_on_generating_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "generate.md").read_text(), re.DOTALL)
    exec(compile(block, "generate.md", "exec"), {})


def test_the_commands_of_the_page_on_generating_are_understood(tmp_path, monkeypatch, capsys):
    """Planned, with pictures of those names there."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "mask.png"):
        Image.new("RGB", (64, 64), (255, 255, 255)).save(name)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    block = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "generate.md").read_text(), re.DOTALL)[0]
    for line in block.splitlines():
        command, *words = shlex.split(line, comments=True)
        assert command == "sega-jax"
        assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err


def test_readme_has_exactly_two_set_up_commands():
    section = README.split("## Set up")[1].split("`nano` knows")[0]
    assert len(re.findall(r"```bash\n.+\n```", section)) == 2
    assert section.count("```bash") == 2


def test_the_commands_of_the_page_on_converting_run(tmp_path, monkeypatch, capsys):
    """The first block, with the demo model in the place of `nano`."""
    shutil.copytree(resolve("nano"), tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL)[0]
    for line in block.splitlines():
        command, *words = shlex.split(line)
        assert command == "sega-jax"
        assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "nano-files" / "flux1.safetensors").exists()


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
