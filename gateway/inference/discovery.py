"""Find the replicas: the agents that `GATEWAY_AGENTS` lists, with every host name resolved to its addresses.

A name may have several addresses: a service of Docker Compose with several containers, or a headless Service of
Kubernetes. Each address is one replica. Names are resolved again every `RESOLVE_EVERY_S`, because replicas come and go.

`kubernetes:NAMESPACE/SERVICE:PORT` stands for the endpoints of a Service, which are followed by watch.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import httpx

from gateway.kubernetes.addresses import is_address
from gateway.kubernetes.endpoints import watch_endpoints

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from gateway.kubernetes.endpoints import WatchedEndpoints

logger = logging.getLogger(__name__)
RESOLVE_EVERY_S = 3.0
# A name server that does not answer must not delay the polls of the replicas that are known.
RESOLVE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Address:
    """The address of one agent: its URL, and the host name that it was found by (empty if it was listed itself)."""

    url: str
    name: str = ""


Resolve: TypeAlias = "Callable[[str, int], Awaitable[list[str]]]"


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of `host`: the IPv4 ones if there are any, else the IPv6 ones.

    A replica with both would otherwise count twice.

    Raises:
        OSError: the name has no address, or the name server does not answer.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = {
        family: sorted({str(sockaddr[0]) for each, _, _, _, sockaddr in found if each == family})
        for family in (socket.AF_INET, socket.AF_INET6)
    }
    return hosts[socket.AF_INET] or hosts[socket.AF_INET6]


class Discovery:
    """The addresses of the agents at `urls`.

    `resolve` returns the addresses of a host name, `watch` a reader of a Service's endpoints; tests pass in both.

    Raises:
        ValueError: a URL with the prefix `kubernetes:` names no Service.
        NotInCluster: a Service is named, and no API server is known.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        resolve: Resolve = resolve_host,
        watch: Callable[[str], WatchedEndpoints] = watch_endpoints,
    ) -> None:
        self._resolve = resolve
        listed = tuple(urls)
        self._services = {url: watch(url) for url in listed if is_address(url)}
        self._found: dict[str, tuple[Address, ...]] = {url: (() if _named(url) else (Address(url),)) for url in listed}

    @property
    def is_fixed(self) -> bool:
        """True if `find` always returns the same: no address has a host name or stands for a Service."""
        return not any(map(_named, self._found))

    @property
    def has_changed(self) -> bool:
        """True if a watch has brought other addresses than `find` returned last."""
        return any(service.has_changed for service in self._services.values())

    def listed(self) -> tuple[Address, ...]:
        """Return the addresses that were found last, each once."""
        return tuple({address.url: address for found in self._found.values() for address in found}.values())

    async def find(self) -> tuple[Address, ...]:
        """Resolve every host name and return the addresses; a name that cannot be resolved keeps its last ones.

        The endpoints of a Service are those that its watch brought last.
        """
        for url, service in self._services.items():
            service.start()
            await asyncio.to_thread(service.wait, RESOLVE_TIMEOUT_S)  # only the first time it lasts
            self._found[url] = tuple(map(Address, service.urls()))
        names = (url for url in self._found if url not in self._services and _named(url))
        await asyncio.gather(*(self._find(url) for url in names))
        return self.listed()

    def close(self) -> None:
        """End the watches."""
        for service in self._services.values():
            service.close()

    async def _find(self, url: str) -> None:
        parsed = httpx.URL(url)
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                hosts = await self._resolve(parsed.host, parsed.port or 80)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            logger.warning("the agents' host name %s cannot be resolved (%s)", parsed.host, type(error).__name__)
            return
        self._found[url] = tuple(Address(str(parsed.copy_with(host=host)), parsed.host) for host in hosts)


def _named(url: str) -> bool:
    """Return True if the URL stands for addresses to find: its host is a name to resolve, or it names a Service.

    Of HTTPS the certificate names the host, so that it is kept; `localhost` is one machine with two addresses.
    """
    if is_address(url):
        return True
    parsed = httpx.URL(url)
    if parsed.scheme != "http" or parsed.host == "localhost":
        return False
    try:
        ipaddress.ip_address(parsed.host)
    except ValueError:
        return True
    return False
