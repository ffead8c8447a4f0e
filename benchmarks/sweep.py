"""`make bench-sweep`: how good the search engine is, beside Optuna in one process and beside random search.

Nothing is trained: functions with known minima, synthetic learning curves and regions where trials fail (sweep_problems.py), in simulated
time with 1, 8 or 32 workers (sweep_runs.py). A number is the regret of the best complete trial: 0 is the best there is. Medians have
bootstrap intervals; seeds are the same for all searchers, so that comparisons are paired. The parts (`--only`):

- identical: suggestions from records alone are those of the same sampler in a study that was kept, bit for bit;
- growth: seconds of one suggestion at 100 to 3,000 trials;
- quality: 100 trials in six spaces: ours (auto, tpe), Optuna's TPE live, random;
- process: our Gaussian process beside Optuna's GPSampler, 8 workers;
- pruning: 16 workers, R = 81, a wall of 4 R: ours with ASHA, Optuna's TPE with its own SuccessiveHalvingPruner, random with and without;
- failing: trials that fail for their parameters: told to the sampler, or not;
- real: 24 real trainings, ASHA on their curves in 1,000 orders, and once live (sweep_real.py).

Parts that are run alone (`--only`) are put beside what build/bench/sweep.json has of the others.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import sweep_real
from sweep_problems import PROBLEMS, Curves, Problem
from sweep_runs import Live, Ours, Searcher, asha, least, search, search_curves

from finetune_operator.search import draws, tpe
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Outcome, Study, Trial
from finetune_operator.search.view import view

TRIALS = 100
END, FACTOR, RUNGS, PRUNING_WORKERS = 81, 3, (3, 9, 27), 16
GROWTH = (100, 300, 1000, 3000)


@dataclass(frozen=True)
class Task:
    """One run."""

    part: str
    problem: str
    searcher: str
    workers: int
    seed: int

    @property
    def row(self) -> tuple[str, str, str, int]:
        return self.part, self.problem, self.searcher, self.workers


@dataclass(frozen=True)
class Ran:
    """What came of it."""

    task: Task
    regret: float
    seconds: float
    trials: int
    failed: int


# ------------------------------------------------------------------------------------------------------------- tasks ----
def quality(seeds: int) -> Iterable[Task]:
    for name in ("branin", "hartmann6", "ackley5", "levy4", "mixed", "conditional"):
        for workers in (1, 8, 32):
            for searcher in ("random", "tpe", "optuna tpe", *(("auto",) if workers == 8 else ())):
                yield from (Task("quality", name, searcher, workers, seed) for seed in range(seeds))


def process(seeds: int) -> Iterable[Task]:
    for name in ("branin", "hartmann6"):
        for searcher in ("gp", "optuna gp"):
            yield from (Task("process", name, searcher, 8, seed) for seed in range(seeds))


def pruning(seeds: int) -> Iterable[Task]:
    for name in ("hartmann6 weak", "hartmann6 strong", "branin strong", "ackley5 strong"):
        for searcher in ("random", "random + ASHA", "tpe + ASHA", "optuna tpe + SHA"):
            yield from (Task("pruning", name, searcher, PRUNING_WORKERS, seed) for seed in range(2 * seeds))
        yield from (Task("pruning", name, "auto + ASHA", PRUNING_WORKERS, seed) for seed in range(max(2, seeds // 4)))


def failing(seeds: int) -> Iterable[Task]:
    for searcher in ("random", "tpe", "tpe, not told", "auto", "auto, not told"):
        yield from (Task("failing", "failing", searcher, 8, seed) for seed in range(seeds))


PARTS: dict[str, Callable[[int], Iterable[Task]]] = {
    "quality": quality,
    "process": process,
    "pruning": pruning,
    "failing": failing,
}


def run(task: Task) -> Ran:
    """In a process of the pool."""
    os.environ |= common.ONE_THREAD
    began = time.perf_counter()
    name, _, kind = task.problem.partition(" ")
    problem = PROBLEMS[name]
    if kind:
        trials = _pruned(task, Curves(problem, kind == "strong", task.seed, END))
    else:
        algorithm, _, told = task.searcher.partition(", ")
        trials = search(problem, searcher(problem, algorithm, task.seed), task.workers, TRIALS, task.seed, hidden=bool(told))
    failed = sum(t.outcome in (Outcome.FAILED, Outcome.IGNORED) for t in trials)
    return Ran(task, least(trials), time.perf_counter() - began, len(trials), failed)


def _pruned(task: Task, curves: Curves) -> list[Trial]:
    problem, (algorithm, _, pruner) = curves.problem, task.searcher.partition(" + ")
    if pruner == "SHA":
        import optuna

        rule = optuna.pruners.SuccessiveHalvingPruner(min_resource=RUNGS[0], reduction_factor=FACTOR)
        live = Live(problem, optuna.samplers.TPESampler(seed=task.seed), rule)
        return search_curves(curves, live, None, RUNGS, task.workers, 4 * END)
    study = study_of(problem, algorithm, task.seed)
    if pruner:
        study = asha(study, RUNGS[0], FACTOR, len(RUNGS))
    return search_curves(curves, Ours(study), study, RUNGS if pruner else (), task.workers, 4 * END)


def searcher(problem: Problem, name: str, seed: int) -> Searcher:
    """Ours by the name of the algorithm; Optuna's with its defaults."""
    if not name.startswith("optuna"):
        return Ours(study_of(problem, name, seed))
    import optuna

    sampler = optuna.samplers.TPESampler if name.endswith("tpe") else optuna.samplers.GPSampler
    return Live(problem, sampler(seed=seed))


