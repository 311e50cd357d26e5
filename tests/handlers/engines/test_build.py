from __future__ import annotations

import pytest

from contracts.model import Engine
from handlers.engines import build_engine
from handlers.engines.eager import EagerEngine
from handlers.engines.openvino import OpenVINOEngine
from handlers.errors import EngineError


def test_the_network_is_loaded_only_for_an_engine_that_needs_it(network, logits_alone):
    loaded = []

    def load():
        loaded.append(network)
        return network

    assert isinstance(build_engine(Engine("openvino"), load, directory=logits_alone, device="cpu"), OpenVINOEngine)
    assert loaded == []
    assert isinstance(build_engine(Engine(), load, directory=logits_alone, device="cpu"), EagerEngine)
    assert loaded == [network]


def test_an_engine_that_needs_the_network_and_has_none_is_refused(tmp_path):
    with pytest.raises(EngineError, match="needs the network"):
        build_engine(Engine(), None, directory=tmp_path, device="cpu")


def test_an_unknown_engine_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(EngineError, match="unknown engine 'none': use eager or openvino"):
        build_engine(Engine("none"), None, directory=tmp_path, device="cpu")
