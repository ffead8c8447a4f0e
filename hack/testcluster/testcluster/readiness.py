"""One question over HTTP: is that server ready? Used while things start, so every failure means "not yet"."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

_SECONDS = 2.0


def answers_ok(url: str, ca_file: Path | None = None, client: tuple[Path, Path] | None = None) -> bool:
    """Whether a GET is answered with 200; `client` is a certificate and its key."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # loopback is never behind a proxy
    if ca_file is not None:
        context = ssl.create_default_context(cafile=str(ca_file))
        if client is not None:
            context.load_cert_chain(*client)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=_SECONDS) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError, ValueError):  # refused, not ready (4xx/5xx), cut off, no HTTP yet
        return False
