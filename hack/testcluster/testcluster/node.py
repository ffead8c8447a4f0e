"""A real single node: containerd, kubelet, kube-proxy, scheduler and DNS beside the control plane, inside a sandbox.

Why it exists: what only a kubelet does (images, Secrets as env, projected tokens, OOM kills, grace periods, drains) is proven by a
kubelet. The settings are those that were seen to work as root on a small machine without CAP_SYS_RESOURCE and with cgroup v1.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from testcluster import binaries, sandbox
from testcluster.cluster import Cluster
from testcluster.processes import Child, ChildError, wait_until

NAME = "node-1"
ADDRESS = sandbox.NODE_ADDRESS
_PODS, _DNS_DOMAIN = "10.77.0.0/16", "cluster.local"
_GPUS = "8"
_READY_SECONDS = 90.0
PAUSE_IMAGE = "localhost/finetune-pause:2"
_SOCKET = Path("/run/containerd.sock")
"""Of containerd; the sandbox has a /run of its own."""


def ctr(*words: str, check: bool = True, stdin: Any = None) -> "subprocess.CompletedProcess[str]":
    """containerd's own client, in Kubernetes' namespace, of the node in this sandbox."""
    argv = ["ctr", f"--address={_SOCKET}", "--namespace=k8s.io", *words]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=stdin, check=False)
    if check and done.returncode != 0:
        raise ChildError(f"ctr {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    return done


class Node:
    """Starts on `start()` or `with`, in a sandbox only. `cluster` is its control plane; images are kept from start to start."""

    def __init__(self, *, audit: bool = False) -> None:
        if not sandbox.inside():
            raise RuntimeError("a Node runs in a sandbox: python -m testcluster.sandbox COMMAND")
        self.directory = sandbox.home() / "tmp" / "node"
        self.cluster = Cluster(host=ADDRESS, audit=audit, controllers=("*",))
        self._children: dict[str, Child] = {}
        self._programs: dict[str, Path] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the node is Ready. Raises ChildError with the end of a log."""
        self._programs = binaries.ensure(binaries.NODE)
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            _network()
            _cgroups()
            self.cluster.start()
            self._start("containerd", ["containerd", f"--config={self._containerd()}"])
            wait_until(lambda: ctr("version", check=False).returncode == 0, self._running, _READY_SECONDS, "containerd")
            self._forget_containers()
            self._start("kubelet", self._kubelet())
            self._start("kube-proxy", self._kube_proxy())
            self._start("kube-scheduler", [self._programs["kube-scheduler"], *self._scheduler()])
            self._start("coredns", [self._programs["coredns"], f"-conf={self._corefile()}"])
            wait_until(self._is_ready, self._running, _READY_SECONDS, "the node")
            self._add_gpus()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all parts; the sandbox ends what they started."""
        for name in ("kubelet", "kube-proxy", "kube-scheduler", "coredns", "containerd"):
            if name in self._children:
                self._children.pop(name).stop()
        self.cluster.stop()

    def log_of(self, part: str) -> Path:
        """The log file of containerd, kubelet, kube-proxy, kube-scheduler or coredns."""
        return self.directory / f"{part}.log"

    # ---------------------------------------------------------------------------------------------------------- parts ---
    @property
    def _running(self) -> list[Child]:
        return list(self._children.values())

    def _start(self, name: str, argv: "list[str | Path]") -> None:
        self._children[name] = Child.start(name, [str(word) for word in argv], log=self.log_of(name))

    def _write(self, name: str, content: "str | Mapping[str, Any]") -> Path:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return file

    def _containerd(self) -> Path:
        ipam = {"type": "host-local", "subnet": _PODS, "dataDir": str(self.directory / "ipam"), "routes": [{"dst": "0.0.0.0/0"}]}
        # Point to point: each packet passes the host's own stack, so that Services work between two pods without br_netfilter.
        network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": ipam}]}
        self._write("cni/10-pods.conflist", network)
        return self._write(
            "containerd.toml",
            f"""
