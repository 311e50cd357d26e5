from __future__ import annotations

import io
import json
import logging
import re
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contracts import model as model_contract
from contracts.model import Engine
from contracts.wire import (
    FRAMES_TYPE,
    MAX_ANSWER_BYTES,
    ImageOptions,
    Options,
    join_frames,
    parse_heatmap,
)
from handlers.build import BrokenArchive, verify_files, write_build
from handlers.image_handler import ImageHandler
from handlers.model import ServedModel, load_model
from handlers.preprocess import decode_for_network, normalise, prepare
from handlers.wire import Row

ROOT = Path(__file__).parents[2]
EXPLAIN = {"explain": "True"}


class Counting:
    """An engine that remembers how long its batches were."""

    def __init__(self, engine):
        self._engine, self.buffer, self.lengths = engine, engine.buffer, []

    def run(self, images):
        self.lengths.append(len(images))
        return self._engine.run(images)


def options(**values: object) -> dict:
    """The header that carries these options."""
    return {"x-gradserve": json.dumps(values)}


@pytest.fixture
def ask(model, context):
    """Sends rows of (body, headers) as one batch through TorchServe's context; gives (content type, body) per row."""
    handler = ImageHandler()
    handler._model = model

    def ask(*rows: tuple[bytes, dict]) -> list[tuple[str, bytes]]:
        made = context(*[headers for _, headers in rows])
        bodies = handler.handle([{"body": bytearray(body)} for body, _ in rows], made)
        return [(made.get_response_content_type(index), body) for index, body in enumerate(bodies)]

    return ask


def entries(answer: tuple[str, bytes]) -> list[dict]:
    content_type, body = answer
    assert content_type == "application/json"
    return json.loads(body)["results"]


def code(answer: tuple[str, bytes]) -> str:
    (entry,) = entries(answer)
    return entry["error"]["code"]


def test_a_prediction_names_the_most_probable_classes_in_order(ask, model, noise, encode):
    size = model.contract.input
    expected = model.engine.run(normalise(prepare(Image.fromarray(noise), size)[None], size)).probabilities[0]
    (entry,) = entries(ask((encode(noise), options(top_k=99)))[0])
    assert len(entry["top"]) == 10
    assert {"class": entry["class"], "confidence": entry["confidence"]} == entry["top"][0]
    assert all(a["confidence"] >= b["confidence"] for a, b in pairwise(entry["top"]))
    for label in entry["top"]:
        assert label["confidence"] == pytest.approx(expected[model.contract.classes.index(label["class"])], abs=1e-4)


def test_one_class_is_the_default(ask, noise, encode):
    assert len(entries(ask((encode(noise), {}))[0])[0]["top"]) == 1


def test_bad_images_do_not_touch_their_neighbours(ask, noise, encode):
    good = encode(noise)
    alone = entries(ask((good, {}))[0])
    answers = ask((good, {}), (b"text", {}), (good[:200], {}), (good, {}), (b"", {}))
    assert [entries(answers[i]) for i in (0, 3)] == [alone, alone]
    assert [code(answers[i]) for i in (1, 2, 4)] == ["image_unreadable"] * 3


def test_predictions_and_explanations_of_one_batch_each_get_their_own_kind(ask, noise, encode):
    data = encode(noise)
    answers = ask(
        (data, {}),
        (data, EXPLAIN),
        (data, EXPLAIN | options(format="json", target="cat", method="eigencam")),
        (b"text", EXPLAIN),
        (data, EXPLAIN | options(target="cow")),
        (data, EXPLAIN | options(method="magic")),
        (data, {"explain": "False"}),
        (b"", {"describe": "True"}),
    )
    assert set(entries(answers[0])[0]) == set(entries(answers[6])[0]) == {"class", "confidence", "top"}
    assert answers[1][0] == "image/png"
    assert Image.open(io.BytesIO(answers[1][1])).size == (40, 30)
    (explanation,) = entries(answers[2])
    assert (explanation["target"]["class"], explanation["method"]) == ("cat", "eigencam")
    assert [code(answers[i]) for i in (3, 4, 5)] == ["image_unreadable", "unknown_target", "unknown_method"]
    assert json.loads(answers[7][1])["contract"]["name"] == "tiny"


def asked(*images: dict, **values: object) -> dict:
    """The header of wire 2 that asks this of each image, for JSON."""
    return {"content-type": FRAMES_TYPE} | options(images=list(images), **{"format": "json"} | values)


