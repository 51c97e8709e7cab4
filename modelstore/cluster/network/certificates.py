"""A cluster's own authority, and the certificates that it gives its nodes and those who read through it."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

from modelstore.cluster.node.private import private_folder, read_private, write_private
from modelstore.errors import FormatError, StorageError, UnsupportedError

AUTHORITY = "authority.pem"  # the certificate and the key of the authority: who has them can join
_OWN, _KEY, _CA = "node.crt", "node.key", "ca.crt"
_NAME = "modelstore cluster"
_DAYS = 3650
_ENDS = ("-----BEGIN CERTIFICATE-----", "-----BEGIN PRIVATE KEY-----")


def new_authority(folder: Path) -> Path:
    """Make an authority; the file with its certificate and key, which only this user can read."""
    _check_installed()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    name = _name(_NAME)
    made = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, _hash())
    )
    file = private_folder(folder) / AUTHORITY
    write_private(file, _pem(made) + _pem_key(key))
    return file


def issue(authority: Path, folder: Path, hosts: list[str]) -> dict[str, str]:
    """Make a certificate for addresses of this machine: the environment by which Ray, and `channel.TLS`, use it.

    `FormatError` if the authority's file is none, or others could have written it.
    """
    _check_installed()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    signer, signing = _read(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    names = list(dict.fromkeys([*hosts, "127.0.0.1", "::1", "localhost", socket.gethostname()]))
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        _builder(_name(names[0]), signer.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .sign(signing, _hash())
    )
    private_folder(folder)
    write_private(folder / _OWN, _pem(made))
    write_private(folder / _KEY, _pem_key(key))
    write_private(folder / _CA, _pem(signer))
    return environment(folder)


def environment(folder: Path) -> dict[str, str]:
    """Ray's environment for a certificate that was issued there."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / _OWN),
        "RAY_TLS_SERVER_KEY": str(folder / _KEY),
        "RAY_TLS_CA_CERT": str(folder / _CA),
    }


def own_address(peer: str) -> str:
    """The address of this machine from which HOST:PORT is reached. `StorageError` if it is not."""
    host = peer.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], found[1]) as out:
            out.connect(found[4])  # nothing is sent: the kernel says which address it would be sent from
            return str(out.getsockname()[0])
    except OSError as error:
        raise StorageError(f"no way leads to {peer} ({error}): check the address") from None


def _read(authority: Path) -> tuple[Any, Any]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = read_private(authority) or b""
    if not all(mark.encode() in content for mark in _ENDS):
        raise FormatError(
            f"{authority} is not an authority of a cluster that only you can change: take the file that 'modelstore cluster "
            f"start --tls' names, and keep it as your own",
            object=os.fspath(authority),
        )
    try:
        return x509.load_pem_x509_certificate(content), load_pem_private_key(content, None)
    except ValueError as error:
        raise FormatError(f"{authority} cannot be read ({error}): copy it again", object=os.fspath(authority)) from None


def _builder(subject: Any, issuer: Any, key: Any) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _name(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _hash() -> Any:
    from cryptography.hazmat.primitives.hashes import SHA256

    return SHA256()


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    found: bytes = certificate.public_bytes(Encoding.PEM)
    return found


def _pem_key(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    found: bytes = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    return found


def _check_installed() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise UnsupportedError("TLS needs the package cryptography: pip install 'modelstore[cluster]'")
