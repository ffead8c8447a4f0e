"""The progress server's certificates, proven by real TLS handshakes."""

import asyncio
import ssl

import pytest

from finetune_operator.control.tls import make_ca, server_context


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
    context = server_context(certificate, key, ["progress.finetune-system.svc", "127.0.0.1", "::1"])
    assert await handshake(context, certificate, host) in ("TLSv1.2", "TLSv1.3")


async def test_a_leaf_made_after_a_restart_is_trusted_by_pods_of_before() -> None:
    certificate, key = make_ca()
    server_context(certificate, key, ["progress"])
    assert await handshake(server_context(certificate, key, ["progress"]), certificate, "progress")
