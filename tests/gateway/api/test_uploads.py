"""Images in request bodies: raw or in a form, of a type that may be an image, within the limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand

IMAGE = b"image-of-dog"
FILE = ("file", ("x.png", IMAGE, "image/png"))
IMAGE_ROUTES = ["/predict", "/explain"]
FILE_ROUTES = [*IMAGE_ROUTES, "/predict/batch"]
INFER = "/v2/models/cifar10/infer"


@pytest.mark.parametrize("route", [*FILE_ROUTES, INFER])
def test_an_empty_body_is_400(stand: Stand, route: str, assert_problem: Callable[..., None]) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"} if route == "/predict/batch" else {}
    assert_problem(stand.client.post(route, content=b"", headers=headers), 400, "empty_body")


@pytest.mark.parametrize("route", IMAGE_ROUTES)
def test_an_empty_multipart_body_is_400(stand: Stand, route: str, assert_problem: Callable[..., None]) -> None:
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
def test_a_wrong_missing_or_broken_multipart_is_400(
    stand: Stand, route: str, body: dict[str, Any], code: str, assert_problem: Callable[..., None]
) -> None:
    assert_problem(stand.client.post(route, **body), 400, code)


@pytest.mark.parametrize("route", IMAGE_ROUTES)
def test_more_than_one_file_is_400_where_one_is_taken(
    stand: Stand, route: str, assert_problem: Callable[..., None]
) -> None:
    assert_problem(stand.client.post(route, files=[FILE, FILE]), 400, "too_many_files")


@pytest.mark.parametrize("route", ["/predict/batch", INFER])
def test_more_files_than_a_batch_takes_is_400(
    make_stand: Callable[..., Stand], route: str, assert_problem: Callable[..., None]
) -> None:
    stand = make_stand(max_batch_images=2)
    answer = stand.client.post(route, **stand.body(route, *[IMAGE] * 3))
    assert_problem(answer, 400, "too_many_files")


@pytest.mark.parametrize("route", IMAGE_ROUTES)
@pytest.mark.parametrize("declares", [True, False])
def test_a_body_over_the_limit_is_413_declared_or_not(
    make_stand: Callable[..., Stand], route: str, declares: bool, assert_problem: Callable[..., None]
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
def test_a_file_over_the_limit_is_413(
    make_stand: Callable[..., Stand], route: str, assert_problem: Callable[..., None]
) -> None:
    client = make_stand(max_image_bytes=100).client
    assert_problem(client.post(route, files={"file": ("x", b"x" * 101)}), 413, "body_too_large")
    assert client.post(route, files={"file": ("x", b"x" * 100)}).status_code == 200


@pytest.mark.parametrize("route", ["/predict/batch", INFER])
def test_a_batch_over_the_limit_is_413(
    make_stand: Callable[..., Stand], route: str, assert_problem: Callable[..., None]
) -> None:
    stand = make_stand(max_batch_bytes=1000)
    answer = stand.client.post(route, **stand.body(route, b"x" * 600_000))
    assert_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize("route", FILE_ROUTES)
@pytest.mark.parametrize("declared", ["text/plain", "application/json", "image/svg+xml", "text/html; charset=utf-8"])
def test_a_declared_type_that_is_no_raster_image_is_415(
    stand: Stand, route: str, declared: str, assert_problem: Callable[..., None]
) -> None:
    raw = stand.client.post(route, content=IMAGE, headers={"content-type": declared})
    assert_problem(raw, 415, "media_type_unsupported")
    part = stand.client.post(route, files={"file": ("x", IMAGE, declared)})
    assert_problem(part, 415, "media_type_unsupported")
    form = "file=@1.png -F file=@2.png" if route == "/predict/batch" else "file=@image.png"
    assert raw.json()["detail"].endswith(f": curl -F {form} http://gateway{route}")


@pytest.mark.parametrize("route", ["/predict/batch", "/explain/batch"])
def test_a_file_of_a_batch_that_is_declared_as_no_image_is_named(
    stand: Stand, route: str, assert_problem: Callable[..., None]
) -> None:
    answer = stand.client.post(route, files=[FILE, ("file", ("notes.txt", IMAGE, "text/plain; charset=utf-8")), FILE])
    assert_problem(answer, 415, "media_type_unsupported")
    assert answer.json()["index"] == 1
    assert answer.json()["detail"].startswith("Image 1: the file 'notes.txt' is declared as 'text/plain', which is no ")
    assert not stand.torchserve.calls, "no image of the call is sent"


def test_a_host_with_shell_characters_is_not_in_the_curl_command(stand: Stand) -> None:
    headers = {"content-type": "application/json", "host": "x;reboot"}
    answer = stand.client.post("/predict", content=b"{}", headers=headers)
    assert answer.json()["detail"].endswith(": curl -F file=@image.png http://localhost/predict")


@pytest.mark.parametrize("declared", ["image/png", "application/octet-stream"])
def test_a_batch_that_is_no_form_is_415_with_the_right_curl_command(
    stand: Stand, declared: str, assert_problem: Callable[..., None]
) -> None:
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
