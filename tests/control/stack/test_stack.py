import shlex
from pathlib import Path

import pytest

from control.stack.stack import Ready, StackOptions, _greeting


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
