import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from training import recipe as recipes
from training.errors import TrainingError
from training.recipe import Augmentation, Cycle, Recipe, extended, rate_factor, recipe_from_dict, recipe_to_dict


def test_recipe_survives_its_stored_form():
    recipe = Recipe(
        sizes=((0.0, 24), (0.5, 32)),
        unfreeze=("layer4",),
        cycles=(Cycle(4, 0.05), Cycle(8, 0.02, ((0.0, 24),), Augmentation(1, 5, cutmix=0.5), 0.25)),
    )
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_released_recipe_is_valid_and_holds_5000_images_out():
    path = Path(recipes.__file__).with_name("released.toml")
    recipe = recipe_from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    recipes.check(recipe)
    assert recipe.validation * 50_000 == 5000


def test_mistyped_hyper_parameter_is_refused_with_the_known_ones():
    with pytest.raises(TrainingError, match=r"epoch'\].*epochs"):
        recipe_from_dict({"epoch": 3})


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": [24, 32]},
        {"epochs": "30"},
        {"unfreeze": 5},
        {"augmentation": {"magnitud": 9}},
        {"augmentation": {"erasing": "often"}},
        {"cycles": [5]},
        {"cycles": [{"epochs": 3, "rate": 0.1, "augmentation": {"erasing": "often"}}]},
        {"cycles": [{"epochs": 3, "rate": 0.1, "augmentation": {"mixup": 0.5}}]},
    ],
)
def test_value_of_the_wrong_form_is_refused(wrong):
    with pytest.raises(TrainingError):
        recipe_from_dict(wrong)


@pytest.mark.parametrize("name", ["my model", "../up", "", "a" * 65, "ünï"])
def test_name_that_no_archive_could_have_is_refused_before_the_training(name):
    with pytest.raises(TrainingError, match="--name"):
        recipes.check(Recipe(name=name))


def test_from_scratch_there_is_one_phase_that_trains_everything():
    (phase,) = Recipe(pretrained="none").phases()
    assert phase.trains("conv1.weight")
    assert phase.trains("fc.bias")


def test_transfer_trains_the_head_first_then_the_top_layers_at_their_own_rate():
    head, top = Recipe(pretrained="imagenet", rate=0.01, head_rate=0.1, unfreeze=("layer4",)).phases()
    assert [head.trains(name) for name in ("fc.weight", "layer4.0.conv1.weight")] == [True, False]
    assert [top.trains(name) for name in ("fc.weight", "layer4.0.conv1.weight", "layer3.0.conv1.weight")] == [
        True,
        True,
        False,
    ]
    assert (head.rate, top.rate) == (0.1, 0.01)


def test_all_unfreezes_the_whole_network():
    (everything,) = Recipe(pretrained="runs/best.pth", head_epochs=0, unfreeze=("all",)).phases()
    assert everything.trains("conv1.weight")
    assert everything.trains("fc.bias")


def test_cycles_train_what_the_last_phase_did_and_start_from_the_averaged_weights():
    cycles = (Cycle(4, 0.05), Cycle(8, 0.02, ((0.0, 24),)))
    first, second, third = Recipe(cycles=cycles).phases()
    assert (second.epochs, second.rate, second.trained, second.restarts) == (4, 0.05, first.trained, True)
    assert (third.name, third.sizes) == ("cycle 3", ((0.0, 24),))
    assert not first.restarts


def test_cycle_has_the_recipes_augmentation_and_warm_up_unless_it_names_its_own():
    own = Augmentation(2, 7, cutmix=0.5)
    cycles = (Cycle(4, 0.05), Cycle(8, 0.02, augmentation=own, warm_up=0.0))
    recipe = Recipe(augmentation=Augmentation(1, 5), warm_up=0.2, cycles=cycles)
    assert [phase.augmentation for phase in recipe.phases()] == [recipe.augmentation, recipe.augmentation, own]
    assert [phase.warm_up for phase in recipe.phases()] == [0.2, 0.2, 0.0]


def test_begun_training_takes_further_cycles_and_other_workers():
    begun = Recipe(cycles=(Cycle(4, 0.05),))
    wanted = replace(begun, workers=3, cycles=(*begun.cycles, Cycle(8, 0.02)))
    assert extended(begun, wanted) == wanted


