"""Docstrings begin plainly, and docstrings, comments and documents use the words of the field.

CONTRIBUTING.md has the rules. A folder is listed in CLEAN once it follows them.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLEAN = ("benchmarks", "config", "contracts", "control", "docs", "gateway", "gradserve", "handlers", "training")
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_store/README.md")),
    *(ROOT / name for name in ("Makefile", "docker-compose.yml", "Dockerfile.gateway", "Dockerfile.torchserve")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "config").rglob("*.y*ml")),
)
# "Return …", "Raise `X` if …", "Return True if …", or a noun phrase that says what is returned.
INDIRECT = re.compile(r"(What|Whether|How|Who|Where|Which|Tells?|Looks?|Sees to|Does nothing|Nothing that)\b")
PRIVATE = re.compile(
    r"\b(envelopes?|crown(s|ed)?|pictures?|crowds?|seats?|as good as|hears? so|for company|of no use|anew|shared rows?"
    r"|in hand|what it (says|said) (last|aloud)|said aloud|nobody's memory)\b",
    re.IGNORECASE,
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring, attribute docstrings included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_the_rules_find_what_they_forbid():
    source = '"""Whether it is ready."""\nx = 1  # the crown, or as good as that\n'
    assert [bool(INDIRECT.match(text)) for _, text in docstrings(source)] == [True]
    assert [found[0] for _, text in comments(source) for found in PRIVATE.finditer(text)] == ["crown", "as good as"]


@pytest.mark.parametrize("folder", CLEAN)
def test_docstrings_begin_with_an_imperative_or_a_noun(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if INDIRECT.match(text.strip())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", CLEAN)
def test_docstrings_and_comments_use_no_private_words(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for texts in (docstrings, comments)
        for line, text in texts(path.read_text(encoding="utf-8"))
        for word in PRIVATE.finditer(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_no_private_words(document):
    lines = document.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {word[0]}" for number, line in enumerate(lines, 1) for word in PRIVATE.finditer(line)]
    assert not found, "\n".join(found)
