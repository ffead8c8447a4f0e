"""The loss of a step is read while the next one computes."""

import pytest
import torch

from finetune_trainer.gradient import later

NUMBERS = [1.5, 0.0, 1.0]


def test_numbers_are_what_they_were() -> None:
    assert later(torch.tensor(NUMBERS))() == NUMBERS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
def test_nobody_waits_for_what_an_accelerator_got_to_do_since() -> None:
    # `tolist` copies behind all that is queued: the host waited for the step that it had just begun.
    read = later(torch.tensor(NUMBERS, device="cuda"))
    torch.cuda._sleep(10**10)  # type: ignore[no-untyped-call]  # cycles
    assert read() == NUMBERS
    assert not torch.cuda.current_stream().query()