@pytest.mark.parametrize("change", [{"rate": 0.3}, {"cycles": ()}, {"cycles": (Cycle(4, 0.01),)}])
def test_begun_training_refuses_to_change_what_was_done(change):
    begun = Recipe(cycles=(Cycle(4, 0.05),))
    with pytest.raises(TrainingError, match=f"cannot change {next(iter(change))}"):
        extended(begun, replace(begun, **change))


@pytest.mark.parametrize("cycle", [{"epochs": 3}, {"epochs": 3, "rate": 0.1, "size": 32}])
def test_cycle_with_a_missing_or_mistyped_value_is_refused(cycle):
    with pytest.raises(TrainingError, match="cycle"):
        recipe_from_dict({"cycles": [cycle]})


@pytest.mark.parametrize("name", ["layer5", " layer4", "head"])
def test_a_layer_that_there_is_not_cannot_be_unfrozen(name):
    with pytest.raises(TrainingError, match="layer4"):
        recipes.check(Recipe(unfreeze=("layer3", name)))


def test_rate_rises_to_its_peak_and_falls_to_zero_along_a_cosine():
    factors = [rate_factor(step, 100, warm_up=0.1) for step in range(100)]
    assert max(factors) == factors[10] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] < 0.001


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": ((0.5, 32),)},
        {"validation": 1.0},
        {"sizes": ((0.0, 32), (0.6, 24), (0.3, 16))},
        {"sizes": ((0.0, -8),)},
        {"batch_size": 0},
        {"workers": -1},
        {"head_epochs": -1},
        {"rate": -0.1},
        {"cycles": (Cycle(1, float("nan")),)},
        {"momentum": -1.0},
        {"weight_decay": -1.0},
        {"label_smoothing": 1.5},
        {"warm_up": 5.0},
        {"cycles": (Cycle(1, 0.1, warm_up=1.0),)},
        {"unfreeze": ("layer4.7",)},
        {"cycles": (Cycle(0, 0.1),)},
        {"augmentation": Augmentation(erasing=2.0)},
        {"augmentation": Augmentation(pixmix=-0.1)},
        {"sam_radius": -0.1},
        {"sam_from": 1.0},
        {"augmentation": Augmentation(magnitude=31)},
        {"cycles": (Cycle(1, 0.1, augmentation=Augmentation(cutmix=-0.1)),)},
        {"cycles": (Cycle(1, 0.1, blend=0.5),)},
        {"cycles": (Cycle(1, 0.1, blend=0.5),), "pretrained": "imagenet", "head_epochs": 0},
        {"cycles": (Cycle(1, 0.1), Cycle(1, 0.1, blend=1.0))},
        {"cycles": (Cycle(1, 0.1), Cycle(1, 0.1, blend=0.5)), "average": 0.0},
    ],
)
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(TrainingError):
        recipes.check(Recipe(**wrong))


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(momentum=1.5), "momentum is from 0, below 1, not 1.5"),
        (Recipe(precision="bf61"), "precision is one of auto, bf16, fp32, not 'bf61'"),
        (Recipe(cycles=(Cycle(1, 0.1), Cycle(1, -0.1))), "rate of cycle 3 is above 0, not -0.1"),
        (Recipe(augmentation=Augmentation(magnitude=31)), "magnitude of the augmentation is from 0, up to 30, not 31"),
    ],
)
def test_refusal_names_the_value_and_those_that_are_allowed(recipe, reason):
    with pytest.raises(TrainingError, match=reason):
        recipes.check(recipe)


@pytest.mark.parametrize("part", [Recipe, Augmentation, Cycle])
def test_every_number_declares_which_values_it_may_have(part):
    for item in fields(part):
        if str(item.type).startswith(("int", "float")):
            assert not recipes.option_of(item).allows(float("nan")), item.name
            assert not recipes.option_of(item).allows(-1), item.name


def test_defaults_are_allowed():
    recipes.check(Recipe())


def test_first_cycle_can_blend_with_weights_that_have_learnt():
    recipes.check(Recipe(pretrained="runs/best.pth", cycles=(Cycle(1, 0.1, blend=0.5),)))
