"""The house: which package may import which, and how large a file and a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sega_jax"

# From what users touch down to what nothing in the package is needed for.  A module imports from layers below its own.
LAYERS = (
    ("cli",),
    ("evaluation", "costs"),
    ("pipeline",),
    ("families", "training"),
    ("nano",),
    ("weights", "decoding", "sampling"),
    ("models",),
    ("attention",),
    ("layouts", "sharding"),
    ("positional",),
    ("geometry",),
    ("media", "runtime"),
)
LONGEST_FILE = 500
LONGEST_FUNCTION = 80


def modules(root: Path) -> set[str]:
    """Dotted names of all modules and packages under ``root``'s parent."""
    names = {".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py")}
    return {name.removesuffix(".__init__") for name in names}


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere in it, ``from sega_jax import models`` included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & known) or {node.module}
    return {name for name in names if name in known}


def layer_of(module: str, layers=LAYERS) -> int | None:
    parts = module.split(".")
    return next((number for number, names in enumerate(layers) if len(parts) > 1 and parts[1] in names), None)


def upward(root: Path, layers=LAYERS) -> list[str]:
    """Imports that do not point down, one line each."""
    known, found = modules(root), []
    for path in sorted(root.rglob("*.py")):
        own = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        here = layer_of(own, layers)
        for other in sorted(imported(path, known)):
            there = layer_of(other, layers)
            if here is None or there is None or own.split(".")[1] == other.split(".")[1]:
                continue
            if there <= here:
                found.append(f"{own} imports {other}")
    return found


def circles(root: Path) -> list[str]:
    """Modules that import each other, directly or not, at the level of modules."""
    known, edges = modules(root), {}
    for path in root.rglob("*.py"):
        own = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        top = ast.Module(
            [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        names = set()
        for node in top.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= (whole & known) or ({node.module} & known)
        edges[own] = names - {own}
    done, found = set(), []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())
    return found


def oversized(root: Path) -> list[str]:
    """Files and functions above their limits; kernels are as long as they must be."""
    found = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        if "kernels" in path.parts:
            continue
        lines = text.count("\n")
        if lines > LONGEST_FILE:
            found.append(f"{path.relative_to(root.parent)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                docstring = ast.get_docstring(node, clean=False)
                length -= 0 if docstring is None else docstring.count("\n") + 1
                if length > LONGEST_FUNCTION:
                    found.append(f"{path.relative_to(root.parent)}: {node.name} has {length} lines")
    return found


# A family's own modules, and who may import them: its file in families/ and the registry; nano and its training are of
# the first family, and may use its modules.
OWN = {
    "flux": (
        {"sega_jax.models.flux", "sega_jax.families.flux", "converters.keymaps.flux"},
        (
            "sega_jax.models.flux",
            "sega_jax.families.flux",
            "sega_jax.families.registry",
            "sega_jax.nano",
            "sega_jax.training",
        ),
    ),
}


def strangers(root: Path, own=OWN) -> list[str]:
    """Modules that import a family's own modules, or have its name in one of theirs, without being the family's."""
    known, found = modules(root) | {name for names, _ in own.values() for name in names}, []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for family, (theirs, friends) in own.items():
            if module.startswith(friends):
                continue
            found += [f"{module} imports {name}" for name in sorted(imported(path, known) & theirs)]
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            found += [f"{module} says {name}" for name in sorted(names) if family in name.lower()]
    return found


def test_nothing_else_knows_a_family():
    assert strangers(ROOT) == []


def test_every_package_has_a_layer():
    named = {name for names in LAYERS for name in names}
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == named


def test_little_lies_loose_at_the_top():
    assert sorted(path.name for path in ROOT.iterdir() if path.is_file()) == ["__init__.py", "geometry.py", "py.typed"]


def test_imports_point_down():
    assert upward(ROOT) == []


def test_no_circle_of_imports():
    assert circles(ROOT) == []


@pytest.fixture
def house(tmp_path):
    """A small package in the same layers."""
    root = tmp_path / "sega_jax"
    for name in ("cli", "models", "layouts"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    (root / "__init__.py").write_text("")
    return root


@pytest.mark.parametrize(
    "line",
    ["from sega_jax import models", "import sega_jax.models.flux", "def f():\n    from sega_jax.models import flux"],
)
def test_a_planted_arrow_up_is_found(house, line):
    (house / "models" / "flux.py").write_text("")
    (house / "layouts" / "dense.py").write_text(line + "\n")
    assert len(upward(house)) == 1


def test_a_planted_stranger_is_found(house):
    (house / "models" / "flux.py").write_text("")
    (house / "cli" / "plan.py").write_text("from sega_jax.models.flux import FluxConfig\n\nFLUX_STEPS = 28\n")
    assert strangers(house) == ["sega_jax.cli.plan imports sega_jax.models.flux", "sega_jax.cli.plan says FLUX_STEPS"]


def test_a_planted_circle_is_found(house):
    (house / "models" / "a.py").write_text("from sega_jax.models import b\n")
    (house / "models" / "b.py").write_text("from sega_jax.models.a import x\n")
    assert circles(house) == ["sega_jax.models.a -> sega_jax.models.b -> sega_jax.models.a"]


def test_a_planted_long_function_is_found(house):
    (house / "models" / "long.py").write_text("def f():\n" + "    x = 1\n" * 90)
    assert oversized(house) == ["sega_jax/models/long.py: f has 91 lines"]
