"""Plans for the devices that are here, at demo sizes; `tests/aot/test_plan.py` plans FLUX.1 for others."""

import json
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from sega_jax import cli
from sega_jax.costs import closed_form, programs, targets, topologies
from sega_jax.costs import report as P
from sega_jax.costs.closed_form import parameter_bytes
from sega_jax.costs.roofline import roofline
from sega_jax.families.registry import skeleton

FLUX_DEV = 11_901_408_320  # parameters, FluxConfig.dev
parts = cache(skeleton)
KEYS = {"fits", "because", "try", "programs", "resident", "peak", "memory", "seconds", "assumptions", "host", "mesh"}


def test_presets_have_the_published_sizes():
    dev = parts("flux-dev")
    assert parameter_bytes(dev.transformer) == 2 * FLUX_DEV
    assert parameter_bytes(dev.encoders["t5"]) == 2 * 4_762_310_656
    assert parameter_bytes(dev.encoders["clip"]) == 2 * 123_060_480
    assert parameter_bytes(dev.vae) == 2 * 83_819_683


def test_nano_on_one_device_is_what_a_run_compiles():
    report = P.plan("nano", size=(128, 64), steps=3, negative_prompt=True, mesh="context=1")
    assert set(report) >= KEYS
    assert report["devices"] == 1 < targets.find_target("local").count
    assert report["fits"]
    assert report["seconds"] is None  # no data sheet of this CPU
    json.dumps(report)
    names = [program["name"] for program in report["programs"]]
    assert names == ["encode", "denoise", "decode"]
    nano = parts("nano")
    for program, component in zip(report["programs"][1:], (nano.transformer, nano.vae), strict=True):
        assert program["compiled"]
        assert program["parameters"] == parameter_bytes(component)
        assert program["peak"] >= program["parameters"] + program["temporaries"]
        assert program["flops"] > 0
    assert report["programs"][1]["runs"] == 3
    assert report["peak"] <= report["resident"] + max(p["peak"] for p in report["programs"])


@pytest.mark.slow
def test_a_mesh_shares_parameters_and_sends():
    report = P.plan("nano", size=(128, 128), steps=2, mesh="context=8,tensor=1")
    encode, step, decode = report["programs"]
    assert report["mesh"] == {"data": 1, "context": 8, "tensor": 1}
    assert step["collectives"]["collective-permute"] > 0  # one head: a ring
    assert step["parameters"] < parameter_bytes(parts("nano").transformer) / 4
    assert decode["how"].startswith("exact, rows over all devices")
    assert encode["compiled"]
    assert step["compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["ring"])  # nano has one head, too few for ulysses
def test_traffic_between_devices_is_the_closed_form(context, monkeypatch):
    here = targets.find_target("local")
    monkeypatch.setattr(P, "find_target", lambda name: replace(here, count=2, devices=here.devices[:2]))
    monkeypatch.setattr(programs, "encode", lambda r: programs.Program("encode", "", 1, 0))
    monkeypatch.setattr(programs, "decode", lambda r, mode: programs.Program("decode", "", 1, 0))
    report = P.plan("nano", size=(512, 512), mesh="context=2", context=context, dtype="float32")
    sent = sum(report["programs"][1]["collectives"].values())
    assert sent == pytest.approx(report["programs"][1]["sent"], rel=0.2)


def test_without_the_compiler_closed_forms_remain(monkeypatch):
    monkeypatch.setattr(topologies, "missing", lambda target: "compiling for it needs a thing")
    report = P.plan("flux-dev", size=(6144, 6144), target="v6e:2x4")
    assert not report["compiled"]
    assert report["missing"] == "compiling for it needs a thing"
    assert report["fits"]
    assert report["devices"] == 8
    step = report["programs"][1]
    # by hand: 57 layers, 24 * 3072**2 per token and 4 * 3072 per pair of 147,968 tokens: 17.2 PF, shared by eight
    assert step["flops"] * 8 == pytest.approx(17.2e15, rel=0.03)
    assert step["seconds"] == pytest.approx(step["flops"] / 918e12, rel=1e-9)  # bound by computation
    assert report["seconds"] > 28 * step["seconds"]


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"layout": "crpa", "regions": "center:0.3"}, ["coarse", "mixed", "fine"]),
        ({"layout": "scalediff", "ladder": "192,384,768"}, ["size 1", "size 2", "size 3"]),
        ({"layout": "scale-dit"}, ["small picture", "windows"]),
        ({"positional": "sega"}, ["denoise"]),
    ],
)
def test_stages_of_a_layout_are_reported_one_by_one(options, stages):
    whole = P.plan("nano", size=(768, 768), target="h200:1", compile=False)["programs"][1]
    report = P.plan("nano", size=(768, 768), target="h200:1", compile=False, **options)
    listed = report["programs"][1:-1]
    assert [program["name"] for program in listed] == stages
    assert report["regions"] == options.get("regions")
    flops = [program["flops"] for program in listed]
    if len(stages) > 1:
        assert flops == sorted(flops)
        cheap = listed[1] if "crpa" in report["layout"] else listed[-1]
        assert cheap["flops"] < 0.8 * whole["flops"]  # what the layout is for
    else:
        assert flops == pytest.approx([whole["flops"]], rel=0.01)
    assert report["seconds"] == pytest.approx(sum(p["runs"] * p["seconds"] for p in report["programs"]), rel=1e-9)


