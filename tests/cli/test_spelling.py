"""Options as other programs spell them, the help in groups, and prompts as people keep them."""

import dataclasses
import io
import json
from pathlib import Path

import pytest

from sega_jax import cli
from sega_jax.cli.generate import GROUPS, Generate
from sega_jax.cli.grouping import documentation, grouped
from sega_jax.cli.spelling import MEANT, SAME, understood
from tests.cli.helpers import nothing_is_loaded


@pytest.fixture
def planned(run, monkeypatch):
    """Plans of a dry run."""
    nothing_is_loaded(monkeypatch)

    def plans(*words):
        code, out, err = run("generate", *words, "--dry-run", "--json")
        assert code == 0, err
        return json.loads(out)["plans"]

    return plans


@pytest.mark.parametrize(
    "words",
    [
        ("-p", "a red circle", "-W", "64", "-H", "32", "--num-inference-steps", "3", "-o", "x.png", "-s", "5"),
        ("--prompt=a red circle", "--width=64", "--height=32", "--sampling-steps=3", "--output=x.png", "--seed=5"),
        ("a red circle", "--size", "64x32", "--steps", "3", "--out", "x.png", "--seed", "5"),
    ],
)
def test_spellings_of_others_are_the_same_request(planned, words):
    (plan,) = planned(*words)
    record = plan["record"]
    told = (record["prompt"], record["width"], record["height"], record["steps"], record["seed"], plan["out"])
    assert told == ("a red circle", 64, 32, 3, 5, "x.png")


def test_negative_prompts_have_short_names(planned):
    (plan,) = planned("x", "-n", "dots", "--true-guidance", "2")
    assert plan["record"]["negative_prompt"] == "dots"


def test_sizes_are_said_in_one_way(planned, run):
    (plan,) = planned("x", "--width", "64")
    assert (plan["record"]["width"], plan["record"]["height"]) == (64, 192)
    code, _, err = run("generate", "x", "--size", "64", "-W", "64", "--dry-run")
    assert (code, "size='64' with a width or height; give one of the two" in err) == (2, True)


@pytest.mark.parametrize("name", [*MEANT, "--cfg-scale=3"])
def test_what_means_something_else_is_answered(run, name):
    code, out, err = run("generate", "x", name, "7")
    assert (code, out) == (2, "")
    assert f"unknown option {name.partition('=')[0]}: did you mean --" in err or "JAX_PLATFORMS" in err


def test_a_slip_is_answered(run):
    code, _, err = run("generate", "x", "--stepz", "7")
    assert (code, "--stepz" in err) == (2, True)


def test_the_tables_are_of_options_there_are():
    options = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Generate)}
    assert set(SAME.values()) <= options | {"PROMPT"}
    assert not (set(SAME) | set(MEANT)) & (options - {"--width", "--height", "--prompt"}) - {"--prompt"}
    assert not set(SAME) & set(MEANT)
    for answer in MEANT.values():
        told = {word.strip("(),;") for word in answer.split() if word.startswith("--")}
        assert told <= options, answer


def test_what_follows_two_dashes_is_left_alone():
    assert understood(["-o", "x.png", "--", "-o", "--cfg"]) == ["--out", "x.png", "--", "-o", "--cfg"]


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit, match="0"):
        raise SystemExit(cli.main(["generate", "--help"]))
    told = capsys.readouterr().out
    places = [told.index(f" {title} options ") for title in GROUPS]
    assert places == sorted(places)
    for (title, names), begin, end in zip(GROUPS.items(), places, [*places[1:], len(told)], strict=True):
        for name in set(names) - {"prompt"}:
            assert f"--{name.replace('_', '-')} " in told[begin:end], title


def test_every_option_is_described_and_in_one_group():
    assert set(documentation(Generate)) == {field.name for field in dataclasses.fields(Generate)}
    with pytest.raises(ValueError, match="prompt"):
        grouped(Generate, {**GROUPS, "more": ("prompt",)})
    with pytest.raises(ValueError, match="quiet"):
        grouped(Generate, {**GROUPS, "output": ("dry_run", "json")})


PROMPTS = "a red circle\n\n  a blue square with dots  \n"
ROWS = '{"prompt": "a red circle"}\n{"prompt": "a blue square with dots", "seed": "random"}\n'


@pytest.mark.parametrize("text", [PROMPTS, ROWS], ids=["plain", "objects"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_prompts_as_people_keep_them(planned, monkeypatch, text, mark, ends):
    data = mark + text.replace("\n", ends).encode()
    Path("prompts.txt").write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    for source in ("prompts.txt", "-"):
        told = [plan["record"]["prompt"] for plan in planned("--prompts", source)]
        assert told == ["a red circle", "a blue square with dots"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"a red circle\n", "a.jsonl line 1: not valid JSON"),
        ("a.txt", b"a red circle\n{}\n", "a.txt line 2: a JSON object among plain prompts"),
        ("a.txt", "ä".encode("latin-1"), "a.txt: not UTF-8 text"),
        ("a.txt", b"\xff\xfea\0", "a.txt: not UTF-8 text"),
        ("a.txt", b"\n  \n", "a.txt: no rows"),
        ("a.txt", b'{"prompt": 5}\n', "a.txt line 1: prompt=5: expected str"),
        ("a.txt", b'{"prompt": "x", "seed": true}\n', "a.txt line 1: seed=True"),
    ],
)
def test_files_of_prompts_that_are_refused(run, monkeypatch, name, data, message):
    nothing_is_loaded(monkeypatch)
    Path(name).write_bytes(data)
    code, _, err = run("generate", "--prompts", name, "--dry-run")
    assert code == 2
    assert message in err