def test_explanations_travel_with_predictions_in_one_request_and_one_forward(model, context, noise, encode):
    counting = Counting(model.engine)
    handler = ImageHandler()
    handler._model = ServedModel(model.contract, counting, model.load_explainer, model.evidence)
    images = [encode(noise), b"bad", encode(noise[:, ::-1].copy()), encode(noise)]
    made = context(
        asked({}, {"explain": True}, {"explain": True, "target": 3, "method": "cam"}, {"explain": True, "target": 99})
    )
    (body,) = handler.handle([{"body": bytearray(join_frames(images))}], made)
    predicted, bad, explained, unknown = json.loads(body)["results"]
    assert set(predicted) == {"class", "confidence", "top"}
    assert bad["error"]["code"] == "image_unreadable"
    assert unknown["error"]["code"] == "unknown_target"
    assert explained["target"]["class"] == "cat"
    assert explained["method"] == "cam"
    heat = np.frombuffer(b"".join(parse_heatmap(explained["heatmap"])), dtype=np.uint8).reshape(16, 24)
    assert heat.max() == (255 if explained["strength"] else 0)
    assert counting.lengths == [2]


def test_evidence_of_the_archive_is_in_predictions_explanations_and_examples(evident, noise, encode):
    data = [encode(noise), encode(np.zeros_like(noise))]
    predicted, explained = evident.answer(
        [
            Row("predict", Options(), data),
            Row("predict", Options(images=(ImageOptions(True, similar=2, coverage=0.9),) * 2, format="json"), data),
        ]
    )
    predictions, explanations = (json.loads(answer.body)["results"] for answer in (predicted, explained))
    for prediction, explanation in zip(predictions, explanations, strict=True):
        assert prediction["familiar"] == explanation["familiar"] == (explanation["familiarity"] >= 0.05)
        assert explanation["classes"][0] == {name: prediction[name] for name in ("class", "confidence")}
        similarities = [other["similarity"] for other in explanation["similar"]]
        assert similarities == sorted(similarities, reverse=True)
        assert [other["class"] for other in explanation["similar"]].count(prediction["class"]) == 2
    example = explanations[0]["similar"][0]["id"]
    (found, unknown) = evident.answer(
        [Row("example", Options(example=example)), Row("example", Options(example=10**6))]
    )
    assert found.content_type == "image/png"
    assert Image.open(io.BytesIO(found.body)).format == "PNG"
    assert json.loads(unknown.body)["results"][0]["error"]["code"] == "unknown_example"


def test_options_for_another_number_of_images_are_refused(ask, noise, encode):
    answer = ask((join_frames([encode(noise)] * 2), asked({"explain": True})))[0]
    assert [entry["error"]["code"] for entry in entries(answer)] == ["bad_options"] * 2


def test_a_row_of_many_images_has_one_entry_each_in_order(ask, encode):
    images = [encode(np.full((8, 8, 3), value, dtype=np.uint8)) for value in (0, 120, 255)]
    single = [entries(ask((image, options(top_k=10)))[0])[0] for image in images]
    together = entries(
        ask((join_frames([images[0], b"bad", *images[1:]]), {"content-type": FRAMES_TYPE} | options(top_k=10)))[0]
    )
    assert together[1]["error"]["code"] == "image_unreadable"
    for got, expected in zip([together[0], *together[2:]], single, strict=True):
        assert got["class"] == expected["class"]
        assert got["confidence"] == pytest.approx(expected["confidence"], abs=1e-4)


def test_all_good_images_of_a_batch_share_one_forward(model, noise, encode):
    engine = Counting(model.engine)
    data = encode(noise)
    ServedModel(model.contract, engine, model.load_explainer, model.evidence).answer(
        [Row("predict", images=[data, data, b"bad"]), Row("explain", images=[data]), Row("predict", images=[data])]
    )
    assert engine.lengths == [4]


def test_a_row_error_stands_once_for_each_of_its_images(ask, noise, encode):
    body = join_frames([encode(noise)] * 3)
    late = entries(ask((body, {"content-type": FRAMES_TYPE} | options(deadline=1)))[0])
    assert [entry["error"]["code"] for entry in late] == ["deadline_passed"] * 3
    assert code(ask((body[:-1], {"content-type": FRAMES_TYPE}))[0]) == "bad_frames"


def test_a_row_whose_deadline_passes_while_its_batch_is_decoded_is_dropped(model, noise, encode):
    class Slow:
        buffer = staticmethod(model.engine.buffer)

        def run(self, images):
            time.sleep(0.05)
            return model.engine.run(images)

    row = Row("explain", Options(deadline=int(time.time() * 1000) + 40), [encode(noise)])
    (answer,) = ServedModel(model.contract, Slow(), model.load_explainer, model.evidence).answer([row])
    assert json.loads(answer.body)["results"][0]["error"]["code"] == "deadline_passed"


def test_images_of_a_row_are_decoded_only_while_somebody_waits(model, encode, monkeypatch):
    """A row of many that are slow to decode would hold the worker until TorchServe kills it."""
    decoded = []

    def slow(data, size):
        decoded.append(data)
        time.sleep(0.05)
        return decode_for_network(data, size)

    monkeypatch.setattr("handlers.model.decode_for_network", slow)
    row = Row("predict", Options(deadline=int(time.time() * 1000) + 120), [encode(Image.new("RGB", (32, 32)))] * 16)
    (answer,) = ServedModel(model.contract, model.engine, model.load_explainer, model.evidence).answer([row])
    assert {entry["error"]["code"] for entry in json.loads(answer.body)["results"]} == {"deadline_passed"}
    assert len(decoded) < 6


