import socket

import pytest

from control.errors import BadSetting, PortsTaken
from control.settings import PORTS, AgentSettings
from control.stack.ports import free_port, mlflow_port, refuse_taken_ports, with_free_ports
from control.stack.stack import StackOptions, stack_processes, wanted_ports


@pytest.fixture
def taken():
    """A port in use."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture
def settings(monkeypatch):
    """`settings(**environment)`: the agent's settings in an environment without other ports."""

    def settings(**environment):
        for field in PORTS:
            monkeypatch.delenv(f"AGENT_{field.upper()}", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return AgentSettings()

    return settings


def test_unset_private_ports_are_replaced_if_one_is_taken(settings, tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        first = settings().model_copy(update={"inference_port": other.getsockname()[1]})
        first.model_fields_set.discard("inference_port")
        found = with_free_ports(first, {8000})
    ports = {getattr(found, field) for field in PORTS}
    assert len(ports) == len(PORTS)
    assert not ports & {getattr(first, field) for field in PORTS} | ports & {8000}
    environment = stack_processes(found, StackOptions(tmp_path, 8000), tmp_path)[0].environment
    assert environment["AGENT_INFERENCE_PORT"] == str(found.inference_port)
    assert environment["GATEWAY_AGENTS"] == f"http://127.0.0.1:{found.port}"


def test_a_set_port_that_is_taken_is_refused_with_its_variable(settings, taken, tmp_path):
    found = with_free_ports(settings(AGENT_INFERENCE_PORT=taken), {8000})
    assert found.inference_port == taken
    with pytest.raises(PortsTaken, match=f"port {taken} .TorchServe's inference, moved by AGENT_INFERENCE_PORT"):
        refuse_taken_ports(wanted_ports(found, StackOptions(tmp_path, free_port(set()))))


def test_a_taken_public_port_is_refused_with_its_variable(settings, taken, tmp_path):
    found = with_free_ports(settings(), {taken})
    with pytest.raises(PortsTaken, match=f"port {taken} .the gateway, moved by PORT") as refused:
        refuse_taken_ports(wanted_ports(found, StackOptions(tmp_path, taken)))
    assert list(refused.value.ports) == [taken]


def test_mlflow_port_sets_the_port_of_mlflows_page(taken, monkeypatch):
    monkeypatch.setenv("MLFLOW_PORT", str(taken))
    assert mlflow_port(set()) == taken
    monkeypatch.setenv("MLFLOW_PORT", "mlflow")
    with pytest.raises(BadSetting, match="MLFLOW_PORT = 'mlflow'"):
        mlflow_port(set())
    monkeypatch.delenv("MLFLOW_PORT")
    assert mlflow_port({5000}) != 5000
