"""Real answers fit the types that the OpenAPI document declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from gateway.api import schemas
from gateway.api.openapi import examples

if TYPE_CHECKING:
    from conftest import Stand


def test_real_answers_fit_their_schemas(stand: Stand) -> None:
    client = stand.client
    schemas.Prediction.model_validate_json(client.post("/predict?top_k=2", content=b"x").content)
    files = [("file", ("a", b"x")), ("file", ("b", b"bad:image_unreadable"))]
    schemas.BatchPrediction.model_validate_json(client.post("/predict/batch", files=files).content)
    numbers = client.post("/explain", content=b"x", headers={"accept": "application/json"})
    schemas.Explanation.model_validate_json(numbers.content)
    schemas.Health.model_validate_json(client.get("/health").content)
    schemas.Models.model_validate_json(client.get("/models").content)
    schemas.State.model_validate_json(client.get("/readyz").content)


def test_a_member_that_is_not_documented_is_noticed() -> None:
    document = {**examples.PREDICTION, "layer": "layer4"}
    with pytest.raises(ValidationError, match="layer"):
        schemas.Prediction.model_validate(document)
