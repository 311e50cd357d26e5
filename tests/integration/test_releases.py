"""Router moved on the real stack: under load, through refusals and through kills."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, defaultdict
from datetime import datetime

import httpx
import pytest

from training.package.export import package_directory

pytestmark = pytest.mark.server
# Requests a second: a small part of what the reference machine does, which leaves the rest for loading.
RATE = 20
HANGING = """
import time

class Handler:
    def initialize(self, context):
        time.sleep(3600)

    def handle(self, data, context):
        return data
"""


class Load:
    """Requests at a steady rate, without retries; each answer with the time it was asked for."""

    def __init__(self, url: str, image: bytes) -> None:
        self._url = url
        self._image = image
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.answers: list[tuple[float, float, int, str]] = []
        """When it was sent, when it was answered (Unix time), status, version or the body of the failure."""

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=200)) as client:
            tasks = set()
            while not self._stop.is_set():
                task = asyncio.create_task(self._ask(client))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(1 / RATE)  # and not until the next is due: a machine that stood still is no flood
            await asyncio.gather(*tasks)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        sent = time.time()
        try:
            answer = await client.post(self._url, content=self._image, headers={"content-type": "image/png"})
        except httpx.HTTPError as error:
            self.answers.append((sent, time.time(), 0, type(error).__name__))
            return
        found = answer.json()["model"]["version"] if answer.status_code == 200 else answer.text
        self.answers.append((sent, time.time(), answer.status_code, found))


def changes(stack) -> list[tuple[float, set[str]]]:
    """When each plan came into force and which versions it gives traffic."""
    found = []
    for line in (stack.home / "audit.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "after" in entry:
            plan = entry["after"]["models"][0]
            routed = {plan["stable"]["version"]} | ({plan["canary"]["version"]} if plan["canary"] else set())
            found.append((datetime.fromisoformat(entry["time"]).timestamp(), routed))
    return found


def outside_the_plan(load: Load, plans: list[tuple[float, set[str]]]) -> list[tuple]:
    """Answers from versions that no plan in force gave traffic, a second being granted for following a change."""
    wrong = []
    for sent, answered, status, version in load.answers:
        allowed = set()
        for index, (since, routed) in enumerate(plans):
            until = plans[index + 1][0] + 1.0 if index + 1 < len(plans) else float("inf")
            if since <= answered and sent <= until:
                allowed |= routed
        if status == 200 and version not in allowed:
            wrong.append((sent, version, allowed))
    return wrong


@pytest.fixture(scope="module")
def image(model_source):
    reference = json.loads((model_source / "reference.json").read_text())
    return base64.b64decode(reference["images"][0])


@pytest.fixture(scope="module")
def second(pack_again):
    """An archive of version 9.0.0, outside the model store."""
    return pack_again("9.0.0")


def command(stack, *arguments):
    answer = stack.command(*arguments)
    assert answer.returncode == 0, (arguments, answer.stdout, answer.stderr)
    assert "Traceback" not in answer.stderr
    return answer


def refused(stack, *arguments):
    before = (stack.home / "plan.json").read_bytes() if (stack.home / "plan.json").exists() else b""
    answer = stack.command(*arguments)
    assert answer.returncode == 1, answer.stdout
    assert "Traceback" not in answer.stderr
    after = json.loads((stack.home / "plan.json").read_bytes())
    assert {**after, "revision": 0} == {**json.loads(before), "revision": 0}
    return answer.stderr


def test_a_canary_promoted_rolled_back_and_retired_loses_no_request(stack, second, stable, image):
    with Load(f"{stack.gateway}/predict", image) as load:
        time.sleep(1)
        command(stack, "deploy", str(second), "--canary", "10")
        time.sleep(3)
        command(stack, "promote")
        time.sleep(1)
        command(stack, "rollback")
        command(stack, "retire", "9.0.0")
        time.sleep(1)
    assert_lost_nothing(load, stack, {stable, "9.0.0"})
    assert load.answers[-1][3] == stable


@pytest.mark.long
def test_a_rollback_to_a_version_that_is_not_loaded_any_more_loses_no_request(stack, second, stable, image):
    with Load(f"{stack.gateway}/predict", image) as load:
        command(stack, "deploy", str(second), "--stable")
        command(stack, "rollback")
        command(stack, "promote", "9.0.0")
        command(stack, "retire", stable)
        time.sleep(1)
        assert load.answers[-1][3] == "9.0.0"
        command(stack, "rollback")
        time.sleep(1)
    assert_lost_nothing(load, stack, {stable, "9.0.0"})
    assert load.answers[-1][3] == stable


def assert_lost_nothing(load, stack, versions):
    """Every request was answered, by a version of the plan, and each of the versions answered some."""
    failed = Counter((status, text.partition(',"detail"')[0]) for _, _, status, text in load.answers if status != 200)
    assert not failed, f"of {len(load.answers)} requests"
    assert outside_the_plan(load, changes(stack)) == []
    assert {version for _, _, _, version in load.answers} == versions


def test_management_is_never_asked_to_wait_and_never_to_delete_what_is_not_drained(stack):
    calls = [json.loads(line) for line in stack.management_log.read_text().splitlines()]
    registered = [call["path"] for call in calls if call["method"] == "POST"]
    assert {path.split("?")[0] for path in registered} == {"/models"}
    assert all("synchronous=false" in path for path in registered)
    # By the agent's private copies: whoever changes a file in the model store changes nothing that is checked already.
    assert all(re.search(r"url=[0-9a-f]{64}\.mar&", path) for path in registered)
    assert all("synchronous=false" in c["path"] for c in calls if c["method"] == "PUT" and "min_worker" in c["path"])
    plans, seen, default, deleted = changes(stack), defaultdict(list), {}, []
    for call in calls:
        _, _, entry, *version = call["path"].split("?")[0].split("/") if call["path"].count("/") > 1 else (0, 0, "")
        if entry.removesuffix("-explain") != "cifar10":  # another test's model, whose last version goes with it
            continue
        if call["method"] == "GET" and version == ["all"] and call["status"] == 200:
            seen[entry].append(call)
        if version[1:] == ["set-default"]:
            assert entry.endswith("-explain") or seen[entry][-1]["answer"][version[0]]["ready"] > 0, call
            default[entry] = version[0]
        if call["method"] == "DELETE" and call["status"] != 404:  # which removed nothing: it was gone already
            # The log is in the order of the answers: the agent also looks while a DELETE waits for its own.
            began = call["time"] - call["ms"] / 1000
            (*_, last) = (look["answer"] for look in seen[entry] if look["time"] <= began)
            assert last[version[0]]["pending"] == 0, call
            assert default[entry] != version[0], call
            in_force = [routed for since, routed in plans if since <= call["time"]][-1]
            assert version[0] not in in_force, call
            deleted.append((entry, version[0]))
    # The retirement of a test before is in there.
    assert {entry for entry, _ in deleted} == {"cifar10", "cifar10-explain"}


def test_an_archive_that_must_not_be_loaded_is_refused_before_the_plan_is_touched(stack, second, stable, tmp_path):
    tampered = shutil.copy(second, tmp_path / "tampered.mar")
    with zipfile.ZipFile(tampered, "a") as members:
        members.writestr("extra.txt", "x")
    shutil.copy(f"{second}.sha256", f"{tampered}.sha256")
    assert "SHA-256" in refused(stack, "deploy", str(tampered))
    with zipfile.ZipFile(tampered, "a") as members:
        members.writestr("../evil.py", "x")
    (tmp_path / "tampered.mar.sha256").unlink()
    assert "would leave the folder" in refused(stack, "deploy", str(tampered))


def test_other_classes_need_yes(stack, stable, write_untrained, tmp_path):
    archive = package_directory(write_untrained("9.1.0", classes=("cat", "dog")), tmp_path)
    said = refused(stack, "deploy", str(archive))
    assert "classes gone" in said
    assert "--yes" in said


def test_a_version_whose_outputs_are_wrong_is_refused_with_the_handlers_reason(
    stack, stable, model_source, tmp_path, until
):
    source = shutil.copytree(model_source, tmp_path / "source")
    contract = json.loads((source / "contract.json").read_text())
    (source / "contract.json").write_text(json.dumps(contract | {"version": "9.2.0"}))
    reference = json.loads((source / "reference.json").read_text())
    reference["probabilities"] = [row[::-1] for row in reference["probabilities"]]
    (source / "reference.json").write_text(json.dumps(reference))
    said = refused(stack, "deploy", str(package_directory(source, tmp_path)), "--stable")
    assert "reference inputs" in said
    until(lambda: [version["version"] for version in stack.versions()] == [stable], 30)
    until(lambda: stack.health().json()["status"] == "ok", 30, stack)


def with_handler(archive, path, code):
    """A copy of the archive whose entry file begins with `code`."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, code.encode() if name == "image_handler.py" else content)
    return path


