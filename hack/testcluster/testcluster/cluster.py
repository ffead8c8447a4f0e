"""A Kubernetes control plane on loopback: etcd, kube-apiserver and kube-controller-manager, for one process and its tests.

Why it exists: no imitation of an API server has the real one's validation, conflicts, watches, finalizers and Job controller.
The settings are those that were seen to work and to be fast on two cores (see the comments).
"""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from testcluster import binaries, pki, statedir
from testcluster.processes import Child, ChildError, free_port, lost_the_port, wait_until
from testcluster.readiness import answers_ok

CONTROLLERS = (
    "job-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "root-ca-certificate-publisher-controller",  # the ConfigMap in every pod's default token volume
    "ttl-after-finished-controller",
    "endpoints-controller",
    "endpointslice-controller",
)
_ISSUER = "https://kubernetes.default.svc"
_SERVICE_RANGE, _SERVICE_IP = "10.0.0.0/24", "10.0.0.1"
_READY_SECONDS = 120.0
_START_ATTEMPTS = 3  # a port can be lost between choosing and binding it
_LOOPBACK = "127.0.0.1"
_AUDIT_POLICY = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n- level: Metadata\n"


class Cluster:
    """Starts on `start()` or `with`; everything lives in `directory`, which is removed at the end if it was made here."""

    def __init__(
        self,
        *,
        directory: Path | None = None,
        host: str = _LOOPBACK,
        audit: bool = False,
        controllers: Sequence[str] = (),
        api_server_args: Sequence[str] = (),
        controller_manager_args: Sequence[str] = (),
    ) -> None:
        """`host` is the address to listen on: of the node where pods call the API server.

        `controllers` are started besides CONTROLLERS; the other arguments are further flags, the last one given wins.
        """
        self._host = host
        self._own_directory = directory is None
        self._directory = directory
        self._audit = audit
        self._controllers = (*CONTROLLERS, *controllers)
        self._extra = {"kube-apiserver": tuple(api_server_args), "kube-controller-manager": tuple(controller_manager_args)}
        self._programs: dict[str, Path] = {}
        self._children: dict[str, Child] = {}
        self._authority: pki.Authority | None = None
        self._port = 0
        self._etcd_port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the API server is ready and the controllers run. Raises ChildError with the end of a log."""
        if self._children:
            raise RuntimeError("this cluster runs already")
        self._programs = binaries.ensure(binaries.CONTROL_PLANE)
        if self._own_directory:
            self._directory = statedir.create("cluster")
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
            self._start_on_a_free_port("etcd")
            self._start_on_a_free_port("kube-apiserver")
            self._write_kubeconfig(self.kubeconfig, "admin", *self._admin)
            self.start_component("kube-controller-manager")
            self._wait_for_default_service_account()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all parts (SIGTERM, later SIGKILL) and removes the folder if `start` made it. Twice is fine."""
        for child in self._children.values():  # all at once: the API server takes its time without etcd
            child.process.terminate()
        for name in ("kube-controller-manager", "kube-apiserver", "etcd"):
            self.stop_component(name)
        if self._own_directory and self._directory is not None:
            statedir.remove(self._directory)
            self._directory = None

    @property
    def directory(self) -> Path:
        """The folder with data, certificates and logs."""
        if self._directory is None:
            raise RuntimeError("this cluster does not run")
        return self._directory

    @property
    def url(self) -> str:
        """The API server's address."""
        return f"https://{self._host}:{self._port}"

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig file with all rights (group system:masters)."""
        return self.directory / "kubeconfig"

    @property
    def ca_file(self) -> Path:
        """The certificate of the CA that signed the API server's certificate (PEM)."""
        return self._pki.ca_file

    @property
    def audit_log(self) -> Path:
        """One JSON object a line for every finished request, if the cluster was made with audit=True."""
        if not self._audit:
            raise RuntimeError("this cluster was made without audit=True")
        return self.directory / "audit.log"

    def pid_of(self, component: str) -> int:
        """The pid of "etcd", "kube-apiserver" or "kube-controller-manager"."""
        return self._children[component].pid

    def wait_for_crd(self, name: str) -> None:
        """Until the API server serves it. (`kubectl wait` gives up on one that is so new that it has no conditions.)"""
        wait_until(lambda: self._is_established(name), [], _READY_SECONDS, f"the CRD {name}")

    def _is_established(self, name: str) -> bool:
        path = '{.status.conditions[?(@.type=="Established")].status}'
        return self.kubectl("get", "crd", name, "-o", f"jsonpath={path}", check=False).stdout == "True"

    def kubectl(
        self, *args: str, stdin: str | None = None, check: bool = True, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as admin; with `check`, a failure raises ChildError that carries what kubectl said."""
        done = subprocess.run(
            [str(self._programs["kubectl"]), f"--kubeconfig={self.kubeconfig}", *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise ChildError(f"kubectl {' '.join(args)} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig file of another user, who has no rights but those that are bound to that name or those groups."""
        file = self.directory / f"{user.replace(':', '-').replace('/', '-')}.kubeconfig"
        self._write_kubeconfig(file, user, *self._pki.client(f"user-{file.stem}", user, groups))
        return file

    @property
    def certificates(self) -> pki.Authority:
        """The cluster's CA, for programs that join it."""
        return self._pki

    def issue_server_certificate(self, name: str, hosts: Sequence[str]) -> tuple[Path, Path]:
        """A server certificate from the cluster's CA: the paths of the certificate and of its key."""
        return self._pki.server(name, hosts)

    def stop_component(self, name: str, *, kill: bool = False) -> None:
        """Ends one part; `kill` sends SIGKILL at once."""
        child = self._children.pop(name, None)
        if child is not None:
            child.stop(0.0 if kill else 15.0)

    def start_component(self, name: str) -> None:
        """Starts a part that was stopped, with the same port and data, and waits until it is ready."""
        if name in self._children:
            raise RuntimeError(f"{name} runs already")
        child = Child.start(name, [str(self._programs[name]), *self._arguments(name)], log=self._log(name))
        self._children[name] = child
        ready = {
            "etcd": lambda: answers_ok(f"http://{_LOOPBACK}:{self._etcd_port}/health"),
            "kube-apiserver": lambda: answers_ok(f"{self.url}/readyz", self.ca_file, self._admin),
            # Without leader election it works as soon as it runs; the default service account (below) shows that it does.
            "kube-controller-manager": lambda: True,
        }[name]
        wait_until(ready, list(self._children.values()), _READY_SECONDS, name)

    @property
    def _pki(self) -> pki.Authority:
        if self._authority is None:
            raise RuntimeError("this cluster was never started")
        return self._authority

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _prepare(self) -> None:
        folder = self.directory / "pki"
        self._authority = pki.Authority(folder)
        names = ["localhost", _LOOPBACK, self._host, _SERVICE_IP, "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        self._serving = self._authority.server("apiserver", list(dict.fromkeys(names)))
        self._admin = self._authority.client("admin", "admin", ["system:masters"])
        self._signing_key = pki.signing_key(folder / "service-account.key")
        (self.directory / "audit-policy.yaml").write_text(_AUDIT_POLICY)

    def _start_on_a_free_port(self, name: str) -> None:
        for attempt in range(1, _START_ATTEMPTS + 1):
            if name == "etcd":
                self._etcd_port, self._peer_port = free_port(_LOOPBACK), free_port(_LOOPBACK)
            else:
                self._port = free_port(self._host)
            try:
                self.start_component(name)
            except ChildError:
                self.stop_component(name)
                if attempt == _START_ATTEMPTS or not lost_the_port(self._log(name)):
                    raise
            else:
                return

    def _wait_for_default_service_account(self) -> None:
        """Controllers work as soon as this account is there; a pod in the default namespace needs it."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.kubectl("get", "serviceaccount", "default", check=False).returncode != 0:
            for child in self._children.values():
                child.check()
            if time.monotonic() > deadline:
                raise ChildError("kube-controller-manager made no default service account")
            time.sleep(0.1)

    def _arguments(self, name: str) -> list[str]:
        flags = {"etcd": self._etcd, "kube-apiserver": self._api_server, "kube-controller-manager": self._controller_manager}[
            name
        ]()
        return [f"--{key}={value}" for key, value in flags.items()] + list(self._extra.get(name, ()))

    def _etcd(self) -> dict[str, str]:
        # Always on loopback: pods must not reach it.
        client, peer = f"http://{_LOOPBACK}:{self._etcd_port}", f"http://{_LOOPBACK}:{self._peer_port}"
        return {
            "data-dir": str(self.directory / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "unsafe-no-fsync": "true",  # throw-away data
        }

    def _api_server(self) -> dict[str, str]:
        flags = {
            "etcd-servers": f"http://{_LOOPBACK}:{self._etcd_port}",
            "bind-address": self._host,
            "secure-port": str(self._port),
            "tls-cert-file": str(self._serving[0]),
            "tls-private-key-file": str(self._serving[1]),
            "client-ca-file": str(self.ca_file),
            "service-account-key-file": str(self._signing_key),
            "service-account-signing-key-file": str(self._signing_key),
            "service-account-issuer": _ISSUER,
            "service-cluster-ip-range": _SERVICE_RANGE,
            # Loopback is no address for an endpoint.
            "endpoint-reconciler-type": "none" if self._host == _LOOPBACK else "lease",
            "allow-privileged": "true",
            "authorization-mode": "Node,RBAC",
            # For logs and exec, where there is a kubelet.
            "kubelet-client-certificate": str(self._admin[0]),
            "kubelet-client-key": str(self._admin[1]),
            "kubelet-preferred-address-types": "InternalIP",
            "shutdown-delay-duration": "0s",
        }
        if self._audit:
            policy = str(self.directory / "audit-policy.yaml")
            flags |= {"audit-policy-file": policy, "audit-log-path": str(self.audit_log), "audit-log-mode": "blocking"}
        return flags

    def _controller_manager(self) -> dict[str, str]:
        return {
            "kubeconfig": str(self.kubeconfig),
            "leader-elect": "false",
            "service-account-private-key-file": str(self._signing_key),
            "root-ca-file": str(self.ca_file),
            "controllers": ",".join(self._controllers),
            "kube-api-qps": "500",  # the default of 20 caps bare Jobs at three a second
            "kube-api-burst": "1000",
            "concurrent-job-syncs": "20",
            "secure-port": "0",
            "use-service-account-credentials": "false",
        }

    def _write_kubeconfig(self, file: Path, user: str, certificate: Path, key: Path) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "testcluster", "cluster": {"server": self.url, "certificate-authority": str(self.ca_file)}}],
            "users": [{"name": user, "user": {"client-certificate": str(certificate), "client-key": str(key)}}],
            "contexts": [{"name": "testcluster", "context": {"cluster": "testcluster", "user": user}}],
            "current-context": "testcluster",
        }
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(config))
