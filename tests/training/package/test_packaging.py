import pytest

from handlers.errors import EngineError
from training.package.packaging import choose_engine, package


@pytest.mark.parametrize(
    ("name", "precision", "chosen"),
    [
        (None, "fp32", "eager"),
        (None, "bf16", "openvino"),
        (None, "int8", "openvino"),
        ("eager", "fp32", "eager"),
        ("openvino", "fp32", "openvino"),
        ("openvino", "int8", "openvino"),
    ],
)
def test_engine_follows_from_the_precision_unless_it_is_named(name, precision, chosen):
    assert choose_engine(name, precision) == chosen


@pytest.mark.parametrize(
    ("name", "precision", "reason"),
    [
        ("onnx", "fp32", "no engine 'onnx': pass --engine eager or openvino"),
        ("eager", "int8", "eager is packed in fp32, not in 'int8'"),
        (None, "fp16", "openvino is packed in fp32, bf16, int8, not in 'fp16'"),
    ],
)
def test_engine_that_cannot_be_packed_is_refused_before_the_model_is_read(name, precision, reason, tmp_path):
    with pytest.raises(EngineError, match=reason):
        package("nowhere", "1", tmp_path, tmp_path / "files", tmp_path, precision=precision, engine=name)
    assert not list(tmp_path.iterdir())
