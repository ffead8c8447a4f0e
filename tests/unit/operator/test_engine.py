"""What decides is named by its version; its libraries are those that the operator's image has."""

import re
from pathlib import Path

from finetune_operator.search import LIBRARIES, engine

REQUIREMENTS = Path(__file__).parents[3] / "requirements/operator.txt"


def test_its_libraries_are_those_of_the_operators_image() -> None:
    # A library that only the tests' environment has: every sweep of the real image stood still.
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", REQUIREMENTS.read_text(), re.MULTILINE))
    assert LIBRARIES
    for name in LIBRARIES:
        assert f"{name} {pinned[name]}" in engine()
