"""`/docs` needs only the gateway itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Stand


def test_the_page_names_no_other_host(stand: Stand) -> None:
    page = stand.client.get("/docs").text
    assert "SwaggerUIBundle" in page
    assert not re.search(r"(https?:)?//[a-z]", page), "an address of another host"


def test_everything_the_page_loads_is_there(stand: Stand) -> None:
    page = stand.client.get("/docs").text
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page)
    loaded = [address for address in addresses if not address.startswith("data:")]
    assert sorted(loaded) == ["docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"]
    for address in loaded:
        assert stand.client.get(f"/{address}").status_code == 200, address


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/docs/swagger-ui-bundle.js", "text/javascript"), ("/docs/swagger-ui.css", "text/css")],
)
def test_files_have_a_media_type_and_can_be_cached(stand: Stand, path: str, media_type: str) -> None:
    answer = stand.client.get(path)
    assert answer.headers["content-type"].startswith(media_type)
    assert len(answer.content) > 100_000
    again = stand.client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_script_supports_openapi_3_1(stand: Stand) -> None:
    assert stand.client.get("/openapi.json").json()["openapi"].startswith("3.1")
    assert "3\\.1" in stand.client.get("/docs/swagger-ui-bundle.js").text, "Swagger UI before 5 shows an error instead"


def test_other_pages_below_docs_do_not_exist(stand: Stand) -> None:
    assert stand.client.get("/docs/oauth2-redirect").status_code == 404
    assert stand.client.get("/docs/../settings.py").status_code == 404
