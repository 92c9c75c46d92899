"""Sources that code and tests cite are ones a reader can open: a paper, released code, or a page of this repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = ("sega_jax", "converters", "tests", "scripts", ".ci")
KINDS = (".py", ".cc", ".h", ".md", ".toml", ".sh", "")  # the last is .ci/run
SECTION = chr(0xA7)  # spelled by its number, so that this file passes its own test

# Working notes whose names differ from those of pages; pages of docs/ are cited with their folder.
NOTES = (
    "sega",
    "dype",
    "crpa",
    "scalediff",
    "scale_dit",
    "qwen_image",
    "z_image",
    "flux2_klein",
    "sdxl",
    "wan",
    "krea2",
)
PRIVATE = re.compile(
    "|".join(
        (
            rf"(?<![/\"'\w])({'|'.join(NOTES)})\.md\b",
            rf"\.md,? {SECTION}",
            r"\bDESI[G]N\b|\b(house|anchors)\.md\b",
            r"\bfield[-_ ]notes\b",
            rf"\bspecs? {SECTION}",
        )
    )
)
# A section number says nothing without the paper or standard whose section it is.
SECTIONS = re.compile(rf"{SECTION}\s*\d")
NAMED = re.compile(r"arXiv|RFC|https?://")


def private(text: str) -> list[str]:
    """Lines that cite what is not in the repository, or a section of nothing, as ``number: line``."""
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if PRIVATE.search(line) or (SECTIONS.search(line) and not NAMED.search(line))
    ]


def test_no_file_cites_private_notes():
    found = []
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            if path.suffix in KINDS and path.is_file():
                found += [f"{path.relative_to(ROOT)}:{line}" for line in private(path.read_text("utf-8"))]
    assert not found, "cite the paper's equation or the released file, not a note:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        f'"""Magnitudes (sega.{"md"} {SECTION}4.5)."""',
        f"# as dype.{'md'} says",
        f"size = 'YaRN, as dype.{'md'} {SECTION}3.3'",
        f"# the layout of scale_dit.{'md'}, {SECTION}7.2",
        f"by another.{'md'} {SECTION}2",
        f"(field-{'notes'} {SECTION}6.3)",
        f"# field {'notes'}: 17.2 PF per step",
        f"see DESI{'GN.md'}",
        f"(DESI{'GN'} rule 11)",
        f"house.{'md'}, mend 5",
        f"spec {SECTION}6 at 1024 pixels",
        f"def test_positions():  # {SECTION}17.6",
    ],
)
def test_a_planted_note_is_found(line):
    assert private(f"fine\n{line}\n") == [f"2: {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "see docs/sega.md and docs/crpa.md",
        '(ROOT / "docs" / "scalediff.md").read_text()',
        f"(YaRN, arXiv 2309.00071 {SECTION}3.4)",
        "def crpa(): ...",
    ],
)
def test_pages_and_papers_are_no_notes(line):
    assert private(line) == []
