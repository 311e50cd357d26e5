"""MkDocs hook: links from a page to files outside docs/ lead to the repository, or become text where it has no address.

On a code host these links work as they are written.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:  # noqa: ANN401 — MkDocs's own
    """Return the page with each link that leaves docs/ changed."""
    return with_outer_links(markdown, page.file.src_uri, config.repo_url)


def with_outer_links(markdown: str, page: str, repository: str | None) -> str:
    """Return the Markdown of `page`, a path in docs/, with its links to files outside docs/ changed."""

    def changed(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), found["target"]))
        if re.match(r"[a-z]+:|#", found["target"]) or path.startswith("docs/"):
            return found[0]
        return f"[{found['text']}]({repository}/blob/main/{path})" if repository else found["text"]

    return LINK.sub(changed, markdown)
