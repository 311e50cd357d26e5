"""Thumbnails of the training images that explanations name: asked of the prediction workers, and kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from contracts.wire import Options
from gateway.errors import EngineNonsense
from gateway.inference.questions import wire_of
from gateway.inference.torchserve import raise_for_error
from gateway.refusals import ExampleUnknown

if TYPE_CHECKING:
    from contracts.model import Contract
    from gateway.inference.admission import Admission
    from gateway.inference.answer import Call
    from gateway.inference.routing import Router
    from gateway.inference.torchserve import TorchServe

# A thumbnail has a few kilobytes; a larger file is answered and not kept.
MOST_KEPT, MOST_BYTES = 1000, 16 * 1024


class Examples:
    """The thumbnails of the versions in the plan; at most `MOST_KEPT` are kept, the last used ones.

    The archive's digest is part of the key, so that another archive under the same version gives its own thumbnails.
    """

    def __init__(self, router: Router, upstream: TorchServe, admission: Admission) -> None:
        self._router = router
        self._upstream = upstream
        self._admission = admission
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def digest(self, model: str, version: str) -> str:
        """Return the SHA-256 of the version's archive, as the plan has it; empty if the plan does not name it."""
        releases = self._router.plan_of(model).releases()
        return next((release.sha256 for release in releases if release.version == version), "")

    async def find(self, example: int, call: Call) -> bytes:
        """Return the PNG of the training image `example` of the call's model and version.

        Raises:
            ModelUnknown, VersionUnknown: the plan does not name them.
            ExampleUnknown: the version has no thumbnail with this number.
            GatewayError: the call was refused or failed.
        """
        target = self._router.choose("predict", call.version, model=call.model)
        if example >= thumbnails(target.contract):
            raise ExampleUnknown(example, target.version, thumbnails(target.contract))
        key = (self.digest(target.model, target.version), example)
        if (content := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return content
        places = self._admission.of(target.model).explain
        await places.take(call.caller)
        try:
            with target:
                received = await self._upstream.ask(
                    target,
                    b"",
                    carried=call.carried,
                    deadline=call.deadline,
                    options=Options(example=example),
                )
        finally:
            places.give_back(1, call.caller)
        if not isinstance(received, bytes):
            raise_for_error(received)
            raise EngineNonsense
        self._keep(key, received)
        return received

    def _keep(self, key: tuple[str, int], content: bytes) -> None:
        if len(content) <= MOST_BYTES:
            self._kept[key] = content
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)


def thumbnails(contract: Contract | None) -> int:
    """Return the number of thumbnails in a version's archive; their numbers begin with 0."""
    if contract is None or wire_of(contract) < 2 or contract.evidence is None or contract.evidence.similar is None:
        return 0
    similar = contract.evidence.similar
    return similar.images if similar.thumbnails else 0