def test_an_engine_that_fails_is_our_fault_and_tells_nothing(model, noise, encode, caplog):
    class Broken:
        buffer = staticmethod(model.engine.buffer)

        def run(self, images):
            raise RuntimeError("secret path /srv/model")

    answers = ServedModel(model.contract, Broken(), model.load_explainer, model.evidence).answer(
        [Row("predict", images=[encode(noise)]), Row("predict", images=[b"bad"])]
    )
    codes = [json.loads(answer.body)["results"][0]["error"]["code"] for answer in answers]
    assert codes == ["handler_failed", "image_unreadable"]
    assert b"secret" not in answers[0].body
    assert "secret path" in caplog.text


def test_no_answer_exceeds_torchserves_limit(model, encode, noise):
    """Many classes of long names for many images would; it would kill the worker."""
    classes = tuple(f"{number:03d}" + "x" * 9900 for number in range(10))
    wide = ServedModel(
        type(model.contract)(**{**vars(model.contract), "classes": classes}),
        model.engine,
        model.load_explainer,
        model.evidence,
    )
    row = Row("predict", Options(top_k=10), [encode(noise)] * 70)
    (answer,) = wide.answer([row])
    assert len(answer.body) < MAX_ANSWER_BYTES
    assert {entry["error"]["code"] for entry in json.loads(answer.body)["results"]} == {"bad_options"}


def test_warming_up_runs_every_path(model):
    model.warm_up(explains=True)


def test_a_worker_that_cannot_explain_is_refused_at_its_start_not_at_its_first_caller(model):
    class Broken:
        def heatmaps(self, *_):
            raise RuntimeError("no heatmap today")

    with pytest.raises(BrokenArchive, match="warm-up"):
        ServedModel(model.contract, model.engine, Broken, model.evidence).warm_up(explains=True)


def test_stages_are_timed_and_told_to_torchserve_once_a_second(model, context, noise, encode, caplog):
    handler = ImageHandler()
    handler._model = model
    model.take_seconds()
    made = context({}, EXPLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file open
        from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl  # noqa: PLC0415 - warns as `context` does

        made.metrics = MetricsCacheYamlImpl(str(ROOT / "config" / "torchserve" / "metrics.yaml"))
        made.metrics.initialize_cache()
    made.metrics.model_name, made.metrics.request_ids = "tiny", {0: "a", 1: "b"}
    with caplog.at_level(logging.INFO, "ts.metrics"):
        for _ in range(3):
            handler.handle([{"body": encode(noise)}] * 2, made)
    told = [record.message for record in caplog.records if "handler_seconds_total" in record.message]
    stages = [re.search(r"#stage:(\w+),model_version:\S+,ModelName:tiny,Level:Model", line)[1] for line in told]
    assert sorted(stages) == ["decode", "explain", "predict", "write"]
    assert set(model.take_seconds()) == set(stages), "the two batches since"


def load(folder):
    return load_model(folder, device="cpu", explains=False)


def test_an_unpacked_archive_becomes_a_served_model(unpacked, contract):
    served = load(unpacked)
    assert served.contract == contract
    description = json.loads(json.dumps(served.describe()))
    assert description["identity"] == verify_files(unpacked)
    assert description["engine"] == {"name": "eager", "precision": "fp32", "temperature": 1.0}
    assert description["is_fallback"] is False


def test_an_archive_that_computes_something_else_is_refused(unpacked):
    reference = json.loads((unpacked / "reference.json").read_text())
    row = reference["probabilities"][5]
    row[0], row[1] = row[0] + 0.01, row[1] - 0.01
    (unpacked / "reference.json").write_text(json.dumps(reference))
    write_build(unpacked)
    with pytest.raises(BrokenArchive, match=r"differ by 0\.01"):
        load(unpacked)


def test_the_fallback_is_used_loudly_and_checked_against_its_own_outputs(unpacked, contract, caplog):
    model_contract.save(
        replace(contract, engine=Engine("missing", "int8"), fallback=Engine()), unpacked / "contract.json"
    )
    write_build(unpacked)
    assert load(unpacked).describe()["is_fallback"] is True
    assert "falling back to eager fp32" in caplog.text


def test_without_a_fallback_an_engine_that_cannot_run_is_refused(unpacked, contract):
    model_contract.save(replace(contract, engine=Engine("missing", "int8")), unpacked / "contract.json")
    write_build(unpacked)
    with pytest.raises(RuntimeError, match="missing"):
        load(unpacked)


def test_an_archive_with_a_changed_file_is_not_served(unpacked):
    with (unpacked / "weights.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"x")
    with pytest.raises(BrokenArchive, match=r"weights\.safetensors is not what was packed"):
        load(unpacked)
