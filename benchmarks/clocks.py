"""What the benchmarks of the trainer measure with: a clock for CPUs, one for a GPU, and one that looks at what a GPU does in it."""

import json
import math
import resource
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()


class Clock:
    """CPU seconds (of all threads) and seconds of the clock from the end of step `warmup` to that of the last."""

    warmup = 0

    def at(self, step: int, total: int) -> None:
        """To be called when training begins (step 0) and after every step."""
        if step == self.warmup:
            self.start()
        if step == total:
            self.stop()

    def start(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.cpu, self.wall = time.process_time() - self.began[0], time.perf_counter() - self.began[1]


class DeviceClock(Clock):
    """Leaves the first epoch out, waits for the device at both ends, and looks at its memory between them."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def at(self, step: int, total: int) -> None:
        if step == 0:
            self.warmup, self.graphs = self.first(total), graphs_compiled()
            self.launched = time.perf_counter()
        super().at(step, total)

    def first(self, total: int) -> int:
        """Steps to leave out."""
        return total // self.epochs

    def start(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.graphs = graphs_compiled()
        super().start()

    def stop(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        super().stop()
        self.graphs = graphs_compiled() - self.graphs
        self.peak_mib = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else peak_mib()

    def found(self) -> dict[str, float]:
        """Seconds of the first epoch, and of a later one."""
        first, later = self.began[1] - self.launched, self.wall / (self.epochs - 1)
        return {"seconds": later, "first_epoch": first, "peak_mib": self.peak_mib, "graphs": self.graphs}


class ProfileClock(DeviceClock):
    """For how much of the last `window` steps nothing was computed. A profiler costs time: these steps are no measure of speed."""

    def __init__(self, window: int, folder: str) -> None:
        self.window, self.trace = window, Path(folder) / "trace.json"
        activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
        self.profile = torch.profiler.profile(activities=[activity])

    def first(self, total: int) -> int:
        return total - self.window

    def start(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()  # kernels of the warm-up are not the window's
        self.profile.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self.profile.stop()
        self.profile.export_chrome_trace(str(self.trace))

    def found(self) -> dict[str, float]:
        events = json.loads(self.trace.read_text())["traceEvents"]
        return {"idle_share": idle_share(events, "kernel" if ON_GPU else "cpu_op", self.wall)}


def idle_share(events: Iterable[Mapping[str, Any]], category: str, seconds: float) -> float:
    """Share of the seconds in which no event (of Chrome's trace format: ts and dur in microseconds) of this category was going on."""
    intervals = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") == category]
    if not intervals:
        raise ValueError(f"the profiler's trace has no event of category {category}")
    return 1 - covered(intervals) / 1e6 / seconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what (start, end) intervals cover together."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def graphs_compiled() -> int:
    """By torch.compile, in this process, so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def peak_mib() -> float:
    """Of this process's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
