"""The status table of docs/reference/http.md, row by row and route by route; every refusal is a problem document."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest

from gateway.api.schemas import Problem
from gateway.app import ROUTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeAgent, Stand

IMAGE = b"image-of-dog"
FILE = ("file", ("x.png", IMAGE, "image/png"))
IMAGE_ROUTES = ["/predict", "/explain"]
FILE_ROUTES = [*IMAGE_ROUTES, "/predict/batch"]
INFER = "/v2/models/cifar10/infer"


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem = Problem.model_validate_json(answer.content)
    assert (problem.status, problem.code) == (status, code)
    assert problem.request_id == answer.headers["x-request-id"]
    assert (
        problem.detail.endswith(".")
        or ": curl " in problem.detail
        or problem.code.startswith(("image_", "unknown_", "bad_"))
    )


def infer_body(*images: bytes, **changes: Any) -> bytes:
    data = [__import__("base64").b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}
    return orjson.dumps({"inputs": [tensor], **changes})


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_an_empty_body_is_400(stand: Stand, route: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"} if route == "/predict/batch" else {}
    assert_problem(stand.client.post(route, content=b"", headers=headers), 400, "empty_body")


@pytest.mark.parametrize("route", IMAGE_ROUTES)
def test_an_empty_multipart_body_is_400(stand: Stand, route: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert_problem(stand.client.post(route, content=b"", headers=headers), 400, "empty_body")


@pytest.mark.parametrize("route", FILE_ROUTES)
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"files": {"photo": ("x.png", IMAGE)}}, "unexpected_field"),
        ({"files": [FILE], "data": {"top_k": "3"}}, "unexpected_field"),
        ({"content": b"--x--\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "missing_file"),
        ({"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "bad_multipart"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "bad_multipart"),
        ({"content": IMAGE, "headers": {"content-type": "multipart/form-data"}}, "bad_multipart"),
        ({"content": IMAGE, "headers": {"content-type": "multipart/form-data; boundary=" + "x" * 80}}, "bad_multipart"),
        (
            {
                "content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut',
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            "bad_multipart",
        ),
    ],
)
def test_a_wrong_missing_or_broken_multipart_is_400(stand: Stand, route: str, body: dict[str, Any], code: str) -> None:
    assert_problem(stand.client.post(route, **body), 400, code)


@pytest.mark.parametrize("route", IMAGE_ROUTES)
def test_more_than_one_file_is_400_where_one_is_taken(stand: Stand, route: str) -> None:
    assert_problem(stand.client.post(route, files=[FILE, FILE]), 400, "too_many_files")


@pytest.mark.parametrize("route", ["/predict/batch", INFER])
def test_more_files_than_a_batch_takes_is_400(make_stand: Callable[..., Stand], route: str) -> None:
    client = make_stand(max_batch_images=2).client
    answer = (
        client.post(route, files=[FILE] * 3) if route != INFER else client.post(route, content=infer_body(*[b"x"] * 3))
    )
    assert_problem(answer, 400, "too_many_files")


@pytest.mark.parametrize(
    "route",
    [
        "/predict?top_k=0",
        "/predict?top_k=-1",
        "/predict?top_k=x",
        "/predict?top_k=1_0",
        "/predict?top_k=%D9%A1",
        "/predict?top_k=",
        "/predict?top_k=1&top_k=2",
        "/predict?topk=1",
        "/predict?version=..",
        "/predict?version=1/2",
        "/predict?version=",
        "/predict/batch?top_k=0",
        "/predict/batch?version=-",
        "/explain?target=",
        "/explain?method=" + "x" * 201,
        "/explain?alpha=1.1",
        "/explain?alpha=nan",
        "/explain?alpha=x",
        "/explain?size=0",
        "/explain?size=1025",
        "/explain?top_k=1",
        "/explain?coverage=0.49",
        "/explain?coverage=1",
        "/explain?coverage=nan",
        "/explain?test=yes",
        "/explain?similar=11",
        "/explain?similar=-1",
        "/explain?heatmap=png",
        "/explain/batch?alpha=0.5",
        "/explain?version=%00",
        "/v2/models/cifar10/versions/-/infer",
    ],
)
def test_a_bad_parameter_is_400(stand: Stand, route: str) -> None:
    assert_problem(stand.client.post(route, content=IMAGE), 400, "bad_parameter")
    assert not stand.torchserve.calls


@pytest.mark.parametrize("timeout_ms", ["0", "-1", "x", "1.5"])
def test_a_bad_timeout_is_400(stand: Stand, timeout_ms: str) -> None:
    answer = stand.client.post("/predict", content=IMAGE, headers={"x-timeout-ms": timeout_ms})
    assert_problem(answer, 400, "bad_parameter")


def test_an_unknown_target_is_400_with_the_handlers_facts(stand: Stand) -> None:
    answer = stand.client.post("/explain?target=unicorn", content=IMAGE)
    assert_problem(answer, 400, "unknown_target")
    assert answer.json()["classes"] == ["cat", "dog", "frog"]


@pytest.mark.parametrize(
    ("code", "status", "public"),
    [
        ("unknown_target", 400, "unknown_target"),
        ("unknown_method", 400, "unknown_method"),
        ("bad_options", 400, "bad_options"),
        ("bad_frames", 400, "bad_frames"),
        ("image_too_large", 413, "image_too_large"),
        ("image_unreadable", 422, "image_unreadable"),
        ("deadline_passed", 504, "deadline_passed"),
        ("handler_failed", 500, "handler_failed"),
        ("never_heard_of", 502, "engine_nonsense"),
    ],
)
@pytest.mark.parametrize("route", [*IMAGE_ROUTES, INFER])
def test_the_handlers_codes_have_their_status(stand: Stand, route: str, code: str, status: int, public: str) -> None:
    image = f"bad:{code}".encode()
    answer = stand.client.post(route, content=infer_body(image) if route == INFER else image)
    assert_problem(answer, status, public)
    assert ("the handler's sentence" in answer.text) == (status < 500), "a caller reads only what it can act on"


KEYS = {
    "predict": "the-predict-key",
    "explain": "the-explain-key",
    "read": "the-read-key",
}


def entries() -> tuple[str, ...]:
    return tuple(f"{name}:{hashlib.sha256(key.encode()).hexdigest()}:{name}" for name, key in KEYS.items())


GUARDED = [
    ("POST", "/predict", "predict"),
    ("POST", "/predict/batch", "predict"),
    ("POST", "/explain", "explain"),
    ("POST", "/explain/batch", "explain"),
    ("GET", "/models/cifar10/versions/1.0.0/examples/1.png", "explain"),
    ("GET", "/models", "read"),
    ("GET", "/metrics", "read"),
    ("GET", "/v2", "predict"),
    ("GET", "/v2/models/cifar10", "predict"),
    ("GET", "/v2/models/cifar10/ready", "predict"),
    ("POST", INFER, "predict"),
]


PUBLIC = {"/livez", "/readyz", "/health", "/openapi.json", "/v2/health/live", "/v2/health/ready"}


def test_every_route_that_is_not_public_needs_a_key(make_stand: Callable[..., Stand]) -> None:
    client = make_stand(keys=entries()).client
    routes = [route for router in ROUTERS for route in router.routes if route.include_in_schema]
    for route in routes:
        path = re.sub(r"{(\w+)}", lambda found: {"model": "cifar10", "name": "cifar10"}.get(found[1], "1"), route.path)
        for method in route.methods:
            is_refused = client.request(method, path).status_code == 401
            assert is_refused == (route.path not in PUBLIC), (method, route.path)
    assert PUBLIC - {route.path for route in routes} <= {"/openapi.json"}


@pytest.mark.parametrize(("method", "route", "scope"), GUARDED)
def test_no_key_is_401_a_wrong_one_401_and_a_missing_scope_403(
    make_stand: Callable[..., Stand],
    make_agent: type[FakeAgent],
    make_version: Callable[..., dict[str, Any]],
    method: str,
    route: str,
    scope: str,
) -> None:
    client = make_stand(keys=entries(), agent=make_agent([make_version(schema=3)])).client
    body = {"content": infer_body(IMAGE)} if route == INFER else {}
    if method == "POST" and route != INFER:
        body = {"files": [FILE]}

    missing = client.request(method, route, **body)
    assert_problem(missing, 401, "key_missing")
    assert missing.headers["www-authenticate"] == "Bearer"
    assert_problem(client.request(method, route, headers={"x-api-key": "nonsense"}, **body), 401, "key_unknown")
    other = next(key for name, key in KEYS.items() if name != scope)
    assert_problem(client.request(method, route, headers={"x-api-key": other}, **body), 403, "scope_missing")
    right = client.request(method, route, headers={"authorization": f"Bearer {KEYS[scope]}"}, **body)
    assert right.status_code == 200


@pytest.mark.parametrize("route", ["/health", "/livez", "/readyz", "/docs", "/openapi.json", "/v2/health/live"])
def test_open_routes_need_no_key(make_stand: Callable[..., Stand], route: str) -> None:
    assert make_stand(keys=entries()).client.get(route).status_code == 200


@pytest.mark.parametrize(("method", "route"), [("GET", "/nope"), ("POST", "/predict/"), ("GET", "/v2/nope")])
def test_an_unknown_route_is_404(stand: Stand, method: str, route: str) -> None:
    assert_problem(stand.client.request(method, route), 404, "route_unknown")


def test_an_unknown_method_is_405_and_names_the_known_one(stand: Stand) -> None:
    answer = stand.client.get("/predict")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("route", ["/predict?version=9.9.9", "/explain?version=9.9.9"])
def test_an_unknown_version_is_404(stand: Stand, route: str) -> None:
    assert_problem(stand.client.post(route, content=IMAGE), 404, "version_unknown")


def test_an_unknown_version_or_model_is_404_in_v2(stand: Stand) -> None:
    body = infer_body(IMAGE)
    unknown = stand.client.post("/v2/models/cifar10/versions/9.9.9/infer", content=body)
    assert_problem(unknown, 404, "version_unknown")
    assert unknown.json()["error"] == unknown.json()["detail"], "V2 clients read `error`"
    assert_problem(stand.client.post("/v2/models/other/infer", content=body), 404, "model_unknown")
    assert_problem(stand.client.get("/v2/models/cifar10/versions/9.9.9"), 404, "version_unknown")


@pytest.mark.parametrize("route", IMAGE_ROUTES)
@pytest.mark.parametrize("declares", [True, False])
def test_a_body_over_the_limit_is_413_declared_or_not(
    make_stand: Callable[..., Stand], route: str, declares: bool
) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 10

    client = make_stand(max_image_bytes=100).client
    answer = client.post(route, content=b"x" * 101 if declares else chunks())
    assert_problem(answer, 413, "body_too_large")
    assert answer.json()["limit_bytes"] == 100
    assert client.post(route, content=b"x" * 100).status_code == 200


@pytest.mark.parametrize("route", FILE_ROUTES)
def test_a_file_over_the_limit_is_413(make_stand: Callable[..., Stand], route: str) -> None:
    client = make_stand(max_image_bytes=100).client
    assert_problem(client.post(route, files={"file": ("x", b"x" * 101)}), 413, "body_too_large")
    assert client.post(route, files={"file": ("x", b"x" * 100)}).status_code == 200


@pytest.mark.parametrize("route", ["/predict/batch", INFER])
def test_a_batch_over_the_limit_is_413(make_stand: Callable[..., Stand], route: str) -> None:
    client = make_stand(max_batch_bytes=1000).client
    if route == INFER:
        answer = client.post(route, content=infer_body(b"x" * 900))
    else:
        chunk = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * 600_000
        answer = client.post(route, content=chunk, headers={"content-type": "multipart/form-data; boundary=x"})
    assert_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize("route", FILE_ROUTES)
@pytest.mark.parametrize("declared", ["text/plain", "application/json", "image/svg+xml", "text/html; charset=utf-8"])
def test_a_declared_type_that_is_no_raster_image_is_415(stand: Stand, route: str, declared: str) -> None:
    raw = stand.client.post(route, content=IMAGE, headers={"content-type": declared})
    assert_problem(raw, 415, "media_type_unsupported")
    part = stand.client.post(route, files={"file": ("x", IMAGE, declared)})
    assert_problem(part, 415, "media_type_unsupported")
    form = "file=@1.png -F file=@2.png" if route == "/predict/batch" else "file=@image.png"
    assert raw.json()["detail"].endswith(f": curl -F {form} http://gateway{route}")


def test_a_host_with_shell_characters_is_not_in_the_curl_command(stand: Stand) -> None:
    headers = {"content-type": "application/json", "host": "x;reboot"}
    answer = stand.client.post("/predict", content=b"{}", headers=headers)
    assert answer.json()["detail"].endswith(": curl -F file=@image.png http://localhost/predict")


@pytest.mark.parametrize("declared", ["image/png", "application/octet-stream"])
def test_a_batch_that_is_no_form_is_415_with_the_right_curl_command(stand: Stand, declared: str) -> None:
    answer = stand.client.post("/predict/batch", content=IMAGE, headers={"content-type": declared})
    assert_problem(answer, 415, "media_type_unsupported")
    assert "send multipart/form-data with the field `file`" in answer.json()["detail"]


@pytest.mark.parametrize(
    "declared",
    [
        "",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "image/gif",
        "IMAGE/PNG",
        "image/jpeg; a=b",
    ],
)
def test_another_raster_type_or_none_is_200(stand: Stand, declared: str) -> None:
    headers = {"content-type": declared} if declared else {}
    assert stand.client.post("/predict", content=IMAGE, headers=headers).status_code == 200


@pytest.mark.parametrize("route", FILE_ROUTES)
@pytest.mark.parametrize("field", ["file", "files", "image"])
def test_a_form_names_its_image_file_files_or_image(stand: Stand, route: str, field: str) -> None:
    for name in ("x.png", 'with "quotes".png'):
        assert stand.client.post(route, files={field: (name, IMAGE)}).status_code == 200


def test_an_exhausted_quota_is_429_with_retry_after(make_stand: Callable[..., Stand]) -> None:
    client = make_stand(rate_per_address="2/hour").client
    assert [client.post("/predict", content=IMAGE).status_code for _ in range(2)] == [200, 200]
    answer = client.post("/predict", content=IMAGE)
    assert_problem(answer, 429, "quota_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 3600
    assert client.get("/readyz").status_code == 200, "probes have no quota"


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_saturation_is_503_with_retry_after(make_stand: Callable[..., Stand], route: str) -> None:
    hold = asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await hold.wait()
        return stand.torchserve(request)

    limits = {"in_flight_predict": 1, "in_flight_explain": 1, "in_flight_backward": 1}
    stand = make_stand(upstream=slow, **limits, admission_wait_s=0.01)
    body: dict[str, Any] = {"content": infer_body(IMAGE)} if route == INFER else {"files": [FILE]}

    async def both() -> tuple[httpx.Response, httpx.Response]:
        first = asyncio.create_task(stand.client.http.post(route, **body))
        await asyncio.sleep(0.05)
        second = await stand.client.http.post(route, **body)
        hold.set()
        return await first, second

    served, refused = stand.client.portal.call(both)
    assert served.status_code == 200
    assert_problem(refused, 503, "saturated")
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_not_ready_and_draining_agents_are_503(stand: Stand, route: str) -> None:
    body: dict[str, Any] = {"content": infer_body(IMAGE)} if route == INFER else {"files": [FILE]}
    stand.agent.draining = True
    stand.wait_until(lambda: stand.client.get("/readyz").status_code == 503)
    assert_problem(stand.client.post(route, **body), 503, "not_ready")


# TorchServe 0.12's own error answers
TORCHSERVE = [
    (503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}, 503, "saturated"),
    (503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}, 500, "handler_failed"),
    (500, {"code": 500, "type": "InternalServerException", "message": "Worker died."}, 500, "handler_failed"),
    (507, {"code": 507, "type": "InternalServerException", "message": "oom"}, 500, "handler_failed"),
    (404, {"code": 404, "type": "ModelVersionNotFoundException", "message": "secret"}, 503, "not_ready"),
    (400, {"code": 400, "type": "InvalidKeyException", "message": "secret"}, 502, "engine_nonsense"),
    (405, {"code": 405, "type": "MethodNotAllowedException", "message": "secret"}, 502, "engine_nonsense"),
    (413, None, 413, "body_too_large"),
    (200, {"surprise": 1}, 502, "engine_nonsense"),
    (200, {"results": []}, 502, "engine_nonsense"),
    (200, {"results": [{"klass": "cat"}]}, 502, "engine_nonsense"),
    (200, None, 502, "engine_nonsense"),
    (302, None, 502, "engine_nonsense"),
]


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
@pytest.mark.parametrize(("status", "body", "public", "code"), TORCHSERVE)
def test_torchserves_own_answers_have_their_status_and_leak_nothing(
    stand: Stand, route: str, status: int, body: dict[str, Any] | None, public: int, code: str
) -> None:
    content = orjson.dumps(body) if body else b""
    stand.torchserve.answer = lambda request: httpx.Response(status, content=content)
    asked: dict[str, Any] = {"content": infer_body(IMAGE)} if route == INFER else {"files": [FILE]}
    answer = stand.client.post(route, **asked)
    assert_problem(answer, public, code)
    assert "Exception" not in answer.text
    assert "secret" not in answer.text
    assert public != 503 or "retry-after" in answer.headers


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_a_passed_deadline_is_504(make_stand: Callable[..., Stand], route: str) -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    stand = make_stand(upstream=never)
    asked: dict[str, Any] = {"content": infer_body(IMAGE)} if route == INFER else {"files": [FILE]}
    answer = stand.client.post(route, headers={"x-timeout-ms": "50"}, **asked)
    assert_problem(answer, 504, "deadline_passed")


def test_an_unexpected_exception_is_500_without_its_message(stand: Stand) -> None:
    def fault(request: httpx.Request) -> httpx.Response:
        raise RuntimeError("a secret path /srv/models")

    stand.torchserve.answer = fault
    answer = stand.client.post("/predict", content=IMAGE)
    assert_problem(answer, 500, "internal_error")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"inputs":[]}',
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["AA=="]}]}',
        b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1],"data":[1]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["not base64!"]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[2],"data":["AA=="]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[0],"data":[]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":"1","data":["AA=="]}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":5}}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}],"outputs":[{"name":"nope"}]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[%b1],"data":["AA=="]}]}' % (b"1," * 1_000_000),
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}],"outputs":[%b]}'
        % b",".join([b'{"name":"class"}'] * 3),
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}],"parameters":[]}',
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":[%b]}]}' % b",".join([b"[]"] * 1_000_000),
        b'{"id":5,"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["AA=="]}]}',
    ],
)
def test_a_broken_v2_call_is_400(stand: Stand, body: bytes) -> None:
    assert_problem(stand.client.post(INFER, content=body), 400, "bad_json")
