"""The reconcile decision: any order of what can happen keeps its promises."""

from typing import Any

from decide_kit import T0, World
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.domain.status import is_finished

LIFE = ["run", "ok", "oom", "disrupt", "data", "suspend", "resume"]
FAULTS = ["delete-child", "lose", "gone", "refuse", "allow", "wait", "crash"]
EVENTS = st.lists(st.sampled_from(LIFE + FAULTS), max_size=25)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_any_story_keeps_the_invariants(events: list[str]) -> None:
    """At most one attempt alive (asserted in create), attempts never fall, terminal is terminal, no attempt is skipped; and the job goes
    on, whatever has happened."""
    world = World(failurePolicy={"maxRestarts": 2})
    last_attempt = 0
    terminal: dict[str, Any] | None = None
    for event in events:
        name = world.created[-1] if world.created else ""
        pod = world.pods.get(name)
        phase = pod["status"]["phase"] if pod else None
        if event == "run" and phase == "Pending":
            world.run(name)
        elif event in ("ok", "oom", "data", "disrupt") and phase == "Running":
            if event == "ok":
                world.end(name, 0)
            elif event == "oom":
                world.end(name, 137, "", "OOMKilled")
            elif event == "data":
                world.fail(name, "DataInvalid")
            else:
                world.end(name, 143, "", conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "x"}])
        elif event in ("suspend", "resume"):
            world.job["spec"]["suspend"] = event == "suspend"
        elif event == "delete-child":
            world.delete(name)
        elif event == "lose" and phase in ("Pending", "Running"):
            world.lose(name)
        elif event == "gone":
            world.gone()
        elif event in ("refuse", "allow"):
            world.create_error = "exceeded quota" if event == "refuse" else None
        elif event == "wait":
            world.wait(20)
        world.reconcile(die_before_status=event == "crash")
        status = world.status
        if terminal is not None:
            assert status == terminal
        elif is_finished(status):
            terminal = status
        assert (status.get("attempt") or 0) >= last_attempt
        assert status.get("activeSeconds", 0) <= (world.now - T0).total_seconds(), "time was counted twice"
        last_attempt = status.get("attempt") or 0
    # A child that is deleted before its attempt was recorded is created again under its name; none is skipped.
    distinct = list(dict.fromkeys(world.created))
    assert distinct == [f"ft-{n}" for n in range(1, len(distinct) + 1)]
    world.job["spec"]["suspend"], world.create_error = False, None
    for _ in range(20):
        world.wait(60)
        world.reconcile()
    newest = world.pods.get(world.created[-1]) if world.created else None
    assert is_finished(world.status) or (newest is not None and world.alive(newest)), "nothing happens any more"
