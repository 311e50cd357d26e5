"""Every error is in the tree of the module's docstring, and its sentence says what to do."""

import re
from pathlib import Path

import pytest

from control import errors
from control.errors import ControlError, NotAnswering


def kinds():
    return {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}


def test_the_modules_tree_names_every_error_below_its_parent():
    told, parents = {}, []
    for line in errors.__doc__.splitlines()[2:]:
        branch, _, rest = line.rpartition("── ")
        depth = len(branch.replace("├", "").replace("└", "")) // 4 + 1 if branch else 0
        for name in re.match(r"[A-Z]\w+(?:, [A-Z]\w+)*", rest)[0].split(", "):
            del parents[depth:]
            told[name] = parents[-1] if parents else "Exception"
            parents.append(name)
    assert told == {kind.__name__: kind.__bases__[0].__name__ for kind in kinds()}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.SignatureMissing(Path("m.mar"), Path("m.mar.sig")), "m.mar.sig is missing; create it with gradserve"),
        (errors.PortsTaken({9101: "TorchServe's inference"}), "port 9101"),
        (errors.NoGateway("http://gateway", "ConnectError"), "--archive FILE.mar"),
        (errors.NoPlan(Path("plan.json")), "gradserve up"),
        (errors.StoreNotWritable(Path("store"), "Read-only file system"), "set AGENT_MODEL_STORE"),
        (errors.FeedbackUnusable(Path("feedback.db"), "it is missing"), "feedback.db"),
        (
            errors.NotFollowed("promote 2.0", 120, "loading"),
            "promote 2.0: not done within 120 s (loading). The plan stays in force",
        ),
        (errors.MissingExtra("scipy", "gradserve replay", "training"), "training"),
    ],
)
def test_the_sentence_has_the_facts_and_the_remedy(error, sentence):
    assert isinstance(error, ControlError)
    assert sentence in str(error)


def test_a_start_that_was_given_up_says_whether_anything_still_changed():
    assert str(NotAnswering(12, "it crashed")) == "the stack answered no image within 12 s: it crashed"
    stalled = str(NotAnswering(400, "status 503", 240))
    assert "within 400 s: status 503; nothing changed for 240 s" in stalled
    assert "AGENT_LOAD_TIMEOUT_S" in stalled
