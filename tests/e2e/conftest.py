"""The cluster that `python -m e2e` prepared; a namespace per test that enforces the restricted Pod Security Standard."""

import random
import string
from collections.abc import Iterator

import pytest

from e2e.world import World
from integration.jobs import Jobs


@pytest.fixture(scope="session")
def installed() -> World:
    """Images, object store, data, and the chart, installed by Helm."""
    return World.from_environment()


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
    """A machine of two cores has several trainings to run at once."""
    for item in items:
        item.add_marker(pytest.mark.timeout(1200))
