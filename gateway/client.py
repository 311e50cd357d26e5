"""The client under its former import path; `from gradserve import Client` replaces it."""

import warnings

from gradserve import Client as Gateway
from gradserve import GatewayProblem

__all__ = ["Gateway", "GatewayProblem"]

warnings.warn("gateway.client has moved: use `from gradserve import Client`", DeprecationWarning, stacklevel=2)
