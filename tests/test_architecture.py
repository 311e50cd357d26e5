"""Which package may import which: the floors, held by a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"training", "handlers", "gateway", "control"}
MAY_IMPORT = {
    "gateway": set(),
    "handlers": set(),
    "training": {"handlers"},
    "control": {"training", "gateway", "handlers"},
}
HEAVY = {"torch", "torchvision", "mlflow", "training", "handlers"}
# What runs beside TorchServe in production, where neither MLflow nor a second copy of torch has a place.
AGENT = ["agent", "reconciler", "management", "torchserve_process", "verification", "deployment", "archive", "settings"]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The full names of all modules that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports fail in the archive"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_stands_below_them(package):
    for path in modules(package):
        foreign = (top_level(imported(path)) & PACKAGES) - MAY_IMPORT[package] - {package}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_gateway_has_no_torch():
    for path in modules("gateway"):
        assert not top_level(imported(path)) & {"torch", "torchvision", "numpy", "mlflow"}, path


def test_agent_reaches_neither_training_nor_torch():
    todo, seen = [f"control.{name}" for name in AGENT], set()
    while todo:
        name = todo.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        names = imported(path)
        assert not top_level(names) & HEAVY, f"{name} imports {top_level(names) & HEAVY}"
        todo += [other for other in names if other.split(".")[0] == "control"]
    assert {f"control.{name}" for name in AGENT} <= seen


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_two_modules_import_each_other(package):
    names = {f"{package}.{path.stem}": path for path in modules(package)}
    graph = {name: {other for other in imported(path) if other in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_package_is_listed_for_the_wheel():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert f'"{package}"' in text
