import asyncio
import json

import httpx
import pytest

from control.agent.torchserve.management import Management, debug_log
from control.errors import ManagementError, ManagementUnreachable

DESCRIPTION = [
    {
        "modelName": "cifar10",
        "modelVersion": "1.0.0",
        "minWorkers": 2,
        "workers": [{"id": "9000", "pid": 41, "status": "READY"}, {"id": "9001", "pid": -1, "status": "UNLOADING"}],
        "jobQueueStatus": {"remainingCapacity": 97, "pendingRequests": 3},
    }
]


def client(answer, log_path=None):
    return Management(httpx.MockTransport(answer), debug_log(log_path))


def run(coroutine):
    return asyncio.run(coroutine)


def test_describe_counts_ready_workers_and_pending_jobs():
    state = run(client(lambda _: httpx.Response(200, json=DESCRIPTION)).describe("cifar10"))["1.0.0"]
    assert (state.ready, state.min_workers, state.pending, state.capacity) == (1, 2, 3, 100)
    assert [worker.pid for worker in state.workers] == [41, None]


def test_an_unknown_model_has_no_versions():
    assert run(client(lambda _: httpx.Response(404, json={"code": 404})).describe("cifar10")) == {}


def test_a_registration_is_asynchronous_and_has_query_parameters_only():
    asked = []

    def answer(request):
        asked.append(request)
        return httpx.Response(202, json={"status": "Processing worker updates..."})

    run(client(answer).register("cifar10-1.0.0.mar", "cifar10", workers=2, batch_size=16))
    (request,) = asked
    assert request.content == b""
    assert request.url.params["synchronous"] == "false"
    assert request.url.params["max_batch_delay"] == "1"
    assert (request.url.params["initial_workers"], request.url.params["batch_size"]) == ("2", "16")


def test_a_refusal_has_torchserves_message():
    answer = httpx.Response(403, json={"code": 403, "message": "Cannot remove default version for model cifar10"})
    with pytest.raises(ManagementError, match="Cannot remove default") as caught:
        run(client(lambda _: answer).unregister("cifar10", "1.0.0"))
    assert caught.value.status == 403


def test_no_answer_raises_management_unreachable():
    def refuse(request):
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(ManagementUnreachable, match="ConnectError"):
        run(client(refuse).describe("cifar10"))


@pytest.mark.parametrize("body", [b"no json", b'[{"modelVersion": "1"}]', b'{"a": 1}'])
def test_an_unreadable_answer_raises_management_error(body):
    with pytest.raises(ManagementError):
        run(client(lambda _: httpx.Response(200, content=body)).describe("cifar10"))


def test_every_call_is_one_json_line_in_the_debug_log(tmp_path):
    path = tmp_path / "management.log"
    management = client(lambda _: httpx.Response(200, json=DESCRIPTION), path)

    async def calls():
        await management.describe("cifar10")
        await management.scale("cifar10", "1.0.0", 2)

    run(calls())
    debug_log(None)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["method"], first["path"], first["status"]) == ("GET", "/models/cifar10/all", 200)
    assert first["answer"] == {"1.0.0": {"ready": 1, "pending": 3}}
    assert second["path"] == "/models/cifar10/1.0.0?min_worker=2&max_worker=2&synchronous=false"
