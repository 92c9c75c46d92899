"""Accelerators nobody here needs to own: devices to compile for ahead of time, and what each of them can do.

``devices("h200:8")`` gives devices that compile and never run::

    place = SingleDeviceSharding(devices("v5p:2x2x1")[0])
    jax.jit(f).lower(jax.ShapeDtypeStruct((8, 128), "bfloat16", sharding=place)).compile().memory_analysis()

TPUs need libtpu (extra ``tpu``), GPUs the CUDA plugin of the same version as jax (extra ``aot-gpu``; neither driver
nor CUDA libraries are needed to compile).  Both may live in one process, whose own platform may be
``JAX_PLATFORMS=cpu``.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclass(frozen=True)
class Capacity:
    """What one JAX device of a kind has; a TPU7x chip is two devices, every other chip one.

    Attributes:
        platform: ``"tpu"`` or ``"gpu"``.
        memory_bytes: HBM; for TPUs what the compiler grants a program, a little less than is sold.
        flops: dense bfloat16 operations per second at most, a multiply-add counted as two.
        memory_bandwidth: HBM bytes per second.
        interconnect_bandwidth: bytes per second out of one device over all its links (as many come in).
        source: where the figures are published.
    """

    platform: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    interconnect_bandwidth: float
    source: str


_TPU_PAGE = "docs.cloud.google.com/tpu/docs/"
CAPACITIES: dict[str, Capacity] = {
    # memory: the limit in libtpu 0.0.50's own out-of-memory error
    "v5e": Capacity("tpu", int(15.75 * GIB), 197e12, 819e9, 200e9, _TPU_PAGE + "v5e"),
    "v5p": Capacity("tpu", int(95.73 * GIB), 459e12, 2_765e9, 600e9, _TPU_PAGE + "v5p"),
    "v6e": Capacity("tpu", int(31.24 * GIB), 918e12, 1_638e9, 400e9, _TPU_PAGE + "v6e"),
    "tpu7x": Capacity("tpu", int(94.74 * GIB), 2_307e12 / 2, 7_380e9 / 2, 600e9 / 2, _TPU_PAGE + "tpu7x"),
    # memory and bandwidth: OpenXLA's target_config/specs; flops and NVLink: NVIDIA's data sheets of the SXM parts
    "h100": Capacity("gpu", 84_942_979_072, 989.4e12, 3_352e9, 450e9, "nvidia.com/en-us/data-center/h100"),
    "h200": Capacity("gpu", 150_754_820_096, 989.4e12, 4_800e9, 450e9, "nvidia.com/en-us/data-center/h200"),
}
GPUS_PER_HOST = 8
_KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
_CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")


def _parse(target: str) -> tuple[str, tuple[int, ...]]:
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){0,2})", target)
    if found is None or found[1] not in CAPACITIES:
        raise ValueError(
            f"target={target!r}: expected a chip of {', '.join(CAPACITIES)} with its arrangement, "
            "such as 'v5p:2x2x1', 'v6e:2x4' or 'h200:8'"
        )
    return found[1], tuple(int(n) for n in found[2].split("x"))


def capacity(target: str) -> Capacity:
    """What one device of a target such as ``"v5p:2x2x1"`` or of a chip such as ``"h200"`` has.

    Raises:
        ValueError: unknown chip; the known ones are listed.
    """
    return CAPACITIES[_parse(target if ":" in target else f"{target}:1")[0]]


def missing(target: str) -> str | None:
    """What must be installed before `devices` can serve ``target``; None where nothing is missing."""
    if capacity(target).platform == "tpu":
        installed, what = importlib.util.find_spec("libtpu") is not None, "libtpu: pip install 'sega-jax[tpu]'"
    else:
        plugins = importlib.util.find_spec("jax_plugins") is not None
        installed = plugins and any(importlib.util.find_spec(f"jax_plugins.{name}") for name in _CUDA_PLUGINS)
        what = (
            "the CUDA plugin: pip install 'sega-jax[cuda13]' or, only to compile, 'sega-jax[aot-gpu]' "
            f"(Python >= 3.12; its version must be that of jax, {jax.__version__})"
        )
    return None if installed else f"compiling for {target} needs {what}"


def _gpu_description(chip: str) -> str:
    """XLA's description of a Hopper GPU (text form of its GpuTargetConfigProto); figures from OpenXLA's own specs."""
    known = CAPACITIES[chip]
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      threads_per_core_limit: 2048
      core_count: 132
      fpus_per_core: 128
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {int(known.memory_bandwidth)}
      l2_cache_size: 52428800
      clock_rate_ghz: 1.98
      device_memory_size: {known.memory_bytes}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{_KINDS[chip]}"
    """


def devices(target: str) -> list[jax.Device]:
    """Devices to compile for.

    Args:
        target: ``"v5e:2x4"``, ``"v5p:2x2x1"``, ``"v6e:2x4"``, ``"tpu7x:2x2x1"`` (chips along each axis of the slice)
            or ``"h100:1"``, ``"h200:8"`` (GPUs, in hosts of eight).

    Raises:
        ValueError: unknown chip, or GPUs that do not fill their hosts.
        ModuleNotFoundError: the compiler for it is not installed; says what to install.
    """
    chip, shape = _parse(target)
    lacking = missing(target)
    if lacking is not None:
        raise ModuleNotFoundError(lacking)
    if CAPACITIES[chip].platform == "tpu":
        # without these libtpu asks the network where it is, and refuses a second process
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return list(topologies.get_topology_desc(target, "tpu").devices)
    count = shape[0]
    if len(shape) > 1 or count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise ValueError(f"target={target!r}: expected a number of GPUs, above {GPUS_PER_HOST} a multiple of it")
    hosts = -(-count // GPUS_PER_HOST)
    return list(
        topologies.get_topology_desc(
            topology_name=target,
            platform="cuda",
            target_config=_gpu_description(chip),
            topology=f"1x{hosts}x{count // hosts}",
        ).devices
    )
