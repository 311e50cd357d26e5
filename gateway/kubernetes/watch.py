"""Follow objects of Kubernetes: list them once, then watch their changes, in a thread of its own."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeAlias

from gateway.kubernetes.errors import Expired, KubernetesError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from gateway.kubernetes.api import KubernetesApi, Manifest, Selector

    Report: TypeAlias = Callable[[dict[str, Manifest] | None, str | None], None]
    """A function that takes all objects by name, or None and the reason why they cannot be followed."""

BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.2, 10.0


def follow(api: KubernetesApi, collection: str, selector: Selector, report: Report, stop: threading.Event) -> None:
    """Call `report` with the objects whenever one has changed, or with the reason why they cannot be followed.

    A watch that ends goes on from the last version that was seen. After an error, with back-off, the objects are listed
    again: that shows at once what changed meanwhile. Return when `stop` is set.
    """
    objects: dict[str, Manifest] = {}
    version: str | None = None
    delay_s = BACKOFF_FIRST_S
    while not stop.is_set():
        try:
            if version is None:
                found, version = api.list(collection, selector)
                objects = {manifest["metadata"]["name"]: manifest for manifest in found}
                report(dict(objects), None)
            for event in api.watch(collection, selector, version):
                delay_s = BACKOFF_FIRST_S
                version = event.manifest["metadata"]["resourceVersion"]
                if event.kind != "BOOKMARK":
                    objects.pop(event.manifest["metadata"]["name"], None)
                    if event.kind != "DELETED":
                        objects[event.manifest["metadata"]["name"]] = event.manifest
                    report(dict(objects), None)
        except Expired:
            version = None
        except KubernetesError as error:
            report(None, str(error))
            version = None
        except Exception as error:  # noqa: BLE001 (the thread must not end: nothing would follow the objects any more)
            report(None, type(error).__name__)
            version = None
        else:
            delay_s = BACKOFF_FIRST_S
        stop.wait(delay_s * random.uniform(0.5, 1))  # noqa: S311 (not for secrets)
        delay_s = BACKOFF_FIRST_S if version is not None else min(BACKOFF_MOST_S, 2 * delay_s)
