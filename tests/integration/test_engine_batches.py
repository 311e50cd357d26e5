"""Any batch through the real TorchServe: every row gets its own right answer, whatever stands beside it.

Rows and the oracle are those of tests/handlers/test_batches.py; the contract's own version is served, on its engine.
"""

import importlib.util
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from contracts import model as model_contract
from handlers.archive import load_network
from handlers.engines import build_engine
from handlers.preprocess import normalise

pytestmark = [pytest.mark.server, pytest.mark.long]

_SPEC = importlib.util.spec_from_file_location(
    "handler_batches", Path(__file__).resolve().parents[1] / "handlers" / "test_batches.py"
)
rules = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rules)


@pytest.fixture(scope="module")
def stack(make_stack, model_source):
    """A stack of its own, whose TorchServe puts many rows into a batch; by default it hands over two."""
    mixing = make_stack(AGENT_BATCH_SIZE="16")
    mixing.start(model_source)
    mixing.wait_until_ready()
    return mixing


@pytest.fixture(scope="module")
def contract(model_source):
    return model_contract.load(model_source / "contract.json")


@pytest.fixture(scope="module")
def expected(model_source, contract):
    """Probabilities of each good image, by Pillow and the contract's engine alone, one image at a time."""
    engine = build_engine(
        contract.engine, lambda: load_network(model_source, contract), directory=model_source, device="cpu"
    )
    size, answers = contract.input, {}
    for data in rules.GOOD:
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((size.width, size.height), Image.Resampling.BILINEAR)
        answers[data] = engine.run(normalise(np.asarray(image)[None], size)).probabilities[0]
    return answers


@pytest.fixture(scope="module")
def send(stack, contract):
    """Sends a batch to one TorchServe entry, whose batches mix its rows; the gateway would hold some back."""
    with (
        httpx.Client(limits=httpx.Limits(max_connections=32), timeout=120) as client,
        ThreadPoolExecutor(32) as pool,
    ):

        def one(row: dict) -> httpx.Response:
            part, headers = rules.sent(row)
            route = "explanations" if row["kind"] == "explain" else "predictions"
            return client.post(
                f"{stack.inference}/{route}/{contract.name}/{contract.version}",
                content=bytes(part["body"]),
                headers={"content-type": headers["body"]["content-type"], "x-gradserve": headers["x-gradserve"]},
            )

        yield lambda batch: list(pool.map(one, batch))


def hold_all(batch, answers, contract, expected) -> None:
    for row, answer in zip(batch, answers, strict=True):
        assert answer.status_code == 200, answer.text
        rules.hold(row, answer.headers["content-type"], answer.content, contract, expected)


@settings(
    max_examples=int(os.environ.get("GRADSERVE_TEST_SERVER_BATCHES", "200")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(batch=rules.batches)
def test_every_row_of_any_batch_gets_its_own_right_answer_through_torchserve(batch, send, contract, expected):
    hold_all(batch, send(batch), contract, expected)


def test_answers_that_change_places_are_noticed(send, contract, expected):
    """The test above could not fail if its oracle held for a neighbour's answer too."""
    batch = [{"kind": "predict", "deadline": None, "images": [data], "top_k": 3} for data in rules.GOOD]
    answers = send(batch)
    hold_all(batch, answers, contract, expected)
    for first in range(len(batch)):
        for second in range(first):
            swapped = list(answers)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            with pytest.raises(AssertionError):
                hold_all(batch, swapped, contract, expected)
