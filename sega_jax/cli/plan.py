"""``sega-jax plan``: what a picture takes on hardware that need not be here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from converters.files import expanded
from sega_jax.cli.options import ModelOptions, option


@dataclass(frozen=True, kw_only=True)
class Plan(ModelOptions):
    """Compile a picture ahead of time for any accelerator: memory, operations, traffic, least time, and what fits.

    No weights are read, and the accelerator need not be there; its compiler must be installed, or closed forms remain.
    --model also takes flux-dev, flux-krea-dev and flux-schnell, whose sizes are built in.
    The exit code is 0 where it fits and 1 where it does not.
    """

    size: Annotated[str | None, option("PX|WIDTHxHEIGHT", "the trained size")] = None
    """Pixels: a side, or width x height."""
    target: Annotated[str, option("TARGET", "local")] = "local"
    """local, or a chip with its arrangement: v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, h100:8, h200:1."""
    all_targets: Annotated[bool, option("", "off")] = False
    """Rank the known targets by the least time per image; closed forms only, unless --compile."""
    usd: Annotated[Path | None, option("FILE.json")] = None
    """With --all-targets: rank by cost.  {"v6e": dollars per hour of one device, "h100:8": of the whole target}."""
    positional: Annotated[str, option("METHOD", "auto")] = "auto"
    """As of generate."""
    layout: Annotated[str, option("LAYOUT", "dense")] = "dense"
    """As of generate."""
    regions: Annotated[str | None, option("REGIONS", "auto:0.3 with --layout crpa")] = None
    """As of generate."""
    ladder: Annotated[str | None, option("SIZES", "with scalediff: up from the trained size")] = None
    """As of generate."""
    steps: Annotated[int | None, option("N", "by model")] = None
    """Model evaluations."""
    batch_size: Annotated[int, option("N", "1")] = 1
    """Pictures per model call."""
    negative_prompt: Annotated[bool, option("", "off")] = False
    """Plan true classifier-free guidance: two model rows per picture."""
    mesh: Annotated[str | None, option("AXES", "the one with least traffic that fits")] = None
    """Devices per axis, such as context=4,tensor=2."""
    context: Annotated[Literal["auto", "ulysses", "ring", "product"], option("SCHEME", "auto")] = "auto"
    """As of generate, with --mesh."""
    backend: Annotated[str | None, option("KERNEL", "tpu or hopper, by target")] = None
    """Attention kernel."""
    residency: Annotated[Literal["all", "offload"], option("WHERE", "all")] = "all"
    """As of generate: all keeps all weights on the devices, offload those of one stage at a time."""
    dtype: Annotated[Literal["float32", "bfloat16"], option("DTYPE", "bfloat16")] = "bfloat16"
    """Of parameters and activations."""
    weights: Annotated[Literal["full", "int8"], option("TYPE", "full: as --dtype")] = "full"
    """As of generate: int8 halves the transformer's memory."""
    transformer: Annotated[Path | None, option("PATH", "the model's own")] = None
    """Other transformer weights: their configuration counts."""
    compile: Annotated[Literal["auto", "yes", "no"], option("auto|yes|no", "auto: yes, with --all-targets no")] = "auto"
    """Whether to ask the compiler, or closed forms alone."""
    json: Annotated[bool, option("", "off")] = False
    """Result as JSON on standard output."""

    def run(self) -> dict:
        """The plan (`sega_jax.costs.report.plan`), or with ``all_targets`` a ranking of them, ``targets``.

        Raises:
            ValueError, TypeError: arguments.  CheckpointError, OSError: files.
        """
        if self.usd is not None and not self.all_targets:
            raise ValueError("--usd ranks targets by cost; give --all-targets too")
        from sega_jax.cli.generation.requests import parse_size
        from sega_jax.costs.report import plan, rank
        from sega_jax.costs.targets import ALL_TARGETS

        prices = None if self.usd is None else _prices(self.usd)
        options: dict[str, Any] = {
            "size": None if self.size is None else parse_size(self.size),
            "positional": self.positional,
            "layout": self.layout,
            "regions": self.regions,
            "ladder": self.ladder,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "negative_prompt": self.negative_prompt,
            "mesh": self.mesh,
            "context": self.context,
            "backend": self.backend,
            "residency": self.residency,
            "dtype": self.dtype,
            "weights": self.weights,
            "transformer": self.transformer,
            **self.hub(),
        }
        model = self.model or "nano"
        if not self.all_targets:
            report = plan(model, target=self.target, compile=self.compile != "no", **options)
            return {**report, "ok": report["fits"]}
        reports = [plan(model, target=name, compile=self.compile == "yes", **options) for name in ALL_TARGETS]
        ranked = rank(reports, prices)
        return {"targets": ranked, "ok": any(report["fits"] for report in ranked)}

    def show(self, result: dict) -> str:
        """The plan for people."""
        return _ranking(result["targets"]) if self.all_targets else show_plan(result)


