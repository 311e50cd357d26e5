"""The addresses behind a Service: its EndpointSlices, followed by watch.

All of them count, also those of pods that are not ready or are about to end: the gateway asks each agent itself, and
must do so until a pod that ends has drained.

Source: https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from gateway.kubernetes.addresses import parse_service
from gateway.kubernetes.api import connect, endpoint_slices, of_service
from gateway.kubernetes.watch import follow

if TYPE_CHECKING:
    from gateway.kubernetes.addresses import ServiceAddress
    from gateway.kubernetes.api import KubernetesApi, Manifest

logger = logging.getLogger(__name__)
FAMILIES = ("IPv4", "IPv6")


def watch_endpoints(text: str) -> WatchedEndpoints:
    """Return a reader of the addresses behind the Service that `text` names.

    Raises:
        ValueError: the text is no address of a Service.
        NotInCluster: no API server is known.
    """
    return WatchedEndpoints(connect(), parse_service(text))


class WatchedEndpoints:
    """The URLs behind a Service. A thread follows them from `start` on; while the API server is away the last stay."""

    def __init__(self, api: KubernetesApi, address: ServiceAddress) -> None:
        self._api = api
        self._address = address
        self._urls: tuple[str, ...] = ()
        self._error: str | None = None
        self._is_new = threading.Event()
        self._is_known = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def has_changed(self) -> bool:
        """True if `urls` has not been called since the last change."""
        return self._is_new.is_set()

    def start(self) -> None:
        """Start the thread; not done by the constructor, because a thread does not outlive a fork."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="endpoints watch", daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait until the API server has answered for the first time, or has failed to."""
        self._is_known.wait(timeout_s)

    def urls(self) -> tuple[str, ...]:
        """Return the URLs that were found last."""
        self._is_new.clear()
        return self._urls

    def close(self) -> None:
        """End the thread once its watch ends, at the latest after half a minute."""
        self._stop.set()
        self._api.close()

    def _follow(self) -> None:
        address = self._address
        follow(self._api, endpoint_slices(address.namespace), of_service(address.service), self._report, self._stop)

    def _report(self, slices: dict[str, Manifest] | None, error: str | None) -> None:
        if error is not None and error != self._error and not self._stop.is_set():  # once, not at each try
            logger.warning("the agents at %s cannot be followed: %s", self._address, error)
        self._error = error
        if slices is not None:
            self._urls = urls_of(slices, self._address.port)
            self._is_new.set()
        self._is_known.set()


def urls_of(slices: dict[str, Manifest], port: int) -> tuple[str, ...]:
    """Return the URL of each endpoint: of the IPv4 ones if there are any, else of the IPv6 ones.

    A pod with both would otherwise count twice.
    """
    hosts: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for found in slices.values():
        for endpoint in found.get("endpoints") or ():
            hosts.get(found["addressType"], set()).update(endpoint["addresses"][:1])
    chosen = next((hosts[family] for family in FAMILIES if hosts[family]), set())
    return tuple(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in sorted(chosen))