version = 2
root = "{sandbox.containerd_root()}"
state = "/run/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "{_SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.directory / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true  # a negative one is refused without CAP_SYS_RESOURCE
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{self.directory / "cni"}"
""",
        )

    def _forget_containers(self) -> None:
        """Those of the last start: their processes ended with its sandbox. The images stay."""
        for kind in ("tasks", "containers"):
            names = ctr(kind, "list", "-q").stdout.split()
            if names:
                ctr(kind, "rm", *names, check=False)

    def _kubelet(self) -> "list[str | Path]":
        authority = self.cluster.certificates
        client = authority.client("kubelet-client", f"system:node:{NAME}", ["system:nodes"])
        server = authority.server("kubelet-server", [NAME, ADDRESS])
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self.cluster.ca_file)},
            },
            "authorization": {"mode": "AlwaysAllow"},  # of those with a certificate
            "tlsCertFile": str(server[0]),
            "tlsPrivateKeyFile": str(server[1]),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{sandbox.CGROUP}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "makeIPTablesUtilChains": False,
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [ADDRESS],
            "clusterDomain": _DNS_DOMAIN,
            "resolvConf": str(self._write("resolv.conf", "")),
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "syncFrequency": "10s",
            "nodeStatusUpdateFrequency": "5s",
            "registerNode": True,
        }
        return [
            self._programs["kubelet"],
            f"--config={self._write('kubelet.yaml', config)}",
            f"--kubeconfig={self._kubeconfig('kubelet', client)}",
            f"--hostname-override={NAME}",
            f"--node-ip={ADDRESS}",
            f"--root-dir={self.directory / 'kubelet'}",
            f"--cert-dir={self.directory / 'kubelet-pki'}",
        ]

    def _kube_proxy(self) -> "list[str | Path]":
        client = self.cluster.certificates.client("kube-proxy", "system:kube-proxy")
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clientConnection": {"kubeconfig": str(self._kubeconfig("kube-proxy", client))},
            "hostnameOverride": NAME,
            "clusterCIDR": _PODS,
            "conntrack": {"maxPerCore": 0, "min": 0},  # a limit of the whole machine, which is not ours to set
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        }
        return [self._programs["kube-proxy"], f"--config={self._write('kube-proxy.yaml', config)}"]

    def _scheduler(self) -> list[str]:
        client = self.cluster.certificates.client("kube-scheduler", "system:kube-scheduler")
        return [f"--kubeconfig={self._kubeconfig('kube-scheduler', client)}", "--leader-elect=false", "--secure-port=0"]

    def _corefile(self) -> Path:
        return self._write(
            "Corefile",
            f""".:53 {{
    bind {ADDRESS}
    errors
    kubernetes {_DNS_DOMAIN} in-addr.arpa {{
        kubeconfig {self.cluster.kubeconfig}
        pods insecure
        ttl 1
    }}
}}
""",
        )

    def _kubeconfig(self, name: str, client: tuple[Path, Path]) -> Path:
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())
        config["users"][0]["user"] = {"client-certificate": str(client[0]), "client-key": str(client[1])}
        return self._write(f"{name}.kubeconfig", yaml.safe_dump(config))

    # ---------------------------------------------------------------------------------------------------------- state ---
    def _is_ready(self) -> bool:
        path = "-o=jsonpath={.status.conditions[?(@.type=='Ready')].status}"
        time.sleep(0.2)
        return self.cluster.kubectl("get", "node", NAME, path, check=False).stdout == "True"

    def _add_gpus(self) -> None:
        """An extended resource that nothing backs: pods that ask for GPUs can be scheduled."""
        patch = json.dumps({"status": {"capacity": {"nvidia.com/gpu": _GPUS}, "allocatable": {"nvidia.com/gpu": _GPUS}}})
        self.cluster.kubectl("patch", "node", NAME, "--subresource=status", "--type=merge", "-p", patch)


def _network() -> None:
    for words in (["add", "node0", "type", "bridge"], ["set", "node0", "up"]):
        subprocess.run(["ip", "link", *words], check=True)
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "node0"], check=True)


def _cgroups() -> None:
    """The node's own place in every hierarchy; the kubelet makes its groups below it."""
    if Path("/sys/fs/cgroup/cgroup.controllers").is_file():
        (Path("/sys/fs/cgroup") / sandbox.CGROUP).mkdir(exist_ok=True)
        return
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        if hierarchy.is_dir() and (hierarchy / "cgroup.procs").is_file():
            own = hierarchy / sandbox.CGROUP
            own.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):  # empty in a new cpuset, and then nothing can be put into it
                if (own / name).is_file():
                    shutil.copyfile(hierarchy / name, own / name)
