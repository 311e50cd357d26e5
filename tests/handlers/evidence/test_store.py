from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from handlers.build import BrokenArchive
from handlers.evidence.store import EVIDENCE, read_store, unit_vectors


def test_half_precision_is_read_as_float32_and_other_types_stay(tmp_path):
    save_file({"features": np.eye(2, dtype=np.float16), "labels": np.array([0, 1], np.int32)}, tmp_path / EVIDENCE)
    store = read_store(tmp_path)
    assert {name: tensor.dtype for name, tensor in store.items()} == {"features": np.float32, "labels": np.int32}
    np.testing.assert_array_equal(store["features"], np.eye(2))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_missing_or_damaged_file_says_to_pack_again(tmp_path, content):
    if content is not None:
        (tmp_path / EVIDENCE).write_bytes(content)
    with pytest.raises(BrokenArchive, match=r"evidence\.safetensors .*pack the model again"):
        read_store(tmp_path)


def test_unit_vectors_have_length_one_and_zeros_stay_zeros():
    unit = unit_vectors(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_evidence_needs_no_torch():
    modules = ("answer_set", "familiar", "similar", "store")
    code = "import sys\n" + "".join(f"import handlers.evidence.{name}\n" for name in modules)
    code += "assert not {'torch', 'torchvision', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
