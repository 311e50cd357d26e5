"""`gradserve archive sign|verify`."""

import pytest
from typer.testing import CliRunner

from control.archive import signature_path
from control.cli.archive import check_key
from control.cli.main import app
from control.errors import ArchiveError, KeyUnreadable, SignatureWrong


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("AGENT_TRUSTED_KEYS", "GRADSERVE_SIGNING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def test_the_commands_sign_with_a_locked_key_and_verify(archive, keys, monkeypatch):
    private, public = keys("release", password=b"secret")
    monkeypatch.setenv("GRADSERVE_SIGNING_PASSWORD", "secret")
    run = CliRunner().invoke
    signed = run(app, ["archive", "sign", str(archive), "--key", str(private)])
    assert signed.exit_code == 0, signed.output
    assert "m-1.0.mar.sig" in signed.output.replace("\n", "")
    monkeypatch.setenv("AGENT_TRUSTED_KEYS", str(public))
    checked = run(app, ["archive", "verify", str(archive)])
    assert "signed by release.pub" in checked.output
    archive.write_bytes(archive.read_bytes() + b"more")
    assert isinstance(run(app, ["archive", "verify", str(archive), "--key", str(public)]).exception, SignatureWrong)


def test_an_archive_with_another_checksum_is_not_signed(archive, keys):
    archive.with_name("m-1.0.mar.sha256").write_text(f"{'0' * 64}  m-1.0.mar\n")
    answer = CliRunner().invoke(app, ["archive", "sign", str(archive), "--key", str(keys("release")[0])])
    assert isinstance(answer.exception, ArchiveError)
    assert not signature_path(archive).exists()


def test_a_signature_is_checked_against_named_keys_only(archive):
    refused = CliRunner().invoke(app, ["archive", "verify", str(archive)])
    assert (refused.exit_code, "--key, or AGENT_TRUSTED_KEYS" in refused.stderr) == (2, True)


def test_a_key_is_checked_before_the_work_that_would_be_signed(keys, monkeypatch):
    private, _ = keys("release", password=b"secret")
    with pytest.raises(KeyUnreadable, match="set GRADSERVE_SIGNING_PASSWORD"):
        check_key(private)
    monkeypatch.setenv("GRADSERVE_SIGNING_PASSWORD", "secret")
    check_key(private)
