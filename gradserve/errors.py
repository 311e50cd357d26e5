"""The client's errors.

GatewayProblem       the gateway refused or failed, and said so
└── AnswerUnreadable     an answer of another server, or of a gateway of another release
MissingPackage       numpy or Pillow is needed, and not installed (an ImportError)

If there is no answer at all, httpx raises a `httpx.TransportError`.
"""

from __future__ import annotations

from typing import Any


class GatewayProblem(Exception):
    """An error answer of the gateway; `problem` is the whole problem document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", "unknown"))
        self.problem = problem
        super().__init__(f"{status} {self.code}: {problem.get('detail', 'no detail')}")


class AnswerUnreadable(GatewayProblem):
    """An answer that is not the expected document; `reason` names what is wrong."""

    def __init__(self, status: int, reason: str) -> None:
        detail = f"this is no answer of a gateway ({reason}): check the address"
        super().__init__(status, {"code": "answer_unreadable", "detail": detail})


class MissingPackage(ImportError):
    """The optional package `package` is needed for `purpose`, and is not installed."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install {package}", name=package)
