"""The application's state belongs to one application, also if a process has several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request

from gateway.state import AppState, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Stand


def test_a_request_finds_the_state_of_the_application_that_answers_it(make_stand: Callable[..., Stand]) -> None:
    small, usual = make_stand(max_image_bytes=10), make_stand()
    states = [state_of(Request({"type": "http", "app": stand.app})) for stand in (small, usual)]
    assert all(isinstance(state, AppState) for state in states)
    assert [state.settings.max_image_bytes for state in states] == [
        10,
        usual.app.state.gateway.settings.max_image_bytes,
    ]
    assert [stand.client.post("/predict", content=b"x" * 11).status_code for stand in (small, usual)] == [413, 200]


def test_what_one_application_is_told_does_not_reach_another(make_stand: Callable[..., Stand]) -> None:
    first, second = make_stand(), make_stand()
    first.app.state.gateway.is_draining = True
    assert [stand.client.get("/readyz").status_code for stand in (first, second)] == [503, 200]
