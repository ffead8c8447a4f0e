"""Small parts of the operator that need no API server: merge patches, certificates, metrics, the command line."""

import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.control import tls
from finetune_operator.domain.outcome import end_report
from finetune_operator.kube.port import merge_patch
from finetune_operator.observe.metrics import Metrics

VALUES = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def apply(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = apply(result.get(key), value)
    return result


@given(OBJECTS, OBJECTS)
def test_a_merge_patch_turns_old_into_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert apply(old, merge_patch(old, new)) == new
    assert merge_patch(new, new) == {}


def test_the_leaf_is_trusted_through_the_ca_and_for_its_names_only(tmp_path: Path) -> None:
    certificate, key = tls.make_ca()
    (tmp_path / "ca.crt").write_bytes(certificate)
    server = tls.own_identity(certificate, key, ["operator.ns.svc", "127.0.0.1"]).context
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    assert shake(client, server, "operator.ns.svc")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(client, server, "elsewhere.ns.svc")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(ssl.create_default_context(), server, "operator.ns.svc")


def shake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bool:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = client.wrap_bio(to_client, to_server, server_hostname=name)
    right = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(6):
        for side in (left, right):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return left.version() is not None


def test_the_ca_lives_ten_years() -> None:
    ca = x509.load_pem_x509_certificate(tls.make_ca()[0])
    assert (ca.not_valid_after_utc - ca.not_valid_before_utc).days >= 3650


def test_the_gauge_by_state_follows_a_job_and_forgets_it() -> None:
    metrics = Metrics()
    metrics.saw("ns", "a", "Running")
    metrics.saw("ns", "a", "Complete")
    text = metrics.render().decode()
    assert 'finetune_jobs{namespace="ns",state="Complete"} 1.0' in text
    assert 'finetune_jobs{namespace="ns",state="Running"} 0.0' in text
    metrics.saw("ns", "a", None)
    assert 'finetune_jobs{namespace="ns",state="Complete"} 0.0' in metrics.render().decode()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trainer-image=x", "--progress-url=http://plain"], "must begin with https://"),
        (["--trainer-image=x", "--progress-url=https://a", "--metrics-bind=nowhere"], "must be host:port"),
        (["--trainer-image=x", "--progress-url=https://a", "--resync-seconds=-1"], "must be more than 0"),
        ([], "--trainer-image"),
    ],
)
def test_wrong_flags_are_told_and_exit_with_2(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "finetune_operator", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert says in done.stderr


def test_without_a_cluster_it_says_so() -> None:
    command = [
        sys.executable,
        "-m",
        "finetune_operator",
        "--trainer-image=x",
        "--progress-url=https://a",
        "--kubeconfig=/nowhere",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the kubeconfig /nowhere cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("message", ["[" * 4000, '{"outcome": 7}', "[]", "no report", ""])
def test_a_termination_message_may_be_anything(message: str) -> None:
    state = {"terminated": {"exitCode": 1, "message": message}}
    assert end_report({"status": {"containerStatuses": [{"name": "trainer", "state": state}]}}) is None
