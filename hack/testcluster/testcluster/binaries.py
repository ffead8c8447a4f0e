"""The programs of the test cluster: found where they are, else built once from Go modules into a cache.

First KUBEBUILDER_ASSETS (trusted), then the cache, then PATH (if the version fits), else `gobuild`. One table says what there is.
"""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testcluster.gobuild import Target, build

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
NODE = ("kube-scheduler", "kubelet", "kube-proxy", "coredns")

_KUBERNETES = "v1.34.4"
_VERSION_PACKAGE = "k8s.io/component-base/version"
_KUBERNETES_FLAGS = (
    f"-X {_VERSION_PACKAGE}.gitVersion={_KUBERNETES}",
    f"-X {_VERSION_PACKAGE}.gitMajor=1",
    f"-X {_VERSION_PACKAGE}.gitMinor=34",
)
# CoreDNS with the plugins that a cluster's Corefile names: the clouds' SDKs would triple the time to build.
_COREDNS_MAIN = """package main

import (
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
)

func init() { dnsserver.Directives = []string{"bind", "errors", "kubernetes"} }

func main() { coremain.Run() }
"""


@dataclass(frozen=True)
class Source:
    """How the programs of one module are built, and how to tell on PATH that a program will do."""

    target: Target
    asks: Mapping[str, tuple[str, ...]]
    """Program name -> arguments that print its version."""
    accepts: str
    """A regular expression that the printed version must match."""


SOURCES: tuple[Source, ...] = (
    Source(
        Target(
            module="k8s.io/kubernetes",
            version=_KUBERNETES,
            packages={name: f"k8s.io/kubernetes/cmd/{name}" for name in ("kube-apiserver", "kube-controller-manager", "kubectl")},
            ldflags=_KUBERNETES_FLAGS,
            wrapped=True,
            minutes=6.0,
        ),
        {
            "kube-apiserver": ("--version",),
            "kube-controller-manager": ("--version",),
            "kubectl": ("version", "--client"),
        },
        r"v1\.34\.",
    ),
    Source(
        Target(
            module="k8s.io/kubernetes",
            version=_KUBERNETES,
            packages={name: f"k8s.io/kubernetes/cmd/{name}" for name in ("kube-scheduler", "kubelet", "kube-proxy")},
            ldflags=_KUBERNETES_FLAGS,
            wrapped=True,
            minutes=3.0,  # after the control plane; twice that without
        ),
        dict.fromkeys(("kube-scheduler", "kubelet", "kube-proxy"), ("--version",)),
        r"v1\.34\.",
    ),
    Source(
        Target(
            module="github.com/coredns/coredns",
            version="v1.14.7",
            packages={"coredns": "github.com/coredns/coredns"},
            ldflags=(),
            wrapped=True,
            minutes=2.0,
            main=_COREDNS_MAIN,
        ),
        {"coredns": ("-version",)},
        r"CoreDNS-1\.",
    ),
    Source(
        Target("go.etcd.io/etcd/server/v3", "v3.6.8", {"etcd": "go.etcd.io/etcd/server/v3"}, (), wrapped=True, minutes=1.0),
        {"etcd": ("--version",)},
        r"etcd Version: 3\.[56]\.",
    ),
    Source(
        Target("helm.sh/helm/v3", "v3.22.0", {"helm": "helm.sh/helm/v3/cmd/helm"}, (), wrapped=False, minutes=2.0),
        {"helm": ("version", "--short")},
        r"v3\.",
    ),
    Source(
        Target(
            "github.com/versity/versitygw",
            "v1.8.0",
            {"versitygw": "github.com/versity/versitygw/cmd/versitygw"},
            (),
            wrapped=False,
            minutes=1.5,
        ),
        {"versitygw": ("--version",)},
        r"Version",
    ),
)
PROGRAMS: dict[str, Source] = {name: source for source in SOURCES for name in source.target.packages}


def cache_dir() -> Path:
    """Where built programs are kept between runs: FINETUNE_CACHE_DIR, or ~/.cache/finetune-operator."""
    return Path(os.environ.get("FINETUNE_CACHE_DIR") or Path.home() / ".cache" / "finetune-operator")


def ensure(names: Iterable[str] = tuple(PROGRAMS)) -> dict[str, Path]:
    """Paths of these programs (all, by default); builds what is missing. Raises gobuild.BuildError; KeyError for a name not in the table."""
    wanted = [names] if isinstance(names, str) else list(names)
    found = {name: path for name in wanted if (path := _find(name, PROGRAMS[name])) is not None}
    if len(found) < len(wanted):
        with _lock():  # another process may be building the same
            for source in SOURCES:
                missing = [n for n in wanted if PROGRAMS[n] is source and _find(n, source) is None]
                if missing:
                    _build(source)
        found = {name: path for name in wanted if (path := _find(name, PROGRAMS[name])) is not None}
    return found


def _find(name: str, source: Source) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for place in ([Path(assets) / name] if assets else []) + [_cached(name, source)]:
        if os.access(place, os.X_OK) and place.is_file():
            return place
    on_path = shutil.which(name)
    if on_path:
        asked = subprocess.run([on_path, *source.asks[name]], capture_output=True, text=True, timeout=30, check=False)
        if asked.returncode == 0 and re.search(source.accepts, asked.stdout):
            return Path(on_path)
    return None


def _cached(name: str, source: Source) -> Path:
    return cache_dir() / "bin" / f"{name}-{source.target.version}"


@contextmanager
def _lock() -> Iterator[None]:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "build.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process: a killed builder blocks nobody
        yield


def _build(source: Source) -> None:
    with build(source.target, cache_dir()) as built:
        for name, path in built.items():
            target = _cached(name, source)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
