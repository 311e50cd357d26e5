"""Which package may import which: the floors, held by a test."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"gradserve", "contracts", "training", "handlers", "gateway", "control"}
MAY_IMPORT = {
    "contracts": set(),
    "gradserve": set(),
    "gateway": {"contracts", "gradserve"},
    "handlers": {"contracts"},
    "training": {"handlers", "contracts"},
    "control": {"training", "gateway", "handlers", "contracts", "gradserve"},
}
MOST_MODULES = 14
HEAVY = {"torch", "torchvision", "mlflow", "training", "handlers"}
# What runs beside TorchServe in production, where neither MLflow nor a second copy of torch has a place.
AGENT = "control.agent"


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """The full names of all modules that the file imports, wherever in it, or only `at_import` of the file itself."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_import else ast.walk(tree):
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


def test_contracts_need_the_standard_library_only():
    for path in modules("contracts"):
        foreign = top_level(imported(path)) - sys.stdlib_module_names - {"contracts", "__future__"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("folder", sorted({path.parent for package in PACKAGES for path in modules(package)}))
def test_a_folder_has_at_most_about_twelve_modules(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_module_has_its_test_file_in_the_same_place(package):
    for path in modules(package):
        if path.name != "__init__.py":
            module = path.relative_to(ROOT)
            mirror = ROOT / "tests" / module.parent / f"test_{module.name}"
            assert mirror.is_file(), f"{module} has no {mirror.relative_to(ROOT)}"


def test_client_needs_httpx_alone_and_numpy_and_pillow_only_where_they_are_asked_for():
    allowed = sys.stdlib_module_names | {"gradserve", "httpx", "__future__"}
    for path in modules("gradserve"):
        for foreign in (
            top_level(imported(path, at_import=True)) - allowed,
            top_level(imported(path)) - allowed - {"numpy", "PIL"},
        ):
            assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_ray_is_imported_by_one_module_and_only_where_it_is_used():
    for package in PACKAGES:
        for path in modules(package):
            assert "ray" not in top_level(imported(path, at_import=True)), path
            assert "ray" not in top_level(imported(path)) or module_name(path) == "control.bulk.on_ray", path


@pytest.mark.parametrize("name", ["scorer", "source", "output", "storage"])
def test_what_runs_on_a_cluster_needs_nothing_else_of_gradserve(name):
    """The modules travel there with the job."""
    for found in imported(ROOT / "control" / "bulk" / f"{name}.py"):
        assert found.split(".")[0] not in PACKAGES or found.startswith("control.bulk"), found


def test_gateway_has_no_torch():
    for path in modules("gateway"):
        assert not top_level(imported(path)) & {"torch", "torchvision", "numpy", "mlflow"}, path


def test_agent_reaches_neither_training_nor_torch():
    agent = [module_name(path) for path in modules("control") if module_name(path).startswith(f"{AGENT}.")]
    todo, seen = list(agent), set()
    while todo:
        name = todo.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        names = imported(path)
        assert not top_level(names) & HEAVY, f"{name} imports {top_level(names) & HEAVY}"
        todo += [other for other in names if other.split(".")[0] == "control"]
    assert set(agent) <= seen


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_two_modules_import_each_other(package):
    names = {module_name(path): path for path in modules(package)}
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
        assert f'"{package}*"' in text