def _prices(path: Path) -> dict[str, float]:
    try:
        prices = json.loads(expanded(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(prices, dict) or not all(
        isinstance(price, (int, float)) and not isinstance(price, bool) and price > 0 for price in prices.values()
    ):
        raise ValueError(f'{path}: expected an object of dollars per hour, such as {{"v6e": 2.7, "h100:8": 24.0}}')
    return prices


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def show_plan(report: dict) -> str:
    """A report as text."""
    width, height = report["size"]
    mesh = " x ".join(f"{name} {n}" for name, n in report["mesh"].items() if n > 1) or "one device"
    regions = "" if report["regions"] is None else f" of {report['regions']}"
    weights = "" if report["weights"] == "full" else f", {report['weights']} weights"
    lines = [
        f"{report['model']} {width}x{height}, {report['steps']} steps, batch {report['batch_size']}, "
        f"{report['positional']}, {report['layout']}{regions}, {report['dtype']}{weights}",
        f"{report['target']}: {report['devices']} device(s) of {_gb(report['memory'])} GB; mesh: {mesh}; "
        f"{report['kernel']} attention",
        "",
    ]
    head = ["per device", "parameters", "activations", "temporaries", "peak", "closed form", "PFLOP", "moved", "sent",
            "least time", "runs"]  # fmt: skip
    rows = [head]
    for p in report["programs"]:
        figures = [p["inputs"] + p["outputs"], p["temporaries"]] if p["compiled"] and not p["failure"] else [None, None]
        rows.append([
            p["name"],
            _gb(p["parameters"]),
            *("-" if x is None else _gb(x) for x in figures),
            _gb(p["peak"]) if p["compiled"] else "-",
            _gb(p["parameters"] + p["estimate"]),
            f"{p['flops'] / 1e15:.3g}",
            _gb(p["bytes"]),
            _gb(sum(p["collectives"].values()) if p["compiled"] else p["sent"]),
            f"{_time(p['seconds'])} ({p['bound']})" if p["seconds"] is not None else "-",
            str(p["runs"]),
        ])  # fmt: skip
    lines += _table(rows)
    lines += ["GB where no other unit is given", ""]
    lines += [f"{p['name']}: {p['how']}" for p in report["programs"]]
    lines += [f"{p['name']}: {note}" for p in report["programs"] for note in p["notes"]]
    lines += [
        "",
        f"all parameters: {_gb(report['resident'])} GB per device, "
        + ("there through all stages" if report["residency"] == "all" else "those of one stage at a time"),
        f"peak: {_gb(report['peak'])} of {_gb(report['memory'])} GB per device",
    ]
    if report["seconds"] is not None:
        lines.append(f"at least {_time(report['seconds'])} per image: {report['assumptions']}")
    else:
        lines.append("no roofline: this device has no data sheet here")
    if report["missing"]:
        lines.append(f"not compiled: {report['missing']}")
    elif not report["compiled"]:
        lines.append("not compiled: closed forms only")
    if report["fits"]:
        lines.append("fits")
    else:
        remedy = f"; try {' or '.join(report['try'])}" if report["try"] else ""
        lines.append(f"does not fit, because {report['because']}{remedy}")
    host = report["host"]
    lines.append(
        f"planned in {host['seconds']:.0f} s ({host['cpu_seconds']:.0f} s of processor time), "
        f"{_gb(host['peak_bytes'])} GB of host memory"
    )
    return "\n".join(lines)


def _ranking(reports: list[dict]) -> str:
    priced = "usd" in reports[0]
    rows = [["target", "fits", "peak GB", "of GB", "mesh", "least time", *(["USD per image"] if priced else [])]]
    for report in reports:
        mesh = " x ".join(f"{name} {n}" for name, n in report["mesh"].items() if n > 1) or "-"
        usd = [f"{report['usd']:.4f}" if report["usd"] is not None else "-"] if priced else []
        rows.append([
            report["target"], "yes" if report["fits"] else "no", _gb(report["peak"]), _gb(report["memory"]), mesh,
            _time(report["seconds"]), *usd,
        ])  # fmt: skip
    kind = "compiled" if reports[0]["compiled"] else "closed forms"
    return "\n".join([*_table(rows), f"memory: {kind}; times: {reports[0]['assumptions']}"])
