import json
import shlex
import threading
import time
from itertools import chain, repeat
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from contracts import status as agent_status
from contracts.status import AgentStatus, Pool, ServerStatus, VersionStatus
from control.errors import BadSetting, NotAnswering
from control.settings import AgentSettings
from control.stack.stack import Ready, StackOptions, _greeting, run_stack, wait_until_ready


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("GATEWAY_WORKER", "2", "GATEWAY_WORKER is no setting; the nearest known one is GATEWAY_WORKERS"),
        ("GATEWAY_KEYS", "alice", "GATEWAY_KEYS: "),
        ("GATEWAY_KEYS_FILE", "/nowhere/keys.json", "`gradserve keys` makes it"),
        ("GATEWAY_RATE_PER_ADDRESS", "many", "write like 600/minute"),
    ],
)
def test_a_setting_that_the_gateway_would_refuse_is_refused_before_anything_is_made(
    name, value, reason, monkeypatch, tmp_path
):
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSetting, match=reason):
        run_stack(StackOptions(tmp_path / "home", 0), print, pytest.fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("requires_key", [False, True])
def test_the_printed_lines_are_commands_whatever_the_images_path(requires_key, monkeypatch):
    monkeypatch.delenv("GATEWAY_HOST", raising=False)
    image = Path("/tmp/Büro ü/it's here.png")
    text = _greeting(StackOptions(Path("home"), 8123), image, Ready(requires_key), None)
    first, *lines = text.splitlines()
    assert first == "ready: http://127.0.0.1:8123"
    for line, route in zip(lines[:2], ("predict", "explain"), strict=True):
        command = shlex.split(line)
        assert command[:2] == ["curl", "-f"]
        assert command[command.index("-F") + 1] == f"file=@{image}"
        assert f"http://127.0.0.1:8123/{route}" in command
        assert ("x-api-key: YOUR_KEY" in command) == requires_key


def page(server="running", state="loading", ready=0, reason=None):
    """The agent's page while its stable version starts."""
    version = VersionStatus("m", "1.0", "stable", state, routable=False, predict=Pool(ready, 8), explain=Pool(),
                            reason=reason)  # fmt: skip
    status = AgentStatus(time.time(), draining=False, torchserve=ServerStatus(server, 0, "http://torchserve:8080"),
                         versions=(version,), plan_revision=1)  # fmt: skip
    return json.dumps(agent_status.dump(status)).encode()


@pytest.fixture
def start(serve, monkeypatch, tmp_path):
    """`start(pages, until)`: wait for an agent with these pages, and a gateway that answers from the time on."""
    monkeypatch.setattr("control.stack.stack.STALLED_AFTER_S", 0.2)
    image = tmp_path / "image.png"
    image.write_bytes(b"image")

    def start(pages, until):
        pages, began = iter(pages), time.monotonic()
        agent = serve(lambda _: (200, next(pages)))
        gateway = serve(lambda _: (200 if time.monotonic() - began > until else 503, b"not ready"))
        settings = AgentSettings(port=urlsplit(agent).port, load_timeout_s=0.2)
        return wait_until_ready([], settings, gateway, image, threading.Event())

    return start


def test_a_start_that_makes_progress_is_waited_for_however_long_it_takes(start):
    """Each look at the agent finds one more worker ready; the whole takes longer than any of it may."""
    assert start((page(ready=ready) for ready in range(100)), until=1.0) == Ready(requires_key=False)


@pytest.mark.parametrize(
    "pages", [[page()], [page("starting"), page("backoff")]], ids=["nothing changes", "TorchServe ends again and again"]
)
def test_a_start_without_progress_is_given_up_with_the_last_state(start, pages):
    with pytest.raises(NotAnswering, match=r"status 503, not ready; nothing changed for .*AGENT_LOAD_TIMEOUT_S"):
        start(chain.from_iterable(repeat(pages)), until=60)


def test_a_version_that_the_agent_gave_up_ends_the_start_with_its_reason(start):
    with pytest.raises(NotAnswering, match=r"its weights are broken$"):
        start(repeat(page(state="failed", reason="its weights are broken")), until=60)
