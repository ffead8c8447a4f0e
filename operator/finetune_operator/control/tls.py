"""Certificates of the progress server: an own CA in one Secret with a leaf in memory, or files that somebody else renews.

The CA outlives operator restarts, because running pods trust it; our leaf is made anew at every start and every day. Files are those of a
Secret of cert-manager, mounted (ca.crt, tls.crt, tls.key); a new leaf in them is taken while the server runs.
"""

import asyncio
import base64
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube import port
from finetune_operator.kube.port import SECRETS, Cluster

log = logging.getLogger(__name__)

CA_DAYS = 3650
LEAF_DAYS = 90
RENEW_LEAF_SECONDS = 86400.0
READ_FILES_SECONDS = 10.0
CERT_KEY, KEY_KEY = "ca.crt", "ca.key"


class UnusableFilesError(ValueError):
    """The files of --tls-dir cannot serve; the sentence says which and why."""


@dataclass
class Identity:
    """Who the progress server is: the CA that pods trust, and a TLS context whose leaf is replaced while it serves."""

    ca: bytes
    context: ssl.SSLContext
    renew: Callable[[], bool]
    """Puts a new leaf into the context; False when the CA is another one, which pods of new attempts must be told."""
    period: float
    """Seconds between two calls of it."""

    async def keep(self, stop: asyncio.Event) -> None:
        """Renews for ever. Another CA ends the operator, so that it starts with that one."""
        while True:
            await asyncio.sleep(self.period)
            try:
                same = self.renew()
            except (UnusableFilesError, ssl.SSLError) as error:
                log.error("progress: the certificate is not renewed, the old one serves on: %s", error)  # noqa: TRY400
                continue
            if not same:
                log.warning("progress: the CA has changed; ending, to start with the new one")
                stop.set()
                return

    def kept(self, stop: asyncio.Event) -> Callable[[web.Application], AsyncIterator[None]]:
        """For cleanup_ctx: renews as long as the application serves."""

        async def context(_: web.Application) -> AsyncIterator[None]:
            task = asyncio.create_task(self.keep(stop), name="certificate")
            task.add_done_callback(lambda done: None if done.cancelled() else stop.set())
            yield
            task.cancel()

        return context


def own_identity(certificate: bytes, key: bytes, hosts: list[str]) -> Identity:
    """With leaves of our own CA for these DNS names and IP addresses."""
    context = _context()

    def renew() -> bool:
        # ssl reads certificates from files only; they are gone before the server listens.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "leaf.pem"
            file.touch(mode=0o600)
            file.write_bytes(b"".join(make_leaf(certificate, key, hosts)))
            context.load_cert_chain(file)
        return True

    renew()
    return Identity(certificate, context, renew, RENEW_LEAF_SECONDS)


def files_identity(folder: Path) -> Identity:
    """With the leaf that lies in the folder. UnusableFilesError where something is missing or does not fit."""
    context = _context()
    seen: list[bytes] = []

    def renew() -> bool:
        files = [_read(folder / name) for name in (CERT_KEY, "tls.crt", "tls.key")]
        same = not seen or seen[0] == files[0]
        if files != seen:
            try:
                # First where a key that does not fit harms nobody.
                for target in (_context(), context):
                    target.load_cert_chain(folder / "tls.crt", folder / "tls.key")
                ssl.create_default_context(cadata=files[0].decode())
            except (ssl.SSLError, ValueError) as error:
                raise UnusableFilesError(f"{folder}: tls.crt, tls.key and ca.crt do not make a certificate: {error}") from error
            seen[:] = files
        return same

    renew()
    return Identity(seen[0], context, renew, READ_FILES_SECONDS)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableFilesError(f"{path} cannot be read: {error.strerror}") from error
    if not content:
        raise UnusableFilesError(f"{path} is empty: the issuer must be one that gives its CA")
    return content


async def load_ca(cluster: Cluster, namespace: str, secret: str) -> tuple[bytes, bytes]:
    """Certificate and key (PEM) of the CA in the Secret; makes them where the Secret is empty. Raises ApiError."""
    while True:
        found = await cluster.get(SECRETS, namespace, secret)
        data = found.get("data") or {}
        if CERT_KEY in data and KEY_KEY in data:
            return base64.b64decode(data[CERT_KEY]), base64.b64decode(data[KEY_KEY])
        certificate, key = make_ca()
        encoded = {CERT_KEY: base64.b64encode(certificate).decode(), KEY_KEY: base64.b64encode(key).decode()}
        patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "data": encoded}
        try:
            await cluster.patch(SECRETS, namespace, secret, patch)
        except port.Conflict:
            continue  # another operator was first: take its CA
        log.info("made a CA for the progress server in Secret %s/%s", namespace, secret)
        return certificate, key


def make_ca() -> tuple[bytes, bytes]:
    """A new CA: certificate and key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress CA")])
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def make_leaf(ca_certificate: bytes, ca_key: bytes, hosts: list[str]) -> tuple[bytes, bytes]:
    """A new leaf of this CA for these DNS names and IP addresses: certificate and key, PEM."""
    issuer = x509.load_pem_x509_certificate(ca_certificate)
    issuer_key = serialization.load_pem_private_key(ca_key, None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the CA's key is not an EC key: delete the Secret's data to have it made anew")
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])]), issuer.subject, key.public_key(), LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return leaf.public_bytes(serialization.Encoding.PEM), _pem(key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
