"""Renders the chart with real Helm and installs of it what a test needs, so that the operator under test has the chart's rights.

`install` answers with a kubeconfig whose only credential is a token of the chart's ServiceAccount: a right that the chart forgets
fails a test. The Deployment is left out: tests start the operator as a process.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from testcluster import Cluster, binaries

CHART = Path(__file__).parents[2] / "charts" / "finetune-operator"
RELEASE = "finetune-operator"
SERVICE_ACCOUNT = RELEASE
TLS_SECRET = f"{RELEASE}-progress-tls"
OWN_NAMES = {"secrets": TLS_SECRET, "leases": RELEASE}
"""What the operator may touch by name in its own namespace: resource -> name."""
KUBE_VERSION = "1.34.4"
"""`helm template` asks no cluster; it checks the chart's kubeVersion against this one."""

NOT_FOR_TESTS = ("Deployment", "Service")

Object = dict[str, Any]


class RefusedError(Exception):
    """Helm refused to render; the text is what it said."""


def render(helm: Path, namespace: str, values: Object | None = None, release: str = RELEASE) -> list[Object]:
    """All objects of the chart with these values. RefusedError where Helm says no."""
    command = [str(helm), "template", release, str(CHART), "--namespace", namespace, "--kube-version", KUBE_VERSION]
    done = subprocess.run(
        [*command, "--values", "-"], input=json.dumps(values or {}), capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise RefusedError(done.stderr)
    return [doc for doc in yaml.safe_load_all(done.stdout) if doc]


def one(objects: list[Object], kind: str, **fields: str) -> Object:
    """The only object of this kind with these fields in its metadata."""
    found = [o for o in objects if o["kind"] == kind and all(o["metadata"].get(k) == v for k, v in fields.items())]
    assert len(found) == 1, f"{kind} {fields}: {[(o['kind'], o['metadata']['name']) for o in objects]}"
    return found[0]


def install(cluster: Cluster, namespace: str, values: Object | None = None, *, helm: Path | None = None) -> Path:
    """Applies CRD, ServiceAccount, roles and the empty TLS Secret as admin; the kubeconfig of the ServiceAccount's token.

    The namespace and those of `watchNamespaces` must exist. `helm`: the binary, found by testcluster where not given.
    """
    objects = [o for o in render(helm or binaries.ensure(["helm"])["helm"], namespace, values) if o["kind"] not in NOT_FOR_TESTS]
    # Server-side and by force: several tests install over each other's CRD.
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=everything)
    for crd in (o["metadata"]["name"] for o in objects if o["kind"] == "CustomResourceDefinition"):
        cluster.wait_for_crd(crd)
    account = (values or {}).get("serviceAccount", {}).get("name") or SERVICE_ACCOUNT
    return token_kubeconfig(cluster, namespace, account)


def token_kubeconfig(cluster: Cluster, namespace: str, account: str) -> Path:
    """A kubeconfig that holds a token of this ServiceAccount (TokenRequest, 8 hours) and nothing else."""
    token = cluster.kubectl("create", "token", account, "-n", namespace, "--duration=8h").stdout.strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text(encoding="utf-8"))
    config["users"][0]["user"] = {"token": token}
    path = cluster.kubeconfig.with_name(f"{account}-{namespace}.kubeconfig")
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
