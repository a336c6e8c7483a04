"""Timing, peak memory, the machine and its limits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from capkit.captioning import DecodingStep
from capkit.cogvlm2 import use_onednn

PACKAGES = ("capkit", "torch", "transformers", "tokenizers", "numpy", "decord", "av", "accelerate", "bitsandbytes")
SAMPLE_SECONDS = 0.001  # between two readings of the process's memory


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long one call takes, and what it returns."""
    wait_for(device)
    started = time.perf_counter()
    result = function()
    wait_for(device)
    return time.perf_counter() - started, result


def take_turns(
    functions: Sequence[Callable[[], Any]], repeats: int, device: torch.device, warm_up: bool = True
) -> list[float]:
    """Median seconds of a call of each function. The calls are interleaved, so that load drift affects all alike.

    One call of each goes before, unmeasured, unless `warm_up` is False.
    """
    for function in functions if warm_up else ():
        function()
    runs = [[seconds_of(function, device)[0] for function in functions] for _ in range(repeats)]
    return [statistics.median(seconds) for seconds in zip(*runs, strict=True)]


def num_equal(found: list[list[int]], expected: list[list[int]]) -> str:
    """How many captions have the expected tokens, and at how many tokens the median of the others parts from them."""
    text = f"{sum(map(list.__eq__, found, expected))} of {len(expected)} captions"
    pairs = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
    common = [next((at for at, two in enumerate(zip(*pair, strict=False)) if two[0] != two[1]), 0) for pair in pairs]
    return f"{text}, the others for {statistics.median_low(common)} tokens" if common else text


def count_flops(model: PreTrainedModel, function: Callable[[], Any]) -> int:
    """Floating point operations of a call that runs a model of transformers."""
    config: Any = model.config
    before, config._attn_implementation = config._attn_implementation, "eager"  # torch 2.11 cannot count sdpa's
    try:
        with FlopCounterMode(display=False) as counter:
            function()
    finally:
        config._attn_implementation = before
    return counter.get_total_flops()


class PeakMemory:
    """Peak memory inside a `with`, in bytes beyond that before: torch's count on a GPU, resident memory on a CPU.

    Attributes:
        num_bytes: set at the end.
    """

    def __init__(self, device: torch.device):
        self.device, self.num_bytes = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        with contextlib.suppress(OSError, AttributeError):  # on Linux give freed memory back, or its reuse is not seen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._resident = psutil.Process().memory_info
        self._before = self._peak = self._resident().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._resident().rss)

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._thread.join()
        self.num_bytes = max(self._peak, self._resident().rss) - self._before


class StepTimes:
    """Times at which the decoding steps of a model begin, inside a `with`: where `generate()` prepares one position a
    row, or a recorded step is called.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.starts: list[float] = []

    def __enter__(self) -> StepTimes:
        prepare: Any = self.model.prepare_inputs_for_generation

        @functools.wraps(prepare)  # generate() inspects its parameters
        def timed(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = prepare(*args, **kwargs)
            if inputs["input_ids"] is not None and inputs["input_ids"].shape[1] == 1:
                wait_for(self.model.device)
                self.starts.append(time.perf_counter())
            return inputs

        def timed_step(step: DecodingStep) -> torch.Tensor:
            if step.model is self.model:  # whose last tokens but one have been waited for
                self.starts.append(time.perf_counter())
            return self._call(step)

        self.model.__dict__["prepare_inputs_for_generation"] = timed  # hides the class's method
        self._call: Any = DecodingStep.__call__
        setattr(DecodingStep, "__call__", timed_step)  # noqa: B010
        return self

    def __exit__(self, *error: object) -> None:
        del self.model.__dict__["prepare_inputs_for_generation"]
        setattr(DecodingStep, "__call__", self._call)  # noqa: B010

    @property
    def seconds(self) -> float:
        """Median time between two steps, choosing the token included."""
        return statistics.median(later - sooner for sooner, later in zip(self.starts, self.starts[1:], strict=False))


class OtherLoad:
    """Cores that were busy with other programs since the last call, or since this object was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last = self._read()

    def __call__(self) -> float:
        """Their mean number; 0 where less than half a second has passed, which is too short to tell."""
        now = self._read()
        seconds, busy, own = (after - before for after, before in zip(now, self._last, strict=True))
        if seconds < 0.5:
            return 0.0
        self._last = now
        return max(busy - own, 0.0) / seconds

    def _read(self) -> tuple[float, float, float]:
        """The time, and seconds that all cores were busy, with anything and with this process and its children."""
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests' time is also in the user's
        busy = sum(spent for name, spent in psutil.cpu_times()._asdict().items() if name not in idle)
        return time.perf_counter(), busy, sum(self._process.cpu_times()[:4])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, GPU, versions of packages, the load and what other programs use before measuring."""
    others = OtherLoad()
    time.sleep(1)
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gb": round(gpu.total_memory / 1e9, 1) if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "load_before": round(psutil.getloadavg()[0], 2),
        "other_cores": round(others(), 2),
        "measured_on": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Peak rates of memory, in gigabytes read and written a second, and of matrix products, in GFLOPS."""
    side, num_bytes = (8192, 2**31) if device.type == "cuda" else (1024, 2**28)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    layer = use_onednn(torch.nn.Sequential(torch.nn.Linear(side, side, bias=False, device=device, dtype=dtype)))
    hidden = torch.randn(side, side, device=device, dtype=dtype)
    with torch.inference_mode():
        copy, product = (
            min(seconds_of(function, device)[0] for _ in range(6))  # the first of which is a warm-up
            for function in (partial(target.copy_, source), partial(layer, hidden))
        )
    return {"copied_gb_per_second": 2 * num_bytes / copy / 1e9, "matmul_gflops": 2 * side**3 / product / 1e9}


def profile_of(function: Callable[[], Any], device: torch.device, num_operations: int = 6) -> list[dict[str, Any]]:
    """Profile one call: torch's operations with the most time of their own, and their share of the total."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to stderr, in notebooks red, that it starts and stops
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    function()
    with profile(activities=activities) as profiled:
        function()
        wait_for(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = sorted(((getattr(event, name), event) for event in profiled.key_averages()), key=lambda item: -item[0])
    total = sum(microseconds for microseconds, _ in spent) or 1
    return [
        {"operation": event.key, "calls": event.count, "seconds": microseconds / 1e6, "share": microseconds / total}
        for microseconds, event in spent[:num_operations]
    ]
