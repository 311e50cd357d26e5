import json

import pytest

from control.errors import GateUnusable, Refused
from control.release.accuracy_gate import Gate, _groups


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([0] * 70, [32, 32, 6]), ([3, 3, 3], [2, 1]), ([9, 1, 9], [1, 1, 1]), ([], [])],
)
def test_no_call_exceeds_the_images_or_bytes_that_a_gateway_accepts(tmp_path, monkeypatch, sizes, counts):
    monkeypatch.setattr("control.release.accuracy_gate._MAX_BYTES", 8)
    images = []
    for number, size in enumerate(sizes):
        path = tmp_path / str(number)
        path.write_bytes(bytes(size))
        images.append((path, "cat"))
    groups = list(_groups(images))
    assert [len(group) for group in groups] == counts
    assert [image for group in groups for image in group] == images


CAT, NONE = {"class": "cat", "confidence": 0.9}, {"error": {"code": "image_unreadable"}}


@pytest.fixture
def gate(serve, tmp_path):
    """`gate(of_new, of_stable)`: a folder of three files, and a gateway whose versions give these answers."""

    def gate(of_new, of_stable):
        answers = [of_new, of_stable]
        (tmp_path / "cat" / ".hidden").mkdir(parents=True)
        for name in ("1.png", "2.png", "notes.txt", ".hidden/3.png"):
            (tmp_path / "cat" / name).write_bytes(b"x")
        url = serve(lambda _: (200, json.dumps({"results": answers.pop(0)}).encode()))
        return Gate(tmp_path, url, None, 0.005)

    return gate


def test_files_that_neither_version_can_read_are_skipped_and_named(gate, tmp_path):
    lines = []
    found = gate([CAT, CAT, NONE], [CAT, CAT, NONE]).judge("1.0", "2.0", lines.append)
    assert found == "accuracy 100.00% of 2 images, 1.0 has 100.00%, 1 files skipped"
    assert lines == [f"skipped {tmp_path / 'cat' / 'notes.txt'}: not an image"]


def test_a_version_that_cannot_read_an_image_of_the_other_is_refused(gate):
    with pytest.raises(Refused, match=r"2\.0 cannot read .*2\.png"):
        gate([CAT, NONE, NONE], [CAT, CAT, NONE]).judge("1.0", "2.0", print)


def test_a_folder_with_mostly_other_files_is_refused(gate):
    with pytest.raises(GateUnusable, match=r"2 of 3 files are no images"):
        gate([CAT, NONE, NONE], [CAT, NONE, NONE]).judge("1.0", "2.0", print)