def study_of(problem: Problem, algorithm: str, seed: int) -> Study:
    return Study(problem.spec(seed, searchAlgorithm={algorithm: {}}))


# -------------------------------------------------------------------------------------------------- parts of their own ----
def identical(seeds: int) -> dict[str, Any]:
    """How many of the model's suggestions, 8 in flight, are those of the same sampler in a study that was told as trials ended."""
    same = compared = 0
    for name in ("branin", "hartmann6", "mixed"):
        problem = PROBLEMS[name]
        for seed in range(seeds):
            study, trials = study_of(problem, "tpe", seed), []
            live = tpe.study_of(study.parameters, [])
            for index in range(TRIALS):
                found = suggest(study, trials, index)
                assert found is not None
                if found.algorithm == "tpe":
                    live.sampler = tpe.sampler_of(study.parameters, draws.seed_of(seed, index))
                    same += tpe.ask(live, study.parameters) == found.parameters
                    compared += 1
                else:
                    live.add_trial(tpe.study_of(study.parameters, view(study, [Trial(index, found.parameters)])).trials[0])
                trials.append(Trial(index, found.parameters))
                if (ended := index - 7) >= 0:
                    value = problem.regret(trials[ended].parameters)
                    trials[ended] = Trial(ended, trials[ended].parameters, Outcome.COMPLETE, (), value)
                    live.tell(ended, value)
    print(f"\nstateless and live: {same} of {compared} suggestions are the same, bit for bit")
    return {"identical": {"same": same, "compared": compared}}


def growth(repeats: int) -> dict[str, Any]:
    """CPU-seconds of one suggestion, the least of some: on a busy machine all others measure the neighbours too."""
    problem, rows = PROBLEMS["hartmann6"], []
    random = study_of(problem, "random", 0)
    trials = []
    for index in range(max(GROWTH)):
        found = suggest(random, [], index)
        assert found is not None
        trials.append(Trial(index, found.parameters, Outcome.COMPLETE, (), problem.regret(found.parameters)))
    for algorithm, counts in (("tpe", GROWTH), ("gp", GROWTH[:2]), ("auto", GROWTH)):
        study = study_of(problem, algorithm, 0)
        for count in counts:
            times = []
            for _ in range(repeats + 1):  # the first one imports
                began = time.process_time()
                suggest(study, trials[:count], count)
                times.append(time.process_time() - began)
            rows.append({"algorithm": algorithm, "trials": count, "cpu_seconds": min(times)})
    common.print_table(
        "One suggestion, 6 parameters, 1 thread",
        ("", "trials", "CPU-s"),
        [(str(r["algorithm"]), str(r["trials"]), f"{r['cpu_seconds']:.3f}") for r in rows],
    )
    return {"growth": rows}


# ------------------------------------------------------------------------------------------------------------ numbers ----
def interval(values: Sequence[float], of: Callable[[Any], float] = np.median) -> tuple[float, float]:
    """The middle 90 % of what resampling gives."""
    random = np.random.default_rng(0)
    data = np.array(values)
    found = [float(of(data[random.integers(0, len(data), len(data))])) for _ in range(2000)]
    return float(np.quantile(found, 0.05)), float(np.quantile(found, 0.95))


def summary(part: str, runs: Sequence[Ran]) -> list[dict[str, Any]]:
    """A row for each case, printed too."""
    rows = []
    for key in dict.fromkeys(r.task.row for r in runs):
        mine = [r for r in runs if r.task.row == key]
        regrets = [r.regret for r in mine]
        low, high = interval(regrets)
        rows.append(
            {
                "problem": key[1],
                "searcher": key[2],
                "workers": key[3],
                "seeds": len(mine),
                "median": statistics.median(regrets),
                "median_low_90": low,
                "median_high_90": high,
                "mean": statistics.fmean(regrets),
                "sem": statistics.stdev(regrets) / len(regrets) ** 0.5 if len(regrets) > 1 else None,
                "trials": statistics.fmean(r.trials for r in mine),
                "failed_share": sum(r.failed for r in mine) / sum(r.trials for r in mine),
                "seconds": statistics.fmean(r.seconds for r in mine),
                "regrets": regrets,
            }
        )
    common.print_table(
        f"{part}: regret of the best complete trial",
        ("", "searcher", "workers", "seeds", "median", "90 % interval", "mean", "trials", "failed", "s"),
        [
            (
                r["problem"], r["searcher"], str(r["workers"]), str(r["seeds"]), f"{r['median']:.3g}",
                f"{r['median_low_90']:.2g} to {r['median_high_90']:.2g}", f"{r['mean']:.3g}", f"{r['trials']:.0f}",
                f"{r['failed_share']:.0%}", f"{r['seconds']:.1f}",
            )
            for r in rows
        ],
    )  # fmt: skip
    return rows


