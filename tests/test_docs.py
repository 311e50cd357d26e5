"""What the documents say is what the reports say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(path: Path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_committed_reports():
    tables = load(ROOT / "docs" / "make_tables.py")
    documents = tables.documents()
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    assert {path.name for path in documents} >= {"engines.md", "gateway.md", "training.md"}
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)
    for path in documents:
        before = path.read_text(encoding="utf-8")
        assert tables.renewed(before) == before, f"{path.name} differs from the reports: make docs-tables"
