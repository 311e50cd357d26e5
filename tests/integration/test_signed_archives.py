"""`AGENT_TRUSTED_KEYS` on the real stack: what no trusted key has signed is never loaded."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

pytestmark = [pytest.mark.server, pytest.mark.long]


def new_key(folder, name):
    key, private, public = ec.generate_private_key(ec.SECP256R1()), folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_an_agent_loads_only_what_a_trusted_key_has_signed(make_stack, model_source, pack_again, tmp_path):
    (ours, public), (stranger, _) = new_key(tmp_path, "release"), new_key(tmp_path, "stranger")
    stack = make_stack(AGENT_TRUSTED_KEYS=str(public))
    stack.start(model_source)
    assert stack.process.wait(timeout=180) == 1
    assert "is not signed" in stack.said()

    (packed,) = stack.model_store.glob("*.mar")
    assert stack.command("archive", "sign", str(packed), "--key", str(ours)).returncode == 0
    stack.start(model_source)
    stack.wait_until_ready()
    assert [version["signed"] for version in stack.versions()] == ["by release.pub"]
    findings = json.loads(stack.command("doctor", "--json").stdout)
    assert any("signed: by release.pub" in finding["text"] for finding in findings)

    other, before = pack_again("9.20.0"), stack.plan()
    assert stack.command("archive", "sign", str(other), "--key", str(stranger)).returncode == 0
    by_the_operator = stack.command("deploy", str(other))
    assert "signed with an unknown key" in by_the_operator.stderr
    assert stack.plan() == before
    del stack.environment["AGENT_TRUSTED_KEYS"]  # this operator trusts everybody, the agent does not
    by_the_agent = stack.command("deploy", str(other))
    assert by_the_agent.returncode == 1
    assert "9.20.0 was refused at loading: archive" in by_the_agent.stderr
    assert "signed with an unknown key" in by_the_agent.stderr
    assert {**stack.plan(), "revision": before["revision"]} == before
