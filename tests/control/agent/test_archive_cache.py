import hashlib
import os

import pytest

from control.agent.archive_cache import ArchiveCache
from control.errors import ArchiveError
from control.settings import AgentSettings


def written(folder, name, size):
    path = folder / name
    path.write_bytes(name[0].encode() * size)
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


def cache(tmp_path, **settings):
    return ArchiveCache(AgentSettings(cache=tmp_path / "cache", **settings))


def test_an_archive_is_fetched_once(tmp_path):
    source, sha256 = written(tmp_path, "a.mar", 1000)
    path = cache(tmp_path).fetch(source, sha256)
    assert path == tmp_path / "cache" / f"{sha256}.mar"
    (tmp_path / "a.mar").unlink()
    assert cache(tmp_path).fetch(source, sha256) == path
    path.write_bytes(b"changed on disk")
    with pytest.raises(ArchiveError, match="cannot be fetched"):
        cache(tmp_path).fetch(source, sha256)


def test_the_archive_used_longest_ago_is_removed(tmp_path):
    small = cache(tmp_path, cache_mb=1)
    paths = []
    for index, name in enumerate(("a.mar", "b.mar")):
        paths.append(small.fetch(*written(tmp_path, name, 400_000)))
        os.utime(paths[-1], (index, index))
    small.fetch((tmp_path / "a.mar").as_uri(), paths[0].stem)  # used again
    newest = small.fetch(*written(tmp_path, "c.mar", 400_000))
    assert set((tmp_path / "cache").iterdir()) == {paths[0], newest}


def test_an_archive_above_the_limit_and_an_unusable_folder_are_refused(tmp_path):
    with pytest.raises(ArchiveError, match="more than 1000000 bytes"):
        cache(tmp_path, archive_mb=1).fetch(*written(tmp_path, "a.mar", 1_000_001))
    (tmp_path / "file").touch()
    broken = ArchiveCache(AgentSettings(cache=tmp_path / "file" / "cache"))
    with pytest.raises(ArchiveError, match="set AGENT_CACHE"):
        broken.fetch(*written(tmp_path, "b.mar", 10))


def test_a_signature_that_comes_later_is_fetched_without_the_archive(tmp_path):
    source, sha256 = written(tmp_path, "a.mar", 1000)
    path = cache(tmp_path).fetch(source, sha256)
    (tmp_path / "a.mar").unlink()
    (tmp_path / "a.mar.sig").write_text("signed")
    assert cache(tmp_path).fetch(source, sha256) == path
    assert path.with_name(f"{path.name}.sig").read_text() == "signed"
