"""What the API server wrote down about one account: which rights it used, and what it was refused.

A right that is missing shows itself as a refused request even where the operator works on without it, as with an event that nobody misses.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One line of an audit log."""

    verb: str
    group: str
    resource: str
    """With its subresource behind a slash; empty for a path that is no resource."""
    namespace: str
    path: str
    pod: str
    """Of which pod the token was; empty for a token that is bound to none."""
    time: datetime
    refused: bool
    """By RBAC. What admission refuses, such as a quota, was allowed."""


def requests(log: Path, account: str) -> list[Request]:
    """All requests of this user, in the log's order."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["user"].get("username") != account:
            continue
        about = event.get("objectRef") or {}
        found.append(
            Request(
                verb=event["verb"],
                group=about.get("apiGroup", ""),
                resource="/".join(filter(None, (about.get("resource"), about.get("subresource")))),
                namespace=about.get("namespace", ""),
                path=event["requestURI"].partition("?")[0],
                pod="".join((event["user"].get("extra") or {}).get("authentication.kubernetes.io/pod-name", [])),
                time=datetime.fromisoformat(event["requestReceivedTimestamp"]),
                refused=(event.get("annotations") or {}).get("authorization.k8s.io/decision") == "forbid",
            )
        )
    return found
