"""Tables and reference in the documents are current, and links and paths lead to files that exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_store/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS_OF_CODE = ("contracts", "control", "gateway", "gradserve", "handlers", "training")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OTHER_FOLDERS = ("benchmarks", "config", "docs", "model_store", "requirements", "results", "tests")
# Matches `control/agent/reconciler.py` and `benchmarks/once/`, but no pattern (`model_store/*.mar`) and no `runs/ID`.
REPOSITORY_PATH = re.compile(rf"`((?:{'|'.join((*FOLDERS_OF_CODE, *OTHER_FOLDERS))})/[\w./-]*)`")


def load(path: Path):
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_reference_are_those_of_the_reports_and_the_code(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")  # the script imports its neighbour
    tables = load(ROOT / "docs" / "make_tables.py")
    documents = tables.documents()
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    assert {path.name for path in documents} >= {
        "engines.md",
        "gateway.md",
        "training.md",
        "http.md",
        "cli.md",
        "settings.md",
    }
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)
    for path in documents:
        before = path.read_text(encoding="utf-8")
        assert tables.renewed(before) == before, f"{path.name} is not current: make docs-tables"


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives to the headings."""
    headings = HEADING.findall(document.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to the heading {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_backticks_exist(document):
    for path in REPOSITORY_PATH.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def process_diagram(document: Path) -> str:
    """Return the first code block of the document that draws an arrow to the gateway."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if "──▶ gateway" in block)


def test_process_diagram_is_the_same_in_readme_and_architecture():
    assert process_diagram(ROOT / "README.md") == process_diagram(ROOT / "docs" / "explanation" / "architecture.md")


def test_readme_reaches_the_first_answer_before_line_25():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("$ curl") and "/predict" in line)
    assert first < 25


@pytest.mark.parametrize("document", ["README.md", "docs/explanation/architecture.md"])
def test_folder_table_names_every_package(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for package in FOLDERS_OF_CODE:
        assert re.search(rf"^\| \[{package}/\]", text, re.MULTILINE), f"{document} has no row for {package}/"
