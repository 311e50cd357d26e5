"""Names that become parts of file names and of paths at TorchServe."""

import pytest

from contracts.names import ARCHIVE, EXPLAIN_SUFFIX, NAME, VERSION


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a\n", "-a", "a?b", "a%2fb", "é", "a" * 65])
def test_nothing_that_a_path_or_a_query_could_be_made_of_is_a_name(name):
    assert not NAME.fullmatch(name)
    assert not VERSION.fullmatch(name)
    assert not ARCHIVE.fullmatch(f"{name}.mar") or name == "a" * 65  # an archive is named after both


def test_what_training_packs_has_a_name():
    assert NAME.fullmatch("cifar10")
    assert VERSION.fullmatch("1.0.0-rc.1+cpu")
    assert ARCHIVE.fullmatch("cifar10-1.0.0-rc.1+cpu.mar")


def test_the_entry_that_explains_a_model_has_a_name_too():
    assert NAME.fullmatch("cifar10" + EXPLAIN_SUFFIX)
    assert NAME.fullmatch("a" * (64 - len(EXPLAIN_SUFFIX)) + EXPLAIN_SUFFIX)
