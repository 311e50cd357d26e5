from pathlib import Path

import pytest

from control.pipeline import _name_of


@pytest.mark.parametrize(
    ("folder", "name"), [("pets", "pets"), ("my pets/", "my-pets"), ("../Été 2026", "t-2026"), ("…", "pictures")]
)
def test_a_model_of_own_pictures_is_named_after_their_folder(folder, name):
    assert _name_of(Path(folder)) == name
