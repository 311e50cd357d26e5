"""The client for Python callers: `from gradserve import Client`. It needs only httpx."""

from gradserve.answers import (
    AnswerSet,
    ClassConfidence,
    Evidence,
    Failed,
    Heatmap,
    ModelVersion,
    Prediction,
    RegionTest,
    Similar,
    Target,
    Unavailable,
)
from gradserve.async_client import AsyncClient
from gradserve.client import Client
from gradserve.errors import AnswerUnreadable, GatewayProblem, MissingPackage

__all__ = [
    "AnswerSet",
    "AnswerUnreadable",
    "AsyncClient",
    "ClassConfidence",
    "Client",
    "Evidence",
    "Failed",
    "GatewayProblem",
    "Heatmap",
    "MissingPackage",
    "ModelVersion",
    "Prediction",
    "RegionTest",
    "Similar",
    "Target",
    "Unavailable",
]