@pytest.mark.long
def test_a_version_that_crashes_or_hangs_while_loading_is_refused(
    make_stack, model_source, second, image, tmp_path, until
):
    other = make_stack(AGENT_LOAD_TIMEOUT_S="60")
    other.start(model_source)
    other.wait_until_ready()
    with Load(f"{other.gateway}/predict", image) as load:
        crashing = with_handler(second, tmp_path / "crashing.mar", "import nothing_of_that_name")
        assert "its workers die while they load" in refused(other, "deploy", str(crashing))
        (other.model_store / "cifar10-9.0.0.mar").unlink()
        said = refused(other, "deploy", str(with_handler(second, tmp_path / "hanging.mar", HANGING)))
        assert "no worker was ready within" in said
    assert {status for _, _, status, _ in load.answers} == {200}
    assert outside_the_plan(load, changes(other)) == []
    until(lambda: len(other.versions()) == 1, 30)
    until(lambda: other.health().json()["status"] == "ok", 10)  # each gateway process sees it at its next poll


@pytest.mark.long
def test_kills_in_the_middle_are_healed(make_stack, model_source, second, image, until):
    stack = make_stack()
    stack.start(model_source)
    stack.wait_until_ready()
    stable = stack.plan()["stable"]["version"]

    # The command, between loading and routing: the version stays loaded, without traffic, and deploying goes on.
    deploy = subprocess.Popen(
        [sys.executable, "-m", "control.cli.main", "deploy", str(second), "--canary", "50"],
        env=stack.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: len(stack.versions()) == 2, 30)
    deploy.kill()
    deploy.wait()

    # TorchServe, while the new version loads: the status says so, and both come back.
    os.kill(stack.status()["torchserve"]["pid"], signal.SIGKILL)
    until(lambda: not told(stack)["ok"], 30)
    assert told(stack)["drift"]
    until(lambda: [v["state"] for v in stack.versions()] == ["ready", "ready"], 180)
    assert httpx.post(f"{stack.gateway}/predict", content=image).json()["model"]["version"] == stable
    command(stack, "deploy", "9.0.0", "--canary", "50")

    # The agent, while both serve: nobody can say anything; then it is started again, and both are verified again.
    (agent,) = [pid for pid, line in stack.processes().items() if "control.cli.main agent" in line]
    os.kill(agent, signal.SIGKILL)
    assert "does not answer" in told(stack)["agents"][0]["error"]
    until(lambda: stack.health().status_code == 503, 30)
    until(lambda: [v["state"] for v in stack.versions()] == ["ready", "ready"], 180)
    until(lambda: stack.command("status").returncode == 0, 30)
    assert told(stack)["drift"] == []
    served = {httpx.post(f"{stack.gateway}/predict", content=image).json()["model"]["version"] for _ in range(40)}
    assert served == {stable, "9.0.0"}

    # The command again, between workers and routing: the canary has its workers and its share, no more.
    promote = subprocess.Popen(
        [sys.executable, "-m", "control.cli.main", "promote"],
        env=stack.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: stack.audit()[-1]["what"] == "promote 9.0.0: workers", 30)
    promote.kill()
    promote.wait()
    workers = stack.plan()["canary"]["workers"]
    assert stack.plan()["stable"]["version"] == stable
    until(lambda: ready(stack)["9.0.0"] == workers, 60)
    command(stack, "scale", "9.0.0", str(workers + 1))
    assert ready(stack)["9.0.0"] == workers + 1


def told(stack) -> dict:
    """What `gradserve status` says."""
    return json.loads(stack.command("status", "--json").stdout)


def ready(stack) -> dict[str, int]:
    """Ready prediction workers by version."""
    return {version["version"]: version["predict"]["ready"] for version in stack.versions()}
