"""The loader refuses what the API server refuses, and its sentence names the field (one table for both)."""

import json

import pytest

from bad_finetunejobs import BAD, GOOD, Bad
from finetune_api.manifest import ManifestError, load_job


def test_the_manifest_that_all_others_are_made_from_is_good() -> None:
    assert load_job(json.dumps(GOOD)).metadata["name"] == "good"


def test_the_table_is_large_and_has_no_name_twice() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD) >= 45


def test_only_listed_cases_are_left_to_the_api_server() -> None:
    assert all(bad.why for bad in BAD if not bad.loader)


@pytest.mark.parametrize("bad", [b for b in BAD if b.loader], ids=lambda b: b.name)
def test_refused_with_the_field_named(bad: Bad) -> None:
    with pytest.raises(ManifestError) as error:
        load_job(json.dumps(bad.manifest()))
    assert bad.named in str(error.value)
    assert "Traceback" not in str(error.value)
    assert len(error.value.problems) == 1, error.value.problems
