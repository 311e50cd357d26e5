from pathlib import Path

import pytest

from control.cli.train import _name_of, train
from control.errors import ControlError


@pytest.mark.parametrize(
    ("folder", "name"), [("pets", "pets"), ("my pets/", "my-pets"), ("../Été 2026", "t-2026"), ("…", "images")]
)
def test_a_model_of_own_images_is_named_after_their_folder(folder, name):
    assert _name_of(Path(folder)) == name


def test_a_training_that_goes_on_takes_no_other_folder(tmp_path):
    with pytest.raises(ControlError, match="leave --output out"):
        train(resume=tmp_path, output=tmp_path / "other")
