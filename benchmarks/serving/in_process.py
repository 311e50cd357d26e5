"""Serve the model without TorchServe and gateway: FastAPI calls the handler's own code in its own process.

The forward pass blocks the event loop on purpose: there are as many processes as cores, each computes with one thread,
and a thread pool would only add switches.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from fastapi import FastAPI, Request, Response

from contracts import model as model_contract
from contracts.wire import Options
from handlers.archive import load_network
from handlers.engines import build_engine
from handlers.evidence.archive_evidence import load_evidence
from handlers.model import ServedModel
from handlers.wire import Row


def create_app() -> FastAPI:
    """Return the application; the environment variable MODEL_FOLDER names the version's folder."""
    torch.set_num_threads(1)
    folder = Path(os.environ["MODEL_FOLDER"])
    contract = model_contract.load(folder / "contract.json")
    network, layer = partial(load_network, folder, contract), contract.explain.sharp_layer
    engine = build_engine(contract.engine, network, directory=folder, device=torch.device("cpu"), sharp_layer=layer)
    model = ServedModel(contract, engine, _no_explainer, load_evidence(folder, contract))
    model.warm_up(explains=False)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        (answer,) = model.answer([Row("predict", Options(), [await request.body()])])
        return Response(answer.body, media_type="application/json")

    @app.get("/livez")
    async def livez() -> Response:
        return Response(b"{}", media_type="application/json")

    return app


def _no_explainer() -> NoReturn:
    raise NotImplementedError
