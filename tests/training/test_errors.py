"""Every error is in the tree of the module's docstring, and its sentence says what to do."""

import re
from pathlib import Path

from training import errors
from training.errors import CorruptData, HeatmapsAlike, NoSource, TrainingError


def test_the_modules_tree_names_every_error_below_its_parent():
    told, parents = {}, []
    for line in errors.__doc__.splitlines()[2:]:
        branch, _, rest = line.rpartition("── ")
        depth = len(branch) // 4 + 1 if branch else 0
        del parents[depth:]
        name = rest.split()[0]
        told[name] = parents[-1] if parents else "RuntimeError"
        parents.append(name)
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TrainingError)}
    assert told == {kind.__name__: kind.__bases__[0].__name__ for kind in kinds}


def test_data_that_cannot_be_fetched_is_named_with_the_way_to_bring_it():
    text = str(NoSource(["npm is not installed", "no route to host"], "https://example.org/cifar.tar.gz"))
    assert re.search(r"npm is not installed; no route to host.*https://example\.org.*--data cifar10:/path", text)
    assert "delete it or pass another file" in str(CorruptData(Path("c.tar.gz"), "a pixel differs"))


def test_heatmaps_that_are_alike_are_told_with_the_figure_the_limit_and_three_remedies():
    error = HeatmapsAlike("layer4", "cam", 0.987, limit=0.9, images=50)
    for part in ("0.99 on 50 held-out images, above 0.9", "--explain-images", "train longer", "--max-alike 1"):
        assert part in str(error)
    assert error.correlation == 0.987
