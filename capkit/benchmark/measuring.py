"""Timing, peak memory, the machine and its limits: what `capkit.benchmark` measures with."""

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
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from capkit.cogvlm2 import use_onednn

PACKAGES = ("capkit", "torch", "transformers", "tokenizers", "numpy", "decord", "av", "accelerate", "bitsandbytes")
SAMPLE_SECONDS = 0.001  # between two looks at the memory of a CPU's process


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long one call takes, and what it returns."""
    wait_for(device)
    started = time.perf_counter()
    result = function()
    wait_for(device)
    return time.perf_counter() - started, result


def take_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call of some functions, one after the other again and again, so that a machine's moods hit all.

    One call of each goes before, unmeasured.
    """
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, device)[0])
    return seconds


class PeakMemory:
    """Bytes taken inside a `with`, at their highest, beyond those before: a GPU's as torch counts them, on a CPU the
    process's resident memory, looked at every millisecond.

    Attributes:
        num_bytes: known at the end.
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
        with contextlib.suppress(OSError, AttributeError):  # Linux; else freed memory is taken again unseen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._resident = psutil.Process().memory_info
        self._before = self._peak = self._resident().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._resident().rss)

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._thread.join()
        self.num_bytes = max(self._peak, self._resident().rss) - self._before


class StepTimes:
    """When each decoding step of a model begins, inside a `with`: where `generate()` prepares one position a row.

    The model's own call is left as it is: it may be compiled.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.starts = model, []

    def __enter__(self) -> StepTimes:
        prepare = self.model.prepare_inputs_for_generation

        @functools.wraps(prepare)  # generate() looks at its parameters
        def watched(*args, **kwargs):
            inputs = prepare(*args, **kwargs)
            if inputs["input_ids"] is not None and inputs["input_ids"].shape[1] == 1:
                wait_for(self.model.device)
                self.starts.append(time.perf_counter())
            return inputs

        self.model.prepare_inputs_for_generation = watched
        return self

    def __exit__(self, *error) -> None:
        del self.model.prepare_inputs_for_generation

    @property
    def seconds(self) -> float:
        """Median from one step to the next, choosing the token included."""
        steps = [later - sooner for sooner, later in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return statistics.median(steps)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of: processor, cores, memory, GPU, versions; and how busy the machine was."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
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
        "versions": found,
        "load_before": round(psutil.getloadavg()[0], 2),
        "measured_on": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What memory and matrix units do at best here: gigabytes copied (read and written), and operations, a second."""
    side, num_bytes = (8192, 2**31) if device.type == "cuda" else (1024, 2**28)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    layer = use_onednn(torch.nn.Sequential(torch.nn.Linear(side, side, bias=False, device=device, dtype=dtype)))
    hidden = torch.randn(side, side, device=device, dtype=dtype)
    with torch.inference_mode():
        turns = take_turns({"copy": lambda: target.copy_(source), "product": lambda: layer(hidden)}, 5, device)
    return {
        "copied_gb_per_second": 2 * num_bytes / min(turns["copy"]) / 1e9,
        "matmul_gflops": 2 * side**3 / min(turns["product"]) / 1e9,
    }


def profile_of(function: Callable[[], Any], device: torch.device, num_operations: int = 6) -> list[dict[str, Any]]:
    """Where the time of a call goes: torch's operations by their own time, and their share of all."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    function()
    with profile(activities=activities) as seen:
        function()
        wait_for(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = sorted(((getattr(event, name), event) for event in seen.key_averages()), key=lambda one: -one[0])
    total = sum(microseconds for microseconds, _ in spent) or 1
    return [
        {"operation": event.key, "calls": event.count, "seconds": microseconds / 1e6, "share": microseconds / total}
        for microseconds, event in spent[:num_operations]
    ]
