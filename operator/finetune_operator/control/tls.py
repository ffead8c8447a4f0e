"""Certificates of the progress server: an own CA, kept in one Secret, and a leaf that lives in memory only.

The CA outlives operator restarts, because running pods trust it; the leaf is made anew at every start.
"""

import base64
import logging
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube import port
from finetune_operator.kube.port import SECRETS, Cluster

log = logging.getLogger(__name__)

CA_DAYS = 3650
LEAF_DAYS = 365
CERT_KEY, KEY_KEY = "ca.crt", "ca.key"


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


def server_context(ca_certificate: bytes, ca_key: bytes, hosts: list[str]) -> ssl.SSLContext:
    """A TLS context with a new leaf for these DNS names and IP addresses."""
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
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # ssl reads certificates from files only; they are gone before the server listens.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "leaf.pem"
        file.touch(mode=0o600)
        file.write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + _pem(key))
        context.load_cert_chain(file)
    return context


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
