"""The command line: what is wrong is refused with the flag's name and exit code 2, before anything starts."""

import subprocess
import sys

import pytest

from finetune_operator.__main__ import build_parser, everywhere

NEEDED = ["--trainer-image=trainer:1", "--progress-url=https://progress:8443"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--progress-bind=8443", "must be host:port"),
        ("--resync-seconds=soon", "--resync-seconds"),
        ("--workers=some", "--workers"),
        ("--workers=0", "--workers"),
        ("--metrics-bind=a:99999", "99999"),
        ("--resync-seconds=nan", "must be"),
        ("--log-format=xml", "--log-format"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_named(capsys: pytest.CaptureFixture[str], argument: str, says: str) -> None:
    assert says in refusal(capsys, *NEEDED, argument)


def test_addresses_and_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = build_parser().parse_args([*NEEDED, "--progress-bind=[::1]:8443", "--namespace=a", "--namespace=b"])
    assert found.progress_bind == ("::1", 8443)
    assert found.namespaces == ["a", "b"]
    monkeypatch.setenv("POD_NAMESPACE", "finetune-system")
    assert build_parser().parse_args(NEEDED).own_namespace == "finetune-system"


def test_without_an_address_it_listens_where_its_pod_is_reached() -> None:
    assert build_parser().parse_args(NEEDED).metrics_bind is None
    assert (everywhere("10.0.0.7"), everywhere("fd00::7"), everywhere("")) == ("0.0.0.0", "::", "0.0.0.0")


def test_help_needs_no_cluster() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune_operator", "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0
    assert "--trainer-image" in done.stdout
