import pytest

from control.gate import _groups


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([0] * 70, [32, 32, 6]), ([3, 3, 3], [2, 1]), ([9, 1, 9], [1, 1, 1]), ([], [])],
)
def test_no_call_holds_more_pictures_or_megabytes_than_a_gateway_takes(tmp_path, monkeypatch, sizes, counts):
    monkeypatch.setattr("control.gate._BYTES_AT_ONCE", 8)
    pictures = []
    for number, size in enumerate(sizes):
        path = tmp_path / str(number)
        path.write_bytes(bytes(size))
        pictures.append((path, "cat"))
    groups = list(_groups(pictures))
    assert [len(group) for group in groups] == counts
    assert [picture for group in groups for picture in group] == pictures
