"""The time of work that runs asynchronously, and the name of what it ran on."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

LONG = 5.0  # seconds: a call that takes longer needs no warm-up before it


def device_name() -> str:
    """What the first device is called; of a CPU the processor's name, as the system tells it."""
    device = jax.devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def latency(run: Callable[[], Any], *, seconds: float = 1.0, repeats: int | None = None) -> dict[str, Any]:
    """How long a call of `run` takes, which returns arrays: wall time, and on a CPU CPU time beside it.

    On a CPU each call is timed; the first one warms up, unless it takes LONG. Elsewhere bursts of calls in a row are
    timed, behind one another on the device.

    Args:
      seconds: calls are repeated for about so long, at least three times, or three bursts; on a CPU a LONG call is not
        repeated beyond it.
      repeats: how many calls instead.

    Returns:
      {"milliseconds": the median, "least_ms", "most_ms", "repeats"}, and on a CPU "cpu_ms", the least CPU time of a
      call over all threads.
    """
    if jax.default_backend() == "cpu":
        calls, least = [_timed(run)], 1
        if calls[0][0] < LONG:  # it was the warm-up
            calls, least = [], 3
        spent = sum(wall for wall, _ in calls)
        while len(calls) < (repeats or least) or (repeats is None and spent < seconds):
            calls.append(_timed(run))
            spent += calls[-1][0]
        walls = [1e3 * wall for wall, _ in calls]
        more = {"cpu_ms": 1e3 * min(cpu for _, cpu in calls)}
    else:
        number = calls_for(run, jax.block_until_ready)
        if repeats:
            bursts = max(5, repeats // number)
        else:
            bursts = max(3, min(100, round(seconds / (number * burst(run, jax.block_until_ready, number)))))
        walls = [1e3 * burst(run, jax.block_until_ready, number) for _ in range(bursts)]
        more = {}
    times = {"milliseconds": statistics.median(walls), "least_ms": min(walls), "most_ms": max(walls)}
    return times | {"repeats": len(walls)} | more


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def burst(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    """Seconds of one of so many calls in a row; `run` starts the work, `wait` waits for what the last one returned.

    One device works in order, so the host's share of a call hides behind the device's share of the one before, as in a
    training step. A call that is too short for the host is measured with the host.
    """
    wait(run())
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = None  # the one before may go
        result = run()
    wait(result)
    return (time.perf_counter() - start) / calls


def calls_for(run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float = 0.1, most: int = 100) -> int:
    """How many calls take about so many seconds, 1 to `most`; warms up."""
    wait(run())
    return max(1, min(most, round(seconds / burst(run, wait, 1))))
