"""The errors of the Kubernetes client: each sentence says what was asked, what came, and what to do."""

from __future__ import annotations

import pytest

from gateway.kubernetes import errors
from gateway.kubernetes.errors import (
    ApiRefused,
    Conflict,
    Expired,
    KubernetesError,
    NoAnswer,
    NotInCluster,
    ObjectMissing,
)


@pytest.mark.parametrize(("status", "has_remedy"), [(401, True), (403, True), (404, False), (409, False), (500, False)])
def test_only_a_call_without_the_right_to_it_names_the_service_account(status: int, has_remedy: bool) -> None:
    error = ApiRefused("GET configmaps/plan", status, "the server says no")
    assert str(error).startswith(f"the Kubernetes API answered {status} to GET configmaps/plan (the server says no)")
    assert str(error).endswith("give the pod's service account the right to do this") == has_remedy
    assert error.status == status


def test_a_refusal_without_a_reason_says_so() -> None:
    assert str(Expired("watch configmaps", 410, "")) == (
        "the Kubernetes API answered 410 to watch configmaps (no reason given)"
    )


def test_no_cluster_and_no_answer_name_what_to_set_and_what_failed() -> None:
    assert "set GRADSERVE_KUBERNETES_API to the address of `kubectl proxy`" in str(NotInCluster())
    assert str(NoAnswer("http://cluster", "ConnectError")) == (
        "the Kubernetes API at http://cluster gives no answer (ConnectError)"
    )


def test_a_caller_who_catches_refusals_catches_their_kinds_and_nothing_else() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {kind for kind in kinds if issubclass(kind, ApiRefused)} == {ApiRefused, ObjectMissing, Conflict, Expired}
    assert all(issubclass(kind, KubernetesError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
