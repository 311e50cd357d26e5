"""The client for Python callers: `from gradserve import Client`. It needs only httpx."""

from gradserve.client import Client, GatewayProblem

__all__ = ["Client", "GatewayProblem"]
