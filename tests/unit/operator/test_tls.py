"""The progress server's certificates, proven by real TLS handshakes."""

import asyncio
import ssl
from pathlib import Path

import pytest

from finetune_operator.control.tls import UnusableFilesError, files_identity, make_ca, make_leaf, own_identity


async def handshake(server: ssl.SSLContext, ca: bytes, host: str) -> str:
    """The TLS version that was agreed on; raises ssl.SSLError where the client does not trust the server."""

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    listening = await asyncio.start_server(close, "127.0.0.1", 0, ssl=server)
    try:
        port = listening.sockets[0].getsockname()[1]
        context = ssl.create_default_context(cadata=ca.decode())
        # What Python 3.13 does by default, and with it every trainer image that is built on it.
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=host)
        version = str(writer.get_extra_info("ssl_object").version())
        writer.close()
        return version
    finally:
        listening.close()


@pytest.mark.parametrize("host", ["progress.finetune-system.svc", "127.0.0.1", "::1"])
async def test_a_pod_that_has_the_ca_trusts_the_server_under_its_names(host: str) -> None:
    certificate, key = make_ca()
    context = own_identity(certificate, key, ["progress.finetune-system.svc", "127.0.0.1", "::1"]).context
    assert await handshake(context, certificate, host) in ("TLSv1.2", "TLSv1.3")


async def test_a_leaf_made_after_a_restart_is_trusted_by_pods_of_before() -> None:
    certificate, key = make_ca()
    own_identity(certificate, key, ["progress"])
    assert await handshake(own_identity(certificate, key, ["progress"]).context, certificate, "progress")


async def test_our_leaf_is_made_anew_while_it_serves() -> None:
    certificate, key = make_ca()
    identity = own_identity(certificate, key, ["progress"])
    before = identity.context.session_stats()["accept"]
    assert identity.renew()
    assert await handshake(identity.context, certificate, "progress")
    assert identity.context.session_stats()["accept"] > before


def files(folder: Path, ca: tuple[bytes, bytes], host: str) -> None:
    """As cert-manager's Secret looks when it is mounted."""
    (folder / "ca.crt").write_bytes(ca[0])
    leaf, key = make_leaf(*ca, [host])
    (folder / "tls.crt").write_bytes(leaf)
    (folder / "tls.key").write_bytes(key)


async def test_files_that_are_renewed_serve_without_a_restart(tmp_path: Path) -> None:
    ca = make_ca()
    files(tmp_path, ca, "old")
    identity = files_identity(tmp_path)
    assert await handshake(identity.context, ca[0], "old")
    files(tmp_path, ca, "new")
    assert identity.renew()
    assert await handshake(identity.context, ca[0], "new")
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(identity.context, ca[0], "old")


async def test_files_of_another_ca_end_the_operator_and_broken_ones_do_not(tmp_path: Path) -> None:
    ca = make_ca()
    files(tmp_path, ca, "progress")
    identity = files_identity(tmp_path)
    identity.period = 0.01
    stop = asyncio.Event()
    keeping = asyncio.create_task(identity.keep(stop))
    (tmp_path / "tls.key").write_bytes(make_leaf(*ca, ["progress"])[1])  # of another certificate
    await asyncio.sleep(0.1)
    assert not stop.is_set()
    assert await handshake(identity.context, ca[0], "progress")
    files(tmp_path, make_ca(), "progress")
    await asyncio.wait_for(stop.wait(), 10)
    await keeping


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
def test_files_that_cannot_serve_are_named(tmp_path: Path, name: str) -> None:
    files(tmp_path, make_ca(), "progress")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnusableFilesError, match=name):
        files_identity(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UnusableFilesError, match=f"{name} cannot be read"):
        files_identity(tmp_path)
