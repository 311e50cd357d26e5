"""The page's files need only the gateway itself."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from control.release.gateway_metrics import FAULTS
from gateway.api.playground import FOLDER

if TYPE_CHECKING:
    from conftest import Stand

MOST_BYTES = 150_000
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*"))
# The name of SVG's vocabulary is an address, but nothing loads it.
OTHER_HOST = re.compile(r"https?://(?!www\.w3\.org/2000/svg)[a-z]", re.IGNORECASE)


def test_all_files_together_are_small() -> None:
    assert sum((FOLDER / name).stat().st_size for name in FILES) <= MOST_BYTES


@pytest.mark.parametrize("path", ["/", "/ops"])
def test_pages_forbid_inline_code_and_other_hosts(stand: Stand, path: str) -> None:
    answer = stand.client.get(path)
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", answer.text)


@pytest.mark.parametrize("path", ["/", "/ops"])
def test_everything_that_a_page_names_is_there(stand: Stand, path: str) -> None:
    page = stand.client.get(path).text
    named = re.findall(r"""(?:src|href)="([^"#]+)\"""", page)
    assert named
    for address in named:
        assert stand.client.get(f"/{address.removeprefix('.')}").status_code == 200, address


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".png")])
def test_files_name_no_other_host(name: str) -> None:
    assert not OTHER_HOST.search((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_modules_import_files_that_exist(name: str) -> None:
    for imported in re.findall(r"""from "\./([^"]+)\"""", (FOLDER / name).read_text(encoding="utf-8")):
        assert imported in FILES, imported


def test_the_operations_view_counts_the_faults_that_end_a_canary() -> None:
    listed = re.search(r"const FAULTS = (\[.*?\]);", (FOLDER / "ops.js").read_text(encoding="utf-8"))
    assert listed is not None
    assert tuple(json.loads(listed[1])) == FAULTS


@pytest.mark.parametrize("name", FILES)
def test_a_browser_keeps_each_file_until_it_changes(stand: Stand, name: str) -> None:
    answer = stand.client.get(f"/page/{name}")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")
    again = stand.client.get(f"/page/{name}", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "../settings.py", "%2e%2e/settings.py", ""])
def test_other_files_do_not_exist(stand: Stand, name: str) -> None:
    assert stand.client.get(f"/page/{name}").status_code == 404


def test_config_says_whether_callers_need_a_key(make_stand) -> None:
    assert make_stand().client.get("/page/config.json").json()["asks_for_keys"] is False
    entry = f"someone:{'0' * 64}:predict"
    assert make_stand(keys=(entry,)).client.get("/page/config.json").json()["asks_for_keys"] is True


def test_config_has_the_gateways_limits(make_stand) -> None:
    config = make_stand(max_image_bytes=4096, max_batch_images=8).client.get("/page/config.json").json()
    assert (config["max_image_bytes"], config["max_batch_images"]) == (4096, 8)
