"""Tables and reference in the documents are current, and links and paths lead to files that exist."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/explanation/architecture.md"])
def test_names_of_the_code_in_backticks_exist(name):
    """Check classes, constants and functions of two words; a single lower-case word may be anything."""
    folders = [*FOLDERS_OF_CODE, "tests", "benchmarks"]
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+|[A-Z_]{4,}|\w+_\w+)(?:\([^`]*\))?`", text))
    assert named
    assert named <= words


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


def test_nothing_says_to_install_gradserve_from_a_package_index():
    """There it would be somebody else's package."""
    code = [path for folder in FOLDERS_OF_CODE for path in (ROOT / folder).rglob("*.py")]
    for path in (*DOCUMENTS, *code):
        assert not re.search(r"pip install \S*gradserve", path.read_text(encoding="utf-8")), path


def test_every_alert_has_its_entry_in_the_runbook():
    rules = yaml.safe_load((ROOT / "config" / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    alerts = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules["groups"][0]["rules"]}
    text = (ROOT / "docs" / "how-to" / "runbook.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    assert set(entries) == set(alerts)
    for alert, url in alerts.items():
        assert url == f"docs/how-to/runbook.md#{alert.lower()}"
        assert re.findall(r"^\*\*(\w+)\*\*:", entries[alert], re.MULTILINE) == ["Means", "Look", "Do"], alert


def test_every_page_is_in_the_navigation_of_the_site():
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = set(re.findall(r"^ *- [^:]+: (\S+\.md)$", configuration, re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert navigation == pages, "write new pages into `nav:` of mkdocs.yml"


def test_links_out_of_the_docs_lead_to_the_repository_or_become_text():
    links = load(ROOT / "docs" / "site_links.py").with_outer_links
    others = "[page](keys.md#a), [top](#top), [site](https://example.org), ![image](../x.png)"
    text = f"[code](../../gateway/app.py), {others}"
    assert links(text, "how-to/run.md", "https://host/us/it") == (
        f"[code](https://host/us/it/blob/main/gateway/app.py), {others}"
    )
    assert links(text, "how-to/run.md", "") == f"code, {others}"


@pytest.mark.long
def test_the_site_builds_without_a_warning():
    """`make docs` first, which installs MkDocs."""
    subprocess.run(["make", "docs"], cwd=ROOT, check=True)
    page = (ROOT / "build" / "site" / "index.html").read_text(encoding="utf-8")
    assert "gradserve" in page
    loaded = re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="?(https?://[^">]+)', page)
    assert not loaded, "the site makes requests to other hosts"
