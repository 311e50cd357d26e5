"""The client for callers in Python: `from gradserve import Client`. Imports httpx alone."""

from gradserve.client import Client, GatewayProblem

__all__ = ["Client", "GatewayProblem"]
