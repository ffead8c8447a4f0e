"""One cluster per session with the chart installed by Helm; a namespace per test that enforces the restricted Pod Security Standard."""

import random
import string
from collections.abc import Iterator

import pytest

from e2e.world import RELEASE, RESTRICTED, ROOT, SYSTEM, World, world
from integration.jobs import Jobs


@pytest.fixture(scope="session")
def bare() -> Iterator[World]:
    """Images, object store and data; nothing installed."""
    with world() as made:
        made.fill()
        yield made


@pytest.fixture(scope="session")
def installed(bare: World) -> World:
    """The chart, as a platform engineer installs it."""
    bare.kubectl("create", "namespace", SYSTEM)
    bare.kubectl("label", "namespace", SYSTEM, RESTRICTED)
    bare.helm("install", RELEASE, str(ROOT / "charts/finetune-operator"), *bare.values(), "--wait", "--timeout=150s")
    return bare


@pytest.fixture
def jobs(installed: World) -> Iterator[Jobs]:
    """FineTuneJobs of a fresh namespace."""
    name = installed.namespace("e2e-" + "".join(random.choices(string.ascii_lowercase, k=6)))
    yield Jobs(installed.cluster, name)
    # Shown where the test failed.
    print(installed.kubectl("-n", name, "get", "hps,ftj,jobs,pods", "-o", "wide", check=False).stdout)
    print(installed.kubectl("-n", name, "get", "events", check=False).stdout[-4000:])
    print(installed.kubectl("-n", name, "get", "hps,ftj", "-o", "yaml", check=False).stdout[-8000:])
    installed.kubectl("delete", "namespace", name, "--wait=false", check=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for the node and its images."""
    for item in items:
        item.add_marker(pytest.mark.timeout(1200))
