"""What importing costs and drags in; the direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "tensorflow", "huggingface_hub", "tyro", "orbax", "PIL", "optax", "qwix")


def test_import_is_light():
    code = (
        "import time, jax; import jax.numpy; t = time.perf_counter(); import sega_jax; dt = time.perf_counter() - t; "
        f"import sys; print(dt); print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, loaded = out.stdout.strip().splitlines()
    assert float(seconds) < 1.0
    assert loaded == "[]"


def test_no_torch_in_the_core():
    """Everything imports where torch is absent, but for the two modules of ``--verify=forward`` (extra `parity`)."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "import sys, importlib, pkgutil, sega_jax, converters\n"
        "for package in (sega_jax, converters):\n"
        "    for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not m.name.endswith(('__main__', 'converters.verify.forward', 'converters.verify.reference')):\n"
        "            importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'tensorflow') if sys.modules.get(m)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip().splitlines()[-1] == "[]"


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (
            "sega_jax/positional",
            ("sega_jax.models", "sega_jax.attention", "sega_jax.sampling", "sega_jax.pipeline"),
        ),
        (
            "sega_jax/layouts",
            ("sega_jax.models", "sega_jax.attention", "sega_jax.sampling", "sega_jax.pipeline"),
        ),
        ("sega_jax/attention", ("sega_jax.models", "sega_jax.sampling", "sega_jax.pipeline")),
        ("sega_jax/models", ("sega_jax.sampling", "sega_jax.pipeline", "sega_jax.cli", "converters.keymaps")),
        ("sega_jax/sampling", ("sega_jax.pipeline", "sega_jax.cli")),
        ("converters", ("sega_jax", "jax", "flax")),
    ],
)
def test_imports_point_one_way(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        wrong = {name for name in imports(path) for f in forbidden if name == f or name.startswith(f + ".")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