def test_what_does_not_fit_is_refused_with_what_would():
    report = P.plan("flux-dev", size=(1024, 1024), target="v5e:1x1", compile=False)
    assert not report["fits"]
    assert "v5e:1x1 has 16.9 GB" in report["because"]
    devices = next(int(remedy.split(" x ")[0]) for remedy in report["try"] if remedy.endswith("x v5e"))
    known = topologies.capacity("v5e").memory_bytes
    dev = parts("flux-dev")
    assert closed_form.choose(dev, 1024, 1024, devices, memory=known)[1].peak() <= known
    assert closed_form.choose(dev, 1024, 1024, devices // 2, memory=known)[1].peak() > known


def test_closed_forms_count_what_they_say():
    dev = parts("flux-dev")
    one = closed_form.estimate(dev, 1024, 1024)
    assert one.transformer == 2 * FLUX_DEV
    assert one.sent == 0
    assert one.peak() > 2 * (FLUX_DEV + 4_762_310_656)
    assert one.peak("offload") < one.peak() - 2 * 4_762_310_656
    eight = closed_form.estimate(dev, 6144, 6144, sizes={"data": 1, "context": 8, "tensor": 1})
    assert eight.transformer == pytest.approx(one.transformer / 8, rel=0.01)
    exchanged = 57 * 4 * 7 / 8 * (147_456 // 8) * 3072 * 2
    assert eight.sent == pytest.approx(exchanged + 7 / 8 * 2 * FLUX_DEV, rel=1e-6)


def test_the_mesh_with_least_traffic_is_chosen():
    dev = parts("flux-dev")
    # large pictures: whole weights past every device cost less than sums of activations; small ones: the other way
    assert closed_form.choose(dev, 6144, 6144, 8)[0]["context"] > 1
    assert closed_form.choose(dev, 512, 512, 8)[0]["tensor"] > 1
    assert closed_form.choose(dev, 512, 512, 8, batch=8, rows=8)[0]["data"] >= 1
    for sizes in closed_form.candidates(8, 3, 24):
        assert np.prod(list(sizes.values())) == 8
        assert sizes["data"] in (1, 3)
        assert 24 % sizes["tensor"] == 0


def test_roofline_names_what_holds_up():
    known = topologies.capacity("h200")
    line = roofline(known, known.flops, 0.5 * known.memory_bandwidth, 2 * known.interconnect_bandwidth)
    assert (line.compute, line.memory, line.links) == (1.0, 0.5, 2.0)
    assert (line.seconds, line.bound) == (2.0, "links")


def test_ranking_by_time_and_by_cost():
    def report(target, devices, seconds, fits=True):
        return {"target": target, "devices": devices, "seconds": seconds, "fits": fits}

    reports = [report("v6e:2x4", 8, 60.0), report("h200:1", 1, 600.0), report("v5e:1x1", 1, 1.0, fits=False)]
    assert [r["target"] for r in P.rank(reports)] == ["v6e:2x4", "h200:1", "v5e:1x1"]
    ranked = P.rank(reports, {"v6e": 3.0, "h200:1": 3.6})
    assert [r["target"] for r in ranked] == ["v6e:2x4", "h200:1", "v5e:1x1"]
    assert [r["usd"] for r in ranked] == pytest.approx([8 * 3.0 / 60, 3.6 / 6, None])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "v9:2x2"], "expected a chip of"),
        (["--target", "v6e"], "arrangement"),
        (["--usd", "prices.json"], "give --all-targets too"),
        (["--mesh", "context=9"], "devices"),
        (["--size", "100"], "multiple of"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    assert cli.main(["plan", *arguments, "--compile", "no"]) == 2
    assert said in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    prices = tmp_path / "prices.json"
    prices.write_text('{"v6e": 2.7, "h100": 3.0, "h200:1": 4.0}')
    arguments = ["plan", "--size", "512", "--compile", "no"]
    assert cli.main([*arguments, "--all-targets", "--usd", str(prices), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["targets"]
    assert {report["target"] for report in reports} == set(targets.ALL_TARGETS)
    assert cli.main([*arguments, "--target", "h200:1"]) == 0
    text = capsys.readouterr().out
    assert "h200:1: 1 device(s)" in text
    assert text.splitlines()[-2] == "fits"
    assert cli.main(["plan", "--model", "flux-dev", "--compile", "no", "--target", "v5e:1x1"]) == 1
    assert "does not fit, because" in capsys.readouterr().out


def test_compile_errors_are_read():
    said, needed = programs._failure(jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.50G of 31.25G hbm. Exceeded by 14G."
    ))  # fmt: skip
    assert (said, needed) == ("the compiler ran out of the device's memory", int(45.5 * 2**30))
    assert programs._failure(RuntimeError("first line\nsecond")) == ("first line", 0)


def flux_here(monkeypatch, **changes):
    here = replace(targets.find_target("local"), **changes)
    monkeypatch.setattr(P, "find_target", lambda name: here)
    dev = parts("flux-dev")
    return P.place_here(dev, lambda: dev, 6144, 6144)


def test_a_host_refuses_only_what_it_cannot_hold(monkeypatch):
    mesh, refusal = flux_here(monkeypatch, memory=20 * 10**9)
    assert mesh is None
    assert "6144x6144 needs about 33.7 GB on this machine, which has 20.0 GB" in refusal
    assert flux_here(monkeypatch, memory=40 * 10**9) == (None, None)
    nano = parts("nano")
    assert P.place_here(nano, lambda: pytest.fail("not needed"), 256, 256) == (None, None)


def test_generate_refuses_before_it_loads(monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        return None, "64x64 needs about 1 GB on each device, which has none; what would fit: 2 x such devices"

    monkeypatch.setattr(P, "place_here", refuse)
    monkeypatch.setattr("sega_jax.pipeline.pipeline.Pipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["generate", "a red circle", "--size", "64", "--out", str(tmp_path / "out.png")]) == 2
    assert "what would fit: 2 x such devices" in capsys.readouterr().err


def test_accelerators_get_a_mesh_or_a_refusal_with_what_fits(monkeypatch):
    mesh, refusal = flux_here(monkeypatch, platform="tpu", count=8, memory=33 * 10**9)
    assert mesh == "data=1,context=8,tensor=1"
    assert refusal is None
    mesh, refusal = flux_here(monkeypatch, platform="gpu", count=1, memory=40 * 10**9)
    assert mesh is None
    assert "what would fit: --residency offload" in refusal
