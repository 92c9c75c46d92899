"""The record of a conversion that lies beside its output."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.reading.formats import read_json

REPORT_FILE = "conversion.json"


def tool_version() -> str:
    """The installed version of this project, or ``unknown``."""
    try:
        return importlib.metadata.version("sega-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def report_path(output: Path) -> Path:
    """Where the report of an output lies: in a folder, or beside a file."""
    return output / REPORT_FILE if output.is_dir() else output.with_name(f"{output.name}.{REPORT_FILE}")


def stored_report(output: Path) -> dict[str, Any]:
    """The report of an output; empty if there is none or it is not one of ours."""
    path = report_path(output)
    try:
        report = read_json(path) if path.is_file() else {}
        summary(report)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return report


def summary(report: Mapping[str, Any]) -> str:
    """A stored report in a few lines, for people."""
    lines = [
        f"converted {report['source']['name']} ({report['source']['layout']}) to {report['to']}, "
        f"types {report['dtype']}, {report['bytes']:,} bytes, by {report['tool']} {report['version']}, "
        f"{report['created']}"
    ]
    for lora in report.get("loras", ()):
        line = f"  merged {lora['name']} with weight {lora['weight']:g}"
        if left_out := lora.get("left_out"):
            line += f", without {len(left_out)} changes that fit nothing ({', '.join(left_out[:3])})"
        lines.append(line)
    for name, part in report["components"].items():
        counts = f"{part['tensors']} tensors, {part['slots']} parameters"
        line = f"  {name}: {counts}, configuration from {part['config_from']}"
        if part["left_out"]:
            line += f", {len(part['left_out'])} tensors left out ({', '.join(part['left_out'][:3])})"
        lines.append(line)
        if found := part.get("verify"):
            line = f"    verified: {found['equal']} of {found['slots']} equal bit for bit"
            if found["rounded"]:
                line += (
                    f", {found['rounded']} rounded (largest relative error {found['largest_error']:.3g}, "
                    f"bound {found['bound']:.3g})"
                )
            if found.get("quantised"):
                line += f", {found['quantised']} quantised (largest error {found['largest_step']:.3g} scales)"
            if found["nonfinite"]:
                line += f", {len(found['nonfinite'])} with NaN or infinity"
            lines.append(line)
        if ran := part.get("forward"):
            lines.append(
                f"    forward: {ran['blocks']} blocks compute the same "
                f"(largest relative difference {ran['largest']:.2g}, bound {ran['bound']:g})"
            )
    if "fingerprint" in report["source"]:
        lines.append(f"  fingerprint {report['source']['fingerprint']}")
    return "\n".join(lines)
