"""Signed archives: the keys that are accepted, the refusals, and that the signature is checked before parsing."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from control.archive import file_sha256, inspect_archive, inspect_copy, load_trusted_keys, signature_path
from control.errors import (
    ArchiveError,
    KeyMissing,
    KeyOfOtherKind,
    KeyUnreadable,
    SignatureMissing,
    SignatureUnreadable,
    SignatureWrong,
    SignerUnknown,
)
from control.signatures import read_private_key, sign_archive


def sign(archive, private, password=None):
    sign_archive(archive, signature_path(archive), private, password)


def test_an_archive_signed_by_one_of_the_trusted_keys_is_accepted(archive, keys):
    (ours, public), (_, other) = keys("release"), keys("other")
    sign(archive, ours)
    assert inspect_archive(archive, trusted=load_trusted_keys([other, public])).signed == "by release.pub"
    assert inspect_archive(archive).signed == "not checked"
    signature_path(archive).unlink()
    assert inspect_archive(archive, trusted=load_trusted_keys([])).signed == "no"


def test_each_wrong_signature_has_its_own_error(archive, keys):
    (ours, public), (stranger, _) = keys("release"), keys("stranger")
    trusted = load_trusted_keys([public])
    with pytest.raises(SignatureMissing, match=r"m-1\.0\.mar\.sig is missing; create it with gradserve archive sign"):
        inspect_archive(archive, trusted=trusted)
    sign(archive, stranger)
    with pytest.raises(SignerUnknown, match=r"unknown key \([0-9a-f]{12}…\); trusted: release\.pub"):
        inspect_archive(archive, trusted=trusted)
    sign(archive, ours)
    archive.write_bytes(archive.read_bytes() + b"more")
    with pytest.raises(SignatureWrong, match=r"not release\.pub's for these bytes"):
        inspect_archive(archive, trusted=trusted)


@pytest.mark.parametrize("text", ["", "{}", "[" * 50_000, '{"verificationMaterial": null}', " " * 200_000])
def test_a_file_that_is_no_signature_is_refused(archive, keys, text):
    trusted = load_trusted_keys([keys("release")[1]])
    signature_path(archive).write_text(text)
    with pytest.raises(SignatureUnreadable, match="sign it again"):
        inspect_archive(archive, trusted=trusted)


def test_a_signature_that_only_claims_a_trusted_key_is_refused(archive, keys):
    (ours, public), (stranger, _) = keys("release"), keys("stranger")
    sign(archive, ours)
    claimed = json.loads(signature_path(archive).read_text())["verificationMaterial"]
    sign(archive, stranger)
    forged = json.loads(signature_path(archive).read_text()) | {"verificationMaterial": claimed}
    signature_path(archive).write_text(json.dumps(forged))
    with pytest.raises(SignatureWrong):
        inspect_archive(archive, trusted=load_trusted_keys([public]))


@pytest.mark.parametrize("part", ["payload", "payloadType", "signatures"])
def test_a_changed_signature_is_refused(archive, keys, part):
    ours, public = keys("release")
    sign(archive, ours)
    changed = json.loads(signature_path(archive).read_text())
    changed["dsseEnvelope"][part] = [] if part == "signatures" else "YQ=="
    signature_path(archive).write_text(json.dumps(changed))
    with pytest.raises(SignatureWrong):
        inspect_archive(archive, trusted=load_trusted_keys([public]))


def test_the_agents_private_copy_is_checked_by_the_signature_beside_the_archive(archive, keys, tmp_path):
    ours, public = keys("release")
    trusted, store, sha256 = load_trusted_keys([public]), tmp_path / "copies", file_sha256(archive)
    store.mkdir()
    with pytest.raises(ArchiveError, match=r"archive m-1\.0\.mar: is not signed: m-1\.0\.mar\.sig is missing"):
        inspect_copy(archive, sha256, store, trusted)
    assert list(store.iterdir()) == []
    sign(archive, ours)
    assert inspect_copy(archive, sha256, store, trusted).signed == "by release.pub"


def test_the_signature_is_checked_before_the_archive_is_parsed(tmp_path, keys):
    (_, public), (stranger, _) = keys("release"), keys("stranger")
    path = tmp_path / "m-1.0.mar"
    path.write_bytes(b"no zip at all")
    trusted = load_trusted_keys([public])
    with pytest.raises(SignatureMissing):
        inspect_archive(path, trusted=trusted)
    sign(path, stranger)
    with pytest.raises(SignerUnknown):
        inspect_archive(path, trusted=trusted)


def test_each_unusable_public_key_has_its_own_error(tmp_path, keys):
    private, public = keys("release")
    _, edwards = keys("edwards", ed25519.Ed25519PrivateKey.generate())
    _, curve = keys("bitcoin", ec.generate_private_key(ec.SECP256K1()))
    (tmp_path / "text.pub").write_text("no key")
    for path, error, text in (
        (tmp_path / "none.pub", KeyMissing, "no such file"),
        (tmp_path, KeyUnreadable, "Is a directory"),
        (tmp_path / "text.pub", KeyUnreadable, "no public key in PEM"),
        (private, KeyOfOtherKind, "a private key, a public key is needed"),
        (edwards, KeyOfOtherKind, "another kind of key"),
        (curve, KeyOfOtherKind, "another kind of key"),
    ):
        with pytest.raises(error, match=text):
            load_trusted_keys([public, path])


def test_each_unusable_private_key_has_its_own_error(tmp_path, keys):
    private, public = keys("release")
    locked, _ = keys("locked", password=b"secret")
    edwards, _ = keys("edwards", ed25519.Ed25519PrivateKey.generate())
    for path, password, error, text in (
        (tmp_path / "none.key", None, KeyMissing, "no such file"),
        (public, None, KeyOfOtherKind, "a public key, a private key is needed"),
        (edwards, None, KeyOfOtherKind, "another kind of key"),
        (locked, None, KeyUnreadable, "it has a password: set GRADSERVE_SIGNING_PASSWORD"),
        (locked, "wrong", KeyUnreadable, "the password is wrong"),
        (private, "secret", KeyUnreadable, "it has no password"),
    ):
        with pytest.raises(error, match=text):
            read_private_key(path, password)
