"""Callers by key and by address: who is admitted, whose quota is used up, and changes of the file of keys."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import socketserver
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from starlette.requests import Request

from gateway.auth import keys
from gateway.auth.callers import TIDY_S, Callers, MemoryWindows, address_of, parse_quota
from gateway.settings import Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx
    from conftest import Stand


def test_a_broken_key_file_stops_the_start_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"GATEWAY_KEYS_FILE=.*keys\.json cannot be used: .*is no JSON"):
        Callers(Settings(keys_file=path))


def test_a_missing_key_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        Callers(Settings(keys_file=tmp_path / "nope"))


def test_two_keys_of_one_name_are_refused() -> None:
    entry = f"a:{'0' * 64}:read"
    with pytest.raises(SettingsError, match="two keys named a"):
        Callers(Settings(keys=(entry, entry)))


def test_keys_are_added_and_removed_without_a_restart(make_stand: Callable[..., Stand], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    old_secret, old = keys.make_key("old", ["read"])
    new_secret, new = keys.make_key("new", ["read"])
    keys.save_keys(path, [old])
    stand = make_stand(keys_file=path)

    def status(secret: str) -> int:
        return stand.client.get("/models", headers={"x-api-key": secret}).status_code

    assert (status(old_secret), status(new_secret)) == (200, 401)
    keys.save_keys(path, [new])
    stand.wait_until(lambda: (status(old_secret), status(new_secret)) == (401, 200))


def test_a_file_that_cannot_be_read_is_tried_again_though_it_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    keys.save_keys(path, [keys.make_key("a", ["read"])[1]])
    callers = Callers(Settings(keys_file=path))
    keys.save_keys(path, [])
    may_read = False

    def load(path: Path) -> tuple[keys.Key, ...]:
        if not may_read:
            raise PermissionError(13, "Permission denied")
        return ()

    monkeypatch.setattr("gateway.auth.keys.load_keys", load)
    for _ in range(3):
        callers.refresh_keys()
    assert (len(callers._keys), len(caplog.records)) == (1, 1)
    may_read = True
    callers.refresh_keys()
    assert callers._keys == ()


def test_a_file_that_breaks_leaves_the_keys_as_they_are(make_stand: Callable[..., Stand], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret, key = keys.make_key("a", ["read"])
    keys.save_keys(path, [key])
    stand = make_stand(keys_file=path)
    for content in ("{", json.dumps({"schema": 1, "keys": "none"})):
        path.write_text(content, encoding="utf-8")
        stand.client.portal.call(stand.app.state.gateway.callers.refresh_keys)
        assert stand.client.get("/models", headers={"x-api-key": secret}).status_code == 200


def test_a_quota_belongs_to_one_key(make_stand: Callable[..., Stand]) -> None:
    made = [keys.make_key(name, ["predict"]) for name in ("a", "b")]
    entries = tuple(f"{key.name}:{key.sha256}:predict" for _, key in made)
    client = make_stand(keys=entries, rate_per_key="1/hour").client

    def status(secret: str) -> int:
        return client.post("/predict", content=b"x", headers={"x-api-key": secret}).status_code

    assert [status(made[0][0]), status(made[0][0]), status(made[1][0])] == [200, 429, 200]


def test_wrong_keys_use_up_the_addresss_quota(make_stand: Callable[..., Stand]) -> None:
    client = make_stand(keys=(f"a:{'0' * 64}:read",), rate_per_address="2/hour").client
    statuses = [client.get("/models", headers={"x-api-key": "guess"}).status_code for _ in range(3)]
    assert statuses == [401, 401, 429]


KEYS_OF_MODELS: dict[str, tuple[str, ...]] = {"limited": ("photos",), "everything": ()}
IMAGE = {"files": {"file": b"image-of-cat"}}
TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aW1hZ2Utb2YtZG9n"]}
TO_PHOTOS: list[tuple[str, str, dict[str, Any]]] = [
    *(("POST", f"/{route}?model=photos", IMAGE) for route in ("predict", "explain", "predict/batch")),
    ("POST", "/v2/models/photos/infer", {"json": {"inputs": [TENSOR]}}),
    ("GET", "/v2/models/photos", {}),
    ("GET", "/v2/models/photos/versions/1.0.0/ready", {}),
]


@pytest.mark.parametrize(("method", "path", "what"), TO_PHOTOS, ids=[path for _, path, _ in TO_PHOTOS])
def test_a_key_that_is_limited_to_a_model_calls_no_other(
    make_two_models: Callable[..., Stand], tmp_path: Path, method: str, path: str, what: dict[str, Any]
) -> None:
    limited, everything = (keys.make_key(name, keys.SCOPES, models=only) for name, only in KEYS_OF_MODELS.items())
    keys.save_keys(tmp_path / "keys.json", [limited[1], everything[1]])
    stand = make_two_models(keys_file=tmp_path / "keys.json")

    def ask(secret: str, path: str) -> httpx.Response:
        return stand.client.request(method, path, headers={"x-api-key": secret}, **what)

    for other in {path.replace("photos", "cifar10"), path.replace("?model=photos", "")} - {path}:
        refused = ask(limited[0], other)
        assert (refused.status_code, refused.json()["code"]) == (403, "model_forbidden")
        assert "the model 'cifar10': name one of its models (photos)" in refused.json()["detail"]
        assert not stand.torchserve.calls
    assert ask(limited[0], path).status_code == 200
    assert ask(everything[0], path.replace("photos", "cifar10")).status_code == 200


def test_a_key_that_is_limited_to_a_model_sees_only_that_one_and_calls_of_no_model_are_free(
    make_two_models: Callable[..., Stand],
) -> None:
    made = {name: keys.make_key(name, ["read", "predict"], models=only) for name, only in KEYS_OF_MODELS.items()}
    entries = [f"{key.name}:{key.sha256}:read+predict" for _, key in made.values()]
    stand = make_two_models(keys=(f"{entries[0]}:photos", entries[1]))

    def seen(name: str) -> set[str]:
        answer = stand.client.get("/models", headers={"x-api-key": made[name][0]})
        return {version["model"] for version in answer.json()["versions"]}

    assert (seen("limited"), seen("everything")) == ({"photos"}, {"photos", "cifar10"})
    for path in ("/metrics", "/v2"):
        assert stand.client.get(path, headers={"x-api-key": made["limited"][0]}).status_code == 200


def test_two_keys_of_one_name_work_until_the_old_one_expires(make_stand: Callable[..., Stand], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    end = datetime.now(UTC) + timedelta(seconds=1.5)
    old_secret, old = keys.make_key("alice", ["read"], expires=end.isoformat())
    new_secret, new = keys.make_key("alice", ["read"])
    keys.save_keys(path, [old, new])
    stand = make_stand(keys_file=path)

    def answer(secret: str) -> tuple[int, str | None]:
        found = stand.client.get("/models", headers={"x-api-key": secret})
        return found.status_code, found.json().get("code")

    assert answer(old_secret) == answer(new_secret) == (200, None)
    stand.wait_until(lambda: datetime.now(UTC) > end)
    assert answer(old_secret) == (401, "key_expired")
    assert answer(new_secret) == (200, None)
    shown = stand.client.get("/metrics", headers={"x-api-key": new_secret}).text
    for key, status, count in ((old, 200, 1), (old, 401, 1), (new, 200, 2)):
        counted = f'gateway_caller_requests_total{{caller="alice",key="{key.sha256[:8]}",status="{status}"}} {count}.0'
        assert counted in shown


def test_a_key_with_a_quota_of_its_own_has_that_and_no_other(make_stand: Callable[..., Stand], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = [keys.make_key("large", ["predict"], quota="3/hour"), keys.make_key("usual", ["predict"])]
    keys.save_keys(path, [key for _, key in made])
    client = make_stand(keys_file=path, rate_per_key="1/hour").client

    def statuses(secret: str) -> list[int]:
        headers = {"x-api-key": secret}
        return [client.post("/predict", content=b"x", headers=headers).status_code for _ in range(4)]

    assert [statuses(secret) for secret, _ in made] == [[200, 200, 200, 429], [200, 429, 429, 429]]


def test_a_rotated_key_counts_against_its_callers_one_quota(make_stand: Callable[..., Stand], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    expires = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    made = [keys.make_key("a", ["predict"], quota="2/hour", expires=end) for end in (expires, "")]
    keys.save_keys(path, [key for _, key in made])
    client = make_stand(keys_file=path).client
    answers = [client.post("/predict", content=b"x", headers={"x-api-key": made[turn % 2][0]}) for turn in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]


def test_every_answer_has_the_remaining_calls_of_each_quota(make_stand: Callable[..., Stand]) -> None:
    secret, key = keys.make_key("a", ["predict"])
    entry = f"a:{key.sha256}:predict"
    client = make_stand(keys=(entry,), rate_per_key="2/hour", rate_per_address="100/minute").client
    answers = [client.post("/predict", content=b"x", headers={"x-api-key": secret}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    for answer, left in zip(answers, (1, 0, 0), strict=True):
        assert answer.headers["ratelimit-policy"] == '"address";q=100;w=60, "key";q=2;w=3600'
        address, own = answer.headers["ratelimit"].split(", ")
        assert re.fullmatch(r'"address";r=9[7-9];t=(60|59|58)', address)
        assert re.fullmatch(rf'"key";r={left};t=(3600|359\d)', own)
    assert "ratelimit" not in client.get("/livez").headers


def test_windows_in_memory_end_are_counted_anew_and_are_dropped_some_time_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        now = 1000.0
        monkeypatch.setattr("gateway.auth.callers.time.time", lambda: now)
        windows = MemoryWindows()
        assert [await windows.incr("a", 60) for _ in range(3)] == [1, 2, 3]
        assert await windows.get_expiry("a") == 1060
        for who in range(200):
            await windows.incr(f"caller {who}", 1)
        now = 1000 + 1 + TIDY_S
        assert await windows.incr("caller 7", 1) == 1
        assert len(windows) == 2, "a and caller 7"
        assert await windows.incr("a", 60) == 4

    asyncio.run(scene())


@pytest.mark.parametrize("quota", ["often", "0/minute", "-1/minute", "5 per parsec"])
def test_an_impossible_quota_is_refused(quota: str) -> None:
    with pytest.raises(SettingsError, match=r"GATEWAY_RATE_PER_KEY"):
        parse_quota("GATEWAY_RATE_PER_KEY", quota)


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"GATEWAY_RATE_STORE"):
        Callers(Settings(rate_per_key="1/minute", rate_store="nowhere://"))
    with pytest.raises(SettingsError) as refused:
        Callers(Settings(rate_per_key="1/minute", rate_store="nowhere://:s3cret@store:6379/0"))
    assert "s3cret" not in str(refused.value)


def test_a_store_that_hangs_is_not_asked_again_for_a_while(
    make_stand: Callable[..., Stand], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        stand = make_stand(rate_per_address="1/minute", rate_store=f"redis://127.0.0.1:{silent.getsockname()[1]}")
        assert [stand.client.post("/predict", content=b"x").status_code for _ in range(5)] == [200] * 5
        assert [record.msg for record in caplog.records].count("quotas are not counted for %g s: %s") == 1


class CountingRedis(socketserver.StreamRequestHandler):
    """The commands of Redis that counting needs: HELLO, EVALSHA of the library's script, GET and TTL."""

    counts: ClassVar[dict[bytes, int]] = {}

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = [self.word() for _ in range(int(line[1:]))]
            if words[0] == b"HELLO":
                self.wfile.write(b"%1\r\n$5\r\nproto\r\n:3\r\n")
            elif words[0] == b"EVALSHA":
                self.counts[words[3]] = self.counts.get(words[3], 0) + int(words[5])
                self.wfile.write(b":%d\r\n" % self.counts[words[3]])
            elif words[0] == b"GET":
                count = b"%d" % self.counts[words[1]]
                self.wfile.write(b"$%d\r\n%b\r\n" % (len(count), count))
            else:
                self.wfile.write(b":42\r\n" if words[0] == b"TTL" else b"-ERR unknown command\r\n")

    def word(self) -> bytes:
        size = int(self.rfile.readline()[1:])
        return self.rfile.read(size + 2)[:-2]


