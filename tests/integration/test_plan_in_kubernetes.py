"""A real agent, TorchServe and gateway follow a plan in a ConfigMap and serve an archive that the agent fetched."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from control.stack.stack import pack

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.server, pytest.mark.long]


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def classify(gateway):
    sample = (ROOT / "tests" / "samples" / "cat" / "0.png").read_bytes()
    return httpx.post(f"{gateway}/predict", files={"file": sample}, timeout=20, trust_env=False)


def test_the_first_deploy_writes_the_plan_and_calls_are_served_also_while_the_api_is_away(
    cluster, cluster_url, tmp_path, tmp_path_factory
):
    port, *ports = free_ports(4)
    gateway = f"http://127.0.0.1:{port}"
    source = pack(ROOT / "model_store" / "released", tmp_path / "elsewhere").as_uri()
    env = {name: text for name, text in os.environ.items() if not name.startswith(("AGENT_", "GATEWAY_", "GRADSERVE_"))}
    env |= dict(zip(("AGENT_PORT", "AGENT_INFERENCE_PORT", "AGENT_METRICS_PORT"), map(str, ports), strict=True))
    env |= {
        "GRADSERVE_KUBERNETES_API": cluster_url,
        **dict.fromkeys(("GRADSERVE_PLAN", "GATEWAY_PLAN", "AGENT_PLAN"), "kubernetes:default/plan"),
        "GRADSERVE_HOME": str(tmp_path / "home"),
        "AGENT_TEMP": str(tmp_path_factory.mktemp("t")),
        "AGENT_CACHE": str(tmp_path / "cache"),
        "AGENT_MODEL_STORE": str(tmp_path / "empty"),
        "AGENT_WORKERS": "1",
        "GATEWAY_PORT": str(port),
        "GATEWAY_AGENTS": f"http://127.0.0.1:{ports[0]}",
    }
    command = [sys.executable, "-m", "control.cli.main"]
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "gateway.app:create_app()"]
    started = [subprocess.Popen(each, cwd=ROOT, env=env) for each in ([*command, "agent"], gunicorn)]
    try:
        operator = {**env, "AGENT_MODEL_STORE": str(tmp_path / "operator")}
        deploy = [*command, "deploy", source, "--model", "cifar10"]
        done = subprocess.run(deploy, cwd=ROOT, env=operator, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr
        assert "revision 1" in done.stdout
        assert len(list((tmp_path / "cache").glob("*.mar"))) == 1
        end = time.monotonic() + 10
        while (answer := classify(gateway)).status_code != 200 and time.monotonic() < end:
            time.sleep(0.1)
        assert answer.json()["class"] == "cat"
        cluster.fail = 503
        cluster.end_watches()
        time.sleep(2)
        assert classify(gateway).status_code == 200
        (reason,) = httpx.get(f"{gateway}/health", trust_env=False).json()["reasons"]
        assert "cannot be followed" in reason
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in started] == [0, 0]
