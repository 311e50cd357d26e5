"""Ask agents for their status."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from contracts import status as agent_status
from contracts.status import AgentStatus, StatusError

if TYPE_CHECKING:
    from collections.abc import Iterable

TIMEOUT_S = 3.0


@dataclass(frozen=True)
class AgentAnswer:
    """The answer of the agent at `url`: its status, or in `error` the reason why there is none.

    `age_s` is the age of its observation of TorchServe in seconds, by this machine's clock.
    """

    url: str
    status: AgentStatus | None = None
    error: str = ""
    age_s: float = 0.0

    @property
    def serves(self) -> bool:
        """Return True if the agent answers and has a stable version that gateways may send to."""
        return self.status is not None and self.status.serves()

    def dump(self) -> dict[str, Any]:
        """Return it as JSON-able data: `url` and `error`, or `url`, `age_s` and the status."""
        if self.status is None:
            return {"url": self.url, "error": self.error}
        return {"url": self.url, "age_s": self.age_s, **agent_status.dump(self.status)}


def ask_agent(url: str) -> AgentAnswer:
    """Return the status of the agent at `url`, or the reason why there is none."""
    try:
        status = agent_status.parse(_read(f"{url}/status"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return AgentAnswer(url, error=f"does not answer ({type(error).__name__})")
    except StatusError as error:
        return AgentAnswer(url, error=f"does not answer with a status ({error})")
    return AgentAnswer(url, status, age_s=round(max(0.0, time.time() - status.observed_at), 1))


def ask_agents(urls: Iterable[str]) -> list[AgentAnswer]:
    """Return the answer of each agent, in the order of `urls`; they are asked in parallel."""
    asked = list(urls)
    with ThreadPoolExecutor(max(1, len(asked))) as threads:
        return list(threads.map(ask_agent, asked))


def _read(url: str) -> bytes:
    """Return the page at `url`; reading stops after more than a status may have."""
    content = b""
    with (
        httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client,
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        for part in response.iter_bytes():
            content += part
            if len(content) > agent_status.MAX_BYTES:
                break
    return content