def test_gateways_with_one_redis_store_count_together(make_stand: Callable[..., Stand]) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), CountingRedis) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = f"redis://127.0.0.1:{server.server_address[1]}"
        stands = [make_stand(rate_per_address="3/minute", rate_store=store) for _ in range(2)]
        answers = [stands[turn % 2].client.post("/predict", content=b"x") for turn in range(4)]
        server.shutdown()
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 40 <= int(answers[3].headers["retry-after"]) <= 43
    assert [answer.headers["ratelimit"].partition(";t=")[0] for answer in answers] == [
        f'"address";r={left}' for left in (2, 1, 0, 0)
    ]


@pytest.mark.parametrize(
    ("client", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("a unix socket", "a unix socket"),
    ],
)
def test_quotas_count_by_ipv4_address_or_ipv6_network(client: str, counted: str) -> None:
    assert address_of(Request({"type": "http", "client": (client, 1)})) == counted


def test_an_exhausted_quota_is_429_with_retry_after(
    make_stand: Callable[..., Stand], assert_problem: Callable[..., None]
) -> None:
    client = make_stand(rate_per_address="2/hour").client
    assert [client.post("/predict", content=b"x").status_code for _ in range(2)] == [200, 200]
    answer = client.post("/predict", content=b"x")
    assert_problem(answer, 429, "quota_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 3600
    assert client.get("/readyz").status_code == 200, "probes have no quota"
