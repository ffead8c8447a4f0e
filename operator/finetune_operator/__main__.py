"""`python -m finetune_operator`: runs the operator. Exit 0 after SIGTERM, 1 when it cannot work or a part died, 2 for wrong flags."""

import signal
import sys

if __name__ == "__main__":
    # The imports take seconds on a busy node, and process 1 of a container does not hear a signal that it does not handle.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))

import argparse
import asyncio
import logging
import os
import socket
from pathlib import Path

from pydantic import ValidationError

from finetune_api import JobDefaults
from finetune_api.sentences import explain
from finetune_operator import __version__
from finetune_operator.control import preflight
from finetune_operator.control.app import Options, run
from finetune_operator.kube.lease import LeaseLost
from finetune_operator.observe.log import set_up


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be host:port, for example 0.0.0.0:8080")
    if int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is at most 65535")
    return host.strip("[]"), int(port)


def _url(text: str) -> str:
    if not text.startswith("https://"):
        raise argparse.ArgumentTypeError(f"{text!r} must begin with https://")
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _defaults(text: str) -> JobDefaults:
    try:
        return JobDefaults.model_validate_json(text or "{}", strict=True)
    except ValidationError as error:
        raise argparse.ArgumentTypeError("; ".join(explain(error))) from error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m finetune_operator", description="Runs FineTuneJobs as trainer pods.")
    add = parser.add_argument
    add("--namespace", action="append", default=[], dest="namespaces", help="namespace to watch; repeatable (default: all)")
    add("--trainer-image", required=True, help="image of trainer pods, where a job names none")
    add("--progress-url", required=True, type=_url, help="https://host:port under which pods reach the progress server")
    add("--progress-bind", type=_address, help="address of the progress server (default: port 8443 of all addresses)")
    add("--metrics-bind", type=_address, help="address of /metrics, /healthz, /readyz (default: port 8080 of all addresses)")
    add("--tls-secret", default="finetune-operator-progress", help="Secret that keeps the progress server's CA")
    add("--tls-dir", type=Path, help="folder with ca.crt, tls.crt and tls.key to use in place of that CA (cert-manager)")
    add("--own-namespace", default=os.environ.get("POD_NAMESPACE", "default"), help="namespace of that Secret and of the Lease")
    add("--lease", default="", help="Lease that lets one of several operators write (default: none, this is the only one)")
    add("--lease-seconds", type=_count, default=15, help="how long the others wait for a leader that is silent")
    add("--pod-name", default=os.environ.get("POD_NAME") or socket.gethostname(), help="who holds the Lease, for people")
    add("--pod-ip", default=os.environ.get("POD_IP", ""), help="where other operators reach this one; needed with --lease")
    add("--workers", type=_count, default=10, help="reconciles at a time")
    add("--resync-seconds", type=_positive, default=300.0, help="pause between full lists")
    add(
        "--restart-backoff-seconds", type=_positive, default=10.0, help="wait before the first counted restart; doubles each time"
    )
    add("--model-mirror", help="where trainers look hf:// models up first: a folder in the pod or an s3:// prefix")
    add("--dataset-mirror", help="the same for hf:// data sets")
    add("--job-defaults", type=_defaults, default=JobDefaults(), metavar="JSON", help="what jobs get that say nothing themselves")
    add("--kubeconfig", type=Path, help="default: KUBECONFIG, then the pod's ServiceAccount")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="least severity that is logged")
    add("--log-format", choices=("text", "json"), default="text", help="style of log lines")
    add("--version", action="version", version=__version__)
    return parser


def everywhere(pod_ip: str) -> str:
    """All addresses of the pod's family: in a cluster of IPv6 alone nobody reaches 0.0.0.0."""
    return "::" if ":" in pod_ip else "0.0.0.0"  # noqa: S104


def main() -> int:
    """The exit code."""
    parser = build_parser()
    arguments = vars(parser.parse_args())
    if arguments["lease"] and not arguments["pod_ip"]:
        parser.error("--lease needs --pod-ip: set POD_IP from the pod's status.podIP")
    for name, port in (("progress_bind", 8443), ("metrics_bind", 8080)):
        arguments[name] = arguments[name] or (everywhere(arguments["pod_ip"]), port)
    set_up(arguments.pop("log_level"), arguments.pop("log_format"))
    log = logging.getLogger("finetune_operator")
    try:
        asyncio.run(run(Options(**arguments)))
    except (preflight.NotReady, LeaseLost) as error:
        log.error("%s", error)  # noqa: TRY400  (a sentence for people, without a traceback)
        return 1
    except OSError as error:
        log.error("cannot listen: %s", error)  # noqa: TRY400
        return 1
    except Exception:
        log.exception("a part of the operator died; ending so that it is started anew")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
