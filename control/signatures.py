"""Sign archives with a key, offline, in the format of OpenSSF Model Signing: `<archive>.sig` beside the archive.

A signature names its key and the SHA-256 of the archive's bytes. A check computes that hash and parses the signature,
but not the archive. Importing this module takes a second and 40 MB, so only signing and checking code imports it.

Source: https://github.com/ossf/model-signing-spec; the file is a Sigstore bundle, https://docs.sigstore.dev/about/bundle/
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from model_signing import signing, verifying

from control.errors import (
    KeyMissing,
    KeyOfOtherKind,
    KeyUnreadable,
    SignatureMissing,
    SignatureUnreadable,
    SignatureWrong,
    SignerUnknown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# The curves that model-signing supports.
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_KIND = "an elliptic-curve key (P-256, P-384 or P-521)"
# A signature by key has about 1 kB.
_MAX_SIGNATURE_BYTES = 100_000


@dataclass(frozen=True)
class TrustedKeys:
    """Trusted public keys: the file of each by its fingerprint. `read_trusted_keys` creates it."""

    keys: Mapping[str, Path]

    def check(self, archive: Path, signature: Path) -> str:
        """Return the file name of the key that signed the bytes of `archive`, by the file `signature`.

        Raises:
            SignatureMissing: the file `signature` does not exist.
            SignatureUnreadable: the file is no signature by key.
            SignerUnknown: the signature is by a key that is not trusted.
            SignatureWrong: the signature is of other bytes, or was changed.
            KeyMissing, KeyUnreadable, KeyOfOtherKind: the key's file was removed or replaced.
        """
        fingerprint = _signer(archive, signature)
        key = self.keys.get(fingerprint)
        if key is None:
            raise SignerUnknown(archive, fingerprint, [path.name for path in self.keys.values()])
        read_public_key(key)
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=key).verify(archive, signature)
        except (InvalidSignature, ValueError, LookupError, TypeError) as error:
            raise SignatureWrong(archive, key) from error
        return key.name


def read_trusted_keys(paths: Iterable[Path]) -> TrustedKeys:
    """Return the public keys in the files `paths`.

    Raises:
        KeyMissing, KeyUnreadable, KeyOfOtherKind: one of them cannot be used.
    """
    return TrustedKeys({_fingerprint(read_public_key(path)): path for path in paths})


def sign_archive(archive: Path, signature: Path, key: Path, password: str | None = None) -> None:
    """Sign the bytes of `archive` with the private key in the file `key`, and write the file `signature`.

    Raises:
        KeyMissing, KeyUnreadable, KeyOfOtherKind: the key cannot be used, or not with this password.
    """
    secret = password.encode() if password else None
    read_private_key(key, password)
    partial = signature.with_suffix(".part")
    # The library passes the password on unchanged, and the reader of the key needs bytes.
    signer = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)  # type: ignore[arg-type]
    signer.sign(archive, partial)
    partial.replace(signature)


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """Return the public key in the PEM file `path`.

    Raises:
        KeyMissing, KeyUnreadable, KeyOfOtherKind: the file has no usable public key.
    """
    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise KeyOfOtherKind(path, "a private key", "a public key is needed")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnreadable(path, "it holds no public key in PEM") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise KeyOfOtherKind(path, "another kind of key", f"{_KIND} is needed")
    return key


def read_private_key(path: Path, password: str | None = None) -> EllipticCurvePrivateKey:
    """Return the private key in the PEM file `path`.

    Raises:
        KeyMissing, KeyUnreadable, KeyOfOtherKind: the file has no private key that this password opens.
    """
    data = _read(path)
    if b"PUBLIC KEY-----" in data:
        raise KeyOfOtherKind(path, "a public key", "a private key is needed")
    try:
        key = load_pem_private_key(data, password.encode() if password else None)
    except TypeError as error:
        remedy = "it has no password: unset" if password else "it has a password: set"
        raise KeyUnreadable(path, f"{remedy} GRADSERVE_SIGNING_PASSWORD") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        problem = "the password is wrong, or it is" if password else "it is"
        raise KeyUnreadable(path, f"{problem} no private key in PEM") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise KeyOfOtherKind(path, "another kind of key", f"{_KIND} is needed")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise KeyMissing(path) from error
    except OSError as error:
        raise KeyUnreadable(path, error.strerror or str(error)) from error


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the key's name in a signature: the SHA-256 of the public key's PEM."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _signer(archive: Path, signature: Path) -> str:
    """Return the fingerprint of the key that the signature names."""
    try:
        with signature.open("rb") as file:
            data = file.read(_MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError as error:
        raise SignatureMissing(archive, signature) from error
    except OSError as error:
        raise SignatureUnreadable(archive, error.strerror or str(error)) from error
    problem = "it is no signature by key in OpenSSF Model Signing's format"
    if len(data) > _MAX_SIGNATURE_BYTES:
        raise SignatureUnreadable(archive, problem)
    try:
        return str(json.loads(data)["verificationMaterial"]["publicKey"]["hint"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise SignatureUnreadable(archive, problem) from error
