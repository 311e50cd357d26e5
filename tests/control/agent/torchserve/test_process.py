import re

import pytest

from control.agent.torchserve.process import render_config, worker_environment
from control.agent.torchserve.run_folder import RunFolder
from control.settings import AgentSettings


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "Büro ü") as folder:
        yield folder


def properties(settings, folder):
    """Return the configuration as Java reads it."""
    lines = (line for line in render_config(settings, folder).splitlines() if line and not line.startswith("#"))
    return {
        name: re.sub(r"(\\u[0-9a-f]{4})+", read_code_units, value) for name, value in (x.split("=", 1) for x in lines)
    }


def read_code_units(found):
    return bytes.fromhex(found[0].replace(r"\u", "")).decode("utf-16-be")


def test_inference_and_metrics_have_ports_and_management_has_a_private_socket(folder):
    config = properties(AgentSettings(inference_host="10.0.0.7"), folder)
    assert config["inference_address"] == "http://10.0.0.7:9101"
    assert config["metrics_address"] == "http://127.0.0.1:9103"
    assert config["management_address"] == f"unix:{folder.path}/management.sock"
    assert [name for name, value in config.items() if re.search(r"_(address|port)$", name)] == [
        "inference_address",
        "management_address",
        "metrics_address",
    ]


def test_models_come_from_the_agents_private_store_only(folder):
    config = properties(AgentSettings(), folder)
    assert config["allowed_urls"] == "^$"
    assert config["model_store"] == str(folder.store)


@pytest.mark.parametrize("name", ["Büro ü", "модели", "📷 images", "back\\slash", "a=b #c"])
def test_java_reads_the_same_path(tmp_path, name):
    with RunFolder(tmp_path / name) as folder:
        text = render_config(AgentSettings(), folder)
        assert text.isascii()
        assert properties(AgentSettings(), folder)["model_store"].replace(r"\\", "\\") == str(folder.store)


def test_no_value_contains_a_comment(folder):
    assert not [value for value in properties(AgentSettings(), folder).values() if " #" in value]


def test_workers_get_their_threads_and_no_secret(folder):
    environment = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x", "GATEWAY_KEYS": "y", "HANDLER_MODE": "z"}
    passed = worker_environment(environment, folder, threads=2)
    assert {"PATH", "HANDLER_MODE"} <= set(passed)
    assert not {"AWS_SECRET_ACCESS_KEY", "GATEWAY_KEYS"} & set(passed)
    assert passed["OMP_NUM_THREADS"] == "2"
