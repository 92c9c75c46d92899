"""Ways to a picture compared: requests, rows that are kept and shared, seams, pages; with two steps of nano."""

import json

import numpy as np
import pytest

import sega_jax as sj
from sega_jax.evaluation import contest, crpa
from sega_jax.evaluation.contest import Case


def test_requests_climb_by_doubling():
    case = Case("sega", "scalediff", ladder="gamma=none")
    assert case.request(192, 768) == {
        "ladder": "192, 384 gamma=none, 768 gamma=none", "positional": "sega", "layout": "scalediff",
    }  # fmt: skip
    assert Case().request(192, 384) == {"width": 384, "height": 384, "positional": "none", "layout": "dense"}
    cases = contest.crpa([0.15, 0.6], levels=3, bare=[0.6])
    assert next(iter(cases)) == "full"
    assert len(cases) == 11
    assert cases["PI to HR, 60%"] == Case("none", "crpa(levels=3, positions='pi-hr')", "center:0.6")


def test_rows_are_made_once_and_shared(tmp_path, monkeypatch):
    pipe = sj.Pipeline.from_pretrained("nano")
    cases = {"full": Case(), "crpa": Case("none", "crpa(coarse=1.0, fine=0.0, pad_fine=0, pad_coarse=0)", "center:0.3")}
    options = {"side": 128, "count": 2, "among": 4, "steps": 2, "report": lambda line: None}
    first = contest.run(pipe, tmp_path / "a.json", cases, **options)
    full, mixed = first["rows"]["128/full"], first["rows"]["128/crpa"]
    assert full["seconds"] > 0
    assert 0.2 < mixed["flops"] / full["flops"] < 0.9
    assert {len(values) for values in mixed["values"].values()} == {2}
    assert contest.seam(mixed) == contest.pooled(mixed["values"]["boundary center:0.3"])
    assert contest.seam(full) == pytest.approx(np.mean(full["values"]["seam"]))
    assert full["request"] != mixed["request"]

    monkeypatch.setattr(contest, "draw", lambda *args, **kwargs: pytest.fail("drawn again"))
    assert contest.run(pipe, tmp_path / "a.json", cases, **options) == json.loads((tmp_path / "a.json").read_text())
    other = contest.run(pipe, tmp_path / "b.json", {"direct": Case()}, known=[tmp_path / "a.json"], **options)
    assert other["rows"]["128/direct"] == {**full, "case": "direct"}
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        contest.run(pipe, tmp_path / "a.json", cases, **{**options, "steps": 3})
    with pytest.raises(ValueError, match="needs a LoRA"):
        contest.run(pipe, tmp_path / "a.json", {"x": Case("pi", "scale-dit", lora=True)}, **options)

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table -->\nold\n<!-- end of table -->\nb\n")
    contest.write_into(page, "table", contest.summarize(first))
    lines = page.read_text().splitlines()
    assert len(lines) == 8
    assert "old" not in lines
    assert {line.count("|") for line in lines[2:6]} == {len(contest.COLUMNS) + 1}
    with pytest.raises(ValueError, match="no <!-- other -->"):
        contest.write_into(page, "other", "")


def test_energies_at_the_boundary():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (2, 64, 64, 3))
    levels = np.ones((1, 8, 8), np.int8)
    levels[:, 2:6, 2:6] = 0
    even = crpa.boundary_energies(smooth, levels)
    assert contest.pooled(even) == pytest.approx(1, abs=0.15)
    stepped = smooth.astype(float)
    stepped[:, 16:48, 16:48] += 200
    uneven = crpa.boundary_energies(stepped, levels)
    np.testing.assert_allclose(uneven[:, 1], even[:, 1])
    assert contest.pooled(uneven) > 3


def test_errors_as_a_table():
    rows = [
        {"side": 384, "positional": "none", "share": 0.3, "layout": name, "level": level, "error": e, "states": 64}
        for name, errors in (("crpa", (0.1, 0.2)), ("pi-lr", (0.3, 0.4)))
        for level, e in enumerate(errors)
    ]
    assert crpa.summarize(rows).splitlines()[2:] == [
        "| 384 | `none` | 30% | crpa | 0.1000 | 0.2000 | 64 |",
        "| 384 | `none` | 30% | pi-lr | 0.3000 | 0.4000 | 64 |",
    ]


def test_seams_of_one_step():
    """Spliced is the single-resolution models themselves; exchange brings a mixed step nearer to them."""
    pipe = sj.Pipeline.from_pretrained("nano")
    rows = crpa.seams_of_estimates(pipe, 192, share=0.3, sigmas=(0.3,), pictures=2, batch=2)
    by_case = {row["case"]: row for row in rows}
    assert list(by_case) == ["exchange", "no exchange", "spliced"]
    assert by_case["spliced"]["inside"] == by_case["spliced"]["outside"] == 0
    for side in ("inside", "outside"):
        assert 0 < by_case["exchange"][side] < by_case["no exchange"][side]
    shared = {"side": 192, "share": 0.3, "pictures": 2}
    line = crpa.summarize_seams([{**shared, **rows[2]}]).splitlines()[2]
    assert line == f"| 192 | 30% | 0.3 | spliced | {rows[2]['seam']:.2f} | 0.0000 | 0.0000 | 2 |"
