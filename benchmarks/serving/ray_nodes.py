"""Two Ray nodes in network namespaces of this machine, to be killed like machines. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent
WITHOUT = Path(__file__).with_name("without")
"""As PYTHONPATH, it hides a package from Ray that takes long to import: see the file in it."""
NETWORK = "10.199.77"
PORT = 6399
ADDRESS = f"{NETWORK}.1:{PORT}"
STORE_BYTES = 200_000_000
START_WITHIN_S = 240
STARTED = b"Ray runtime started."


@dataclass(frozen=True)
class Nodes:
    """A cluster of two nodes with one core each; `inside` begins a command that runs on the first one."""

    inside: tuple[str, ...]
    second: subprocess.Popen[bytes]

    def kill_second(self) -> None:
        """Kill all processes of the second node."""
        kill(self.second)


class NoNamespaces(RuntimeError):
    """This user or machine cannot make network namespaces."""

    def __init__(self) -> None:
        super().__init__("two nodes need network namespaces: run as root, with iproute2 installed")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Run the nodes during the block.

    Raises:
        NoNamespaces: this user or machine cannot make any.
        TimeoutError: Ray does not start.
    """
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise NoNamespaces
    names = [f"gradserve-{os.getpid()}-{end}" for end in "ab"]
    links = [f"gs{os.getpid()}{end}" for end in "ab"]
    with ExitStack() as made:
        for name in names:
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "delete", name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        nodes = []
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            address = f"{NETWORK}.{number}"
            _ip("link", "set", link, "netns", name)
            for change in (f"addr add {address}/24 dev {link}", f"link set {link} up", "link set lo up"):
                _ip("-n", name, *change.split())
            role = (
                ["--head", f"--port={PORT}", "--include-dashboard=false"] if number == 1 else [f"--address={ADDRESS}"]
            )
            sizes = ["--num-cpus=1", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
            command = [BIN / "ray", "start", "--block", f"--node-ip-address={address}", *role, *sizes]
            nodes.append(made.enter_context(_started([*_inside(name), *map(str, command)])))
        yield Nodes(_inside(names[0]), nodes[1])


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _inside(namespace: str) -> tuple[str, ...]:
    # Nobody else reaches the namespaces. With a token in ~/.ray, Ray asks for it at some of its ports and sends none.
    return ("ip", "netns", "exec", namespace, "env", "RAY_AUTH_MODE=disabled", f"PYTHONPATH={WITHOUT}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a node during the block, which begins when it has joined the cluster.

    A node ends if Ray's own agent takes more than 15 s to start, as on a busy machine; then it is started again.

    Raises:
        TimeoutError: it does not start.
    """
    end = time.monotonic() + START_WITHIN_S
    text = b""
    while time.monotonic() < end:
        with tempfile.NamedTemporaryFile() as said, ExitStack() as started:
            node = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
            started.callback(kill, node)
            while node.poll() is None and time.monotonic() < end:
                text = Path(said.name).read_bytes()
                if STARTED in text:
                    yield node
                    return
                time.sleep(0.2)
    raise TimeoutError(f"Ray did not start within {START_WITHIN_S} s: {text[-2000:].decode(errors='replace')}")
