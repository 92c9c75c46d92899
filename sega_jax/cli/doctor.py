"""``sega-jax doctor``: what this machine offers, what is broken, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from sega_jax.cli.options import option

ROOM = 40 * 2**30  # bytes; FLUX.1-dev takes 34 GB of them
# What of each extra tells that it is installed: importable names, all of them needed.
EXTRAS = {
    "tpu": ("libtpu",),
    "cuda12": ("jax_cuda12_plugin",),
    "cuda13": ("jax_cuda13_plugin",),
    "test": ("pytest", "hypothesis", "beartype"),
    "parity": ("torch", "diffusers", "transformers", "sentencepiece"),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers",
            "huggingface-hub", "pillow")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what.
        value: what was found, for programs.
        text: the same, for people.
        state: ``broken`` things keep pictures from being made here; ``note`` is good to know.
        remedy: what to do, where something can be done.
    """

    name: str
    value: Any
    text: str
    state: Literal["ok", "note", "broken"] = "ok"
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look at versions, devices, disk, caches, hub access and attention kernels.  Uses no network."""

    json: Annotated[bool, option("", "off")] = False
    """Findings as JSON on standard output."""

    def run(self) -> dict:
        """``findings`` as dictionaries, and ``ok``: nothing is broken."""
        findings = [finding for check in CHECKS for finding in _guarded(check)]
        return {
            "findings": [asdict(finding) for finding in findings],
            "ok": all(finding.state != "broken" for finding in findings),
        }

    def show(self, result: dict) -> str:
        """The findings for people."""
        lines = []
        width = max(len(finding["name"]) for finding in result["findings"])
        for finding in result["findings"]:
            mark = {"ok": " ", "note": "-", "broken": "!"}[finding["state"]]
            lines.append(f"{mark} {finding['name'].ljust(width)}  {finding['text']}")
            if finding["remedy"]:
                lines.append(f"  {' ' * width}  -> {finding['remedy']}")
        broken = sum(finding["state"] == "broken" for finding in result["findings"])
        lines.append(f"{broken} broken" if broken else "nothing is broken")
        return "\n".join(lines)


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check's findings; that it fails is one."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.strip("_")
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Finding(name, None, text, "broken", "reinstall sega-jax; if that does not help, report this line")]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _versions() -> list[Finding]:
    import sega_jax

    findings = [
        Finding("sega-jax", sega_jax.__version__, sega_jax.__version__),
        Finding("python", platform.python_version(), f"{platform.python_version()} on {platform.platform()}"),
    ]
    found, missing = {}, []
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    findings.append(Finding("packages", found, text))
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        findings.append(Finding("missing", missing, ", ".join(missing), "broken", remedy))
    return findings


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return None


def _devices() -> list[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        text = f"JAX finds no device: {' '.join(str(error).split())[:300]}"
        return [Finding("devices", [], text, "broken", "check JAX_PLATFORMS and the driver; JAX_PLATFORMS=cpu works")]
    entries = []
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        entries.append({"platform": device.platform, "kind": device.device_kind, "memory": limit})
    first = entries[0]
    text = f"{len(entries)} x {first['kind']}" + (f", {_size(first['memory'])} each" if first["memory"] else "")
    findings = [Finding("devices", entries, text)]
    gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if first["platform"] == "cpu" and gpu:
        remedy = 'pip install "sega-jax[cuda12]" (or cuda13, as the driver allows)'
        if os.environ.get("JAX_PLATFORMS"):
            remedy += f"; JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} is set"
        findings.append(Finding("accelerator", "nvidia", "an NVIDIA GPU is here, JAX uses the CPU", "note", remedy))
    memory = _memory()
    if memory is not None:
        findings.append(Finding("memory", memory, f"{_size(memory)} in this machine, {os.cpu_count()} CPU cores"))
    return findings


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _disk(folder: Path, name: str, needed: int, what: str) -> Finding:
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    value = {"folder": str(folder), "free": free}
    text = f"{folder}, {_size(free)} free"
    if not os.access(place, os.W_OK):
        return Finding(name, value, f"{folder} cannot be written", "note", f"choose another folder ({what})")
    if free < needed:
        return Finding(name, value, text, "note", f"little room; choose another disk ({what}) or free some space")
    return Finding(name, value, text)


def _hub() -> list[Finding]:
    import huggingface_hub
    from huggingface_hub import constants

    findings = [_disk(Path(constants.HF_HUB_CACHE), "hub cache", ROOM, "HF_HOME")]
    offline = bool(constants.HF_HUB_OFFLINE)
    login = huggingface_hub.get_token() is not None
    state = f"{'logged in' if login else 'not logged in'}, {'offline' if offline else 'online'}"
    value = {"token": login, "offline": offline, "endpoint": constants.ENDPOINT}
    if offline:
        remedy = "unset HF_HUB_OFFLINE to download models"
    else:
        remedy = None if login else "for gated models (FLUX.1-dev): hf auth login, or HF_TOKEN"
    findings.append(Finding("hub", value, f"{state} ({constants.ENDPOINT})", "note" if remedy else "ok", remedy))
    return findings


def _compilation_cache() -> list[Finding]:
    from sega_jax.runtime.cache import cache_folder, use_compilation_cache

    folder = use_compilation_cache()
    if folder is None and cache_folder() is None:
        return [Finding("compile cache", None, "off (SEGA_JAX_CACHE=off)", "note", "unset SEGA_JAX_CACHE")]
    if folder is None:
        text = f"{cache_folder()} is not this user's own, so nothing is kept there"
        return [Finding("compile cache", None, text, "note", "set SEGA_JAX_CACHE to a folder of your own")]
    files = [entry.stat().st_size for entry in folder.glob("*") if entry.is_file()] if folder.is_dir() else []
    disk = _disk(folder, "compile cache", 2**30, "SEGA_JAX_CACHE")
    text = f"{disk.text}; holds {_size(sum(files))} in {len(files)} files"
    value = {**disk.value, "bytes": sum(files), "files": len(files)}
    return [Finding("compile cache", value, text, disk.state, disk.remedy)]


def _demo() -> list[Finding]:
    from converters.inspect import inspect
    from sega_jax.weights.hub import resolve

    try:
        report = inspect(resolve("nano"))
    except Exception as error:
        return [Finding("demo model", None, str(error), "broken", "reinstall sega-jax")]
    problems = [part.problem for part in report.parts if part.problem]
    if problems:
        return [Finding("demo model", problems, "; ".join(problems), "broken", "reinstall sega-jax")]
    count = sum(part.parameters for part in report.parts)
    return [Finding("demo model", count, f"nano, {count:,} parameters")]


def _extras() -> list[Finding]:
    found = {
        name: [module for module in modules if importlib.util.find_spec(module) is None]
        for name, modules in EXTRAS.items()
    }
    have = [name for name, missing in found.items() if not missing]
    lack = [name for name, missing in found.items() if missing]
    text = f"installed: {', '.join(have) or 'none'}; not installed: {', '.join(lack) or 'none'}"
    return [Finding("extras", {name: not missing for name, missing in found.items()}, text)]


def _attention() -> list[Finding]:
    import jax
    import jax.numpy as jnp

    from sega_jax.attention import Request, choose
    from sega_jax.pipeline.pipeline import default_dtype

    tokens, heads, width = 4096 + 512, 24, 128  # FLUX.1 at 1024 x 1024 with its text
    chosen: list[tuple[str, dict[str, str]]] = []

    def ask(q: jax.Array) -> jax.Array:
        kernel, passed = choose(Request(q, q, q, width**-0.5))
        chosen.append((kernel.name, passed))
        return q

    dtype = default_dtype()
    jax.eval_shape(ask, jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.dtype(dtype)))
    name, passed = chosen[0]
    reasons = "; ".join(f"not {kernel}: {reason}" for kernel, reason in passed.items())
    text = f"{name} for 4096 image tokens of FLUX.1 in {dtype}" + (f" ({reasons})" if reasons else "")
    state = "note" if name == "xla" else "ok"  # it serves anything; a kernel for the device would be faster
    return [Finding("attention", {"kernel": name, "passed_over": passed}, text, state)]


CHECKS = (_versions, _devices, _hub, _compilation_cache, _demo, _extras, _attention)
