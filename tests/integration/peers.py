"""Other projects' kinds, as their Go modules publish them: what we write for those projects is checked by what they say themselves."""

from pathlib import Path

import yaml

from testcluster import Cluster, binaries, gobuild

CERT_MANAGER = ("github.com/cert-manager/cert-manager", "v1.19.0")
PROMETHEUS_OPERATOR = ("github.com/prometheus-operator/prometheus-operator", "v0.85.0")
ARGO_CD = ("github.com/argoproj/argo-cd/v3", "v3.2.0")
FLUX_SOURCES = ("github.com/fluxcd/source-controller", "v1.7.0")
FLUX_HELM = ("github.com/fluxcd/helm-controller", "v1.4.0")
FLUX_KUSTOMIZE = ("github.com/fluxcd/kustomize-controller", "v1.7.3")

CRDS = {
    CERT_MANAGER: ["deploy/crds/cert-manager.io_certificates.yaml"],
    PROMETHEUS_OPERATOR: [
        f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
        for kind in ("servicemonitors", "podmonitors", "prometheusrules")
    ],
    ARGO_CD: ["manifests/crds/application-crd.yaml"],
    FLUX_SOURCES: ["config/crd/bases/source.toolkit.fluxcd.io_gitrepositories.yaml"],
    FLUX_HELM: ["config/crd/bases/helm.toolkit.fluxcd.io_helmreleases.yaml"],
    FLUX_KUSTOMIZE: ["config/crd/bases/kustomize.toolkit.fluxcd.io_kustomizations.yaml"],
}


def folder(module: tuple[str, str]) -> Path:
    """The files of one of these modules."""
    return gobuild.module_folder(*module, binaries.cache_dir())


def install(cluster: Cluster, *modules: tuple[str, str]) -> None:
    """Their CRDs; returns when they are served."""
    for module in modules:
        for file in (folder(module) / path for path in CRDS[module]):
            cluster.kubectl("apply", "--server-side", "-f", str(file))
            cluster.wait_for_crd(yaml.safe_load(file.read_text(encoding="utf-8"))["metadata"]["name"])
