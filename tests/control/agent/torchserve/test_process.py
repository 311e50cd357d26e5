import pytest

from control.agent.torchserve.log import ServerLog
from control.agent.torchserve.process import TorchServeProcess, render_config, worker_environment
from control.errors import TempTooLong
from control.settings import AgentSettings


def properties(settings):
    lines = (line for line in render_config(settings).splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def test_every_address_but_inference_is_on_loopback():
    config = properties(AgentSettings(inference_host="10.0.0.7"))
    assert config["inference_address"] == "http://10.0.0.7:9101"
    assert config["management_address"] == "http://127.0.0.1:9102"
    assert config["grpc_inference_address"] == config["grpc_management_address"] == "127.0.0.1"


def test_models_come_from_the_local_store_only(tmp_path):
    config = properties(AgentSettings(model_store=tmp_path))
    assert config["allowed_urls"] == "^$"
    assert config["model_store"] == str(tmp_path)


def test_no_value_carries_a_comment():
    assert not [value for value in properties(AgentSettings()).values() if " #" in value]


def test_workers_get_no_secret_and_their_share_of_the_cores(tmp_path):
    environment = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x", "GATEWAY_KEYS": "y", "HANDLER_MODE": "z"}
    passed = worker_environment(environment, tmp_path, threads=2)
    assert {"PATH", "HANDLER_MODE"} <= set(passed)
    assert not {"AWS_SECRET_ACCESS_KEY", "GATEWAY_KEYS"} & set(passed)
    assert passed["OMP_NUM_THREADS"] == "2"


def test_a_folder_too_deep_for_sockets_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(TempTooLong, match="AGENT_TEMP"):
        TorchServeProcess(AgentSettings(temp=tmp_path / ("x" * 90)), ServerLog(), threads=1)
