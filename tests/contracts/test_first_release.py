"""The first release's own code, out of its archives, reads what is written today: wire and contract of schema 1.

tests/integration/test_old_archive.py holds the same with the real server.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts import model, wire
from contracts.wire import Options

ROOT = Path(__file__).parents[2]
HANDLERS = ROOT / "tests" / "integration" / "schema_1_handlers.zip"
RELEASED = ROOT / "model_store" / "released" / "contract.json"
# As TorchServe hands a row over, and as the first release's handler answers a row that it could not read.
READ = """
import base64, dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from handlers import contract, wire

class Context:
    def __init__(self, headers):
        self.headers = headers

    def get_request_header(self, index, name):
        return self.headers.get(name)

told = []
for asked in json.load(sys.stdin)["rows"]:
    part = {"body": bytearray(base64.b64decode(asked["body"]))}
    row = wire.read_row(part, Context(asked["headers"]), 0)
    told.append({
        "kind": row.kind,
        "options": dataclasses.asdict(row.options),
        "images": [base64.b64encode(bytes(image)).decode() for image in row.images],
        "answer": wire.write_results([row.error.entry()] * 2).decode() if row.error else None,
    })
print(json.dumps({"rows": told, "contract": contract.to_dict(contract.load(__import__("pathlib").Path(sys.argv[2])))}))
"""
OPTIONS = [
    Options("r-1", deadline=4_000_000_000_000, top_k=3, traceparent="00-1-2-01"),
    Options("r-2"),
    Options("r-3", target="cät", method="gradcam++", alpha=0.25, size=64, format="json"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    """What the first release's code makes of the rows and of a contract that are written today."""
    contract = tmp_path_factory.mktemp("first") / "contract.json"
    model.save(replace(model.load(RELEASED), schema=1), contract)
    rows = []
    for options in OPTIONS:
        for images in ([b"one"], [b"one", b"", b"three"]):
            request = wire.dump_request(images, options)
            headers = {"body": {"content-type": request.content_type}, wire.OPTIONS_HEADER: request.options}
            headers["explain"] = "True" if options.target and len(images) == 1 else "False"
            rows.append({"headers": headers, "body": base64.b64encode(request.body).decode()})
    late = wire.dump_request([b"one", b"two"], Options(deadline=1))
    headers = {"content-type": late.content_type, wire.OPTIONS_HEADER: late.options}
    rows.append({"headers": headers, "body": base64.b64encode(late.body).decode()})
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ, str(HANDLERS), str(contract)],
        input=json.dumps({"rows": rows}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_reads_the_images_and_options_of_every_request(told):
    rows = iter(told["rows"])
    for options in OPTIONS:
        for images in ([b"one"], [b"one", b"", b"three"]):
            row = next(rows)
            assert row["answer"] is None
            assert [base64.b64decode(image) for image in row["images"]] == images
            assert row["kind"] == ("explain" if options.target and len(images) == 1 else "predict")
            expected = options._asdict()
            for name in ("traceparent", "images", "example"):  # which it ignores
                del expected[name]
            assert row["options"] == expected


def test_its_error_entries_are_read(told):
    entries = wire.parse_results(told["rows"][-1]["answer"].encode(), 2)
    assert {wire.parse_error(entry)[0] for entry in entries} == {"deadline_passed"}


def test_it_reads_a_contract_that_is_kept_in_schema_1(told):
    assert told["contract"] == model.dump(replace(model.load(RELEASED), schema=1))