def paired(rows: Sequence[dict[str, Any]], problem: str, of: str, to: str) -> tuple[float, float]:
    """Ratio of the medians over the seeds that both have, and the lower end of its 90 % interval (seeds are resampled in pairs)."""
    ours, theirs = (next(r["regrets"] for r in rows if r["problem"] == problem and r["searcher"] == name) for name in (of, to))
    count = min(len(ours), len(theirs))
    pairs = np.stack([ours[:count], theirs[:count]], axis=1)
    random = np.random.default_rng(0)

    def ratio(data: Any) -> float:
        a, b = np.median(data, axis=0)
        return float(a / b)

    found = [ratio(pairs[random.integers(0, count, count)]) for _ in range(2000)]
    return ratio(pairs), float(np.quantile(found, 0.05))


# --------------------------------------------------------------------------------------------------------------- bars ----
def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold, of the parts that ran."""
    found: list[dict[str, Any]] = []

    def bar(name: str, value: float, limit: float, **more: Any) -> None:
        found.append({"name": name, "value": value, "limit": limit, "holds": bool(value <= limit), **more})

    if "identical" in result:
        counted = result["identical"]
        bar("suggestions that differ from the live sampler's", counted["compared"] - counted["same"], 0)
    if "growth" in result:
        worst = max(r["cpu_seconds"] for r in result["growth"] if r["trials"] == 3000)
        bar("CPU-seconds of a suggestion at 3,000 trials", worst, 0.5)
        bar("CPU-seconds of the process at 100 trials", _seconds(result["growth"], "gp", 100), 0.5)
    if "quality" in result:
        tpe_, random = (_median(result["quality"], "hartmann6", name, 1) for name in ("tpe", "random"))
        bar("TPE on hartmann6, 1 worker: share of random's regret", tpe_ / random, 0.2)
    for name in ("branin", "hartmann6") if "process" in result else ():
        ratio, low = paired(result["process"], name, "gp", "optuna gp")
        bar(f"our process on {name}, 8 workers: share of GPSampler's regret", ratio, 1.1, lower_90=low)
    for name in dict.fromkeys(r["problem"] for r in result.get("pruning", ())):
        ratio, low = paired(result["pruning"], name, "tpe + ASHA", "random + ASHA")
        bar(f"tpe + ASHA on {name}: share of random + ASHA's regret", ratio, 1.1, lower_90=low)
    if real := result.get("real"):
        bar("a real sweep with ASHA: median share of the full search's CPU", real["median_cpu_share"], 0.45)
        bar("a real sweep with ASHA: orders whose best is not within 0.005", 1 - real["within_0.005"], 0.2)
        bar("a real sweep live: trials without the recorded readings", real["configurations"] - real["live_same_readings"], 0)
    common.print_table(
        "What must hold",
        ("", "value", "at most", ""),
        [(b["name"], f"{b['value']:.3g}", f"{b['limit']:g}", "holds" if b["holds"] else "DOES NOT HOLD") for b in found],
    )
    return found


def _median(rows: Sequence[dict[str, Any]], problem: str, searcher: str, workers: int) -> float:
    return next(float(r["median"]) for r in rows if (r["problem"], r["searcher"], r["workers"]) == (problem, searcher, workers))


def _seconds(rows: Sequence[dict[str, Any]], algorithm: str, trials: int) -> float:
    return next(float(r["cpu_seconds"]) for r in rows if (r["algorithm"], r["trials"]) == (algorithm, trials))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("identical", "growth", *PARTS, "real")
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="parts to run")
    parser.add_argument("--quick", action="store_true", help="2 seeds: whether it works, nothing more")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each case (twice as many with pruning)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    said = parser.parse_args()
    os.environ |= common.ONE_THREAD
    seeds = 2 if said.quick else said.seeds
    print(f"seeds 0 to {seeds - 1}, with pruning 0 to {2 * seeds - 1}; {', '.join(said.only)}", flush=True)
    known = common.RESULTS / "sweep.json"
    result: dict[str, Any] = json.loads(known.read_text()) if known.is_file() and set(said.only) < set(names) else {}
    result |= {"seeds": seeds, "trials": TRIALS}
    if "growth" in said.only:
        result |= growth(1 if said.quick else 5)
    if "identical" in said.only:
        result |= identical(1 if said.quick else 4)
    with ProcessPoolExecutor(said.processes) as pool:
        for part in (name for name in PARTS if name in said.only):
            runs = list(pool.map(run, PARTS[part](seeds), chunksize=1))
            result[part] = summary(part, runs)
            sys.stdout.flush()
    if "real" in said.only and not said.quick:
        result["real"] = sweep_real.run()
    result["bars"] = bars(result)
    print(common.write_json("sweep", result))
    return 0 if said.quick or all(bar["holds"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
