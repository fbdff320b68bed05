"""The clock that both sides are timed with: seconds to the first step, time of each step, memory, what the GPU did.

A loop calls `tick` before each step. Steps are timed on the device's own clock (CUDA events between the steps), so that nothing waits for
the device that would not wait without the clock; on the CPU by the computer's clock.

Tick by tick: `warm` steps that are not timed, then `steps` that are, then on CUDA three under the profiler.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

GIB = 2**30
PROFILED = 3  # steps under the profiler, after the timed ones


class ImportClock(MetaPathFinder):
    """Adds up the seconds in which the main thread executes modules that are imported. It stands first in sys.meta_path."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if isinstance(spec.loader, SourceFileLoader | ExtensionFileLoader):
                    spec.loader.exec_module = self._timed(spec.loader.exec_module)
                return spec
        return None

    def _timed(self, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def timed(module: Any) -> None:
            begun = time.perf_counter()
            self._depth += 1
            try:
                run(module)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begun

        return timed


class Meter:
    """Times one process.

    Args:
        begun: time.time() just before the process was started.
        imports: counting since its beginning.
        device: "cuda", "cuda:1", "cpu", ...
    """

    def __init__(self, begun: float, imports: ImportClock, device: str, warm: int, steps: int) -> None:
        self.begun, self.imports, self.device, self.warm, self.end = begun, imports, device, warm, warm + steps
        self.start: dict[str, float] = {}
        self._name, self._since, self._imported = "python", begun, 0.0
        self._ticks = 0
        self._stamps: list[Any] = []
        self.found: dict[str, Any] = {"gpu_busy_ms": None, "kernels": None, "peak_device_gib": None, "device": {}}
        self._profile: Any = None
        self.norm: Callable[[], float] = lambda: 0.0  # of what is trained, asked for after the timed steps

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def mark(self, name: str) -> None:
        """From here on the time until the first step goes to `name`; imports go to themselves."""
        now = time.time()
        own = now - self._since - (self.imports.seconds - self._imported)
        self.start[self._name] = self.start.get(self._name, 0.0) + own
        self._name, self._since, self._imported = name, now, self.imports.seconds

    def ready(self) -> None:
        """All is loaded and encoded; the peak of the device's memory counts anew."""
        if self.cuda:
            import torch

            self.found["device"]["peak_start_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            self.found["device"]["peak_start_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
            torch.cuda.reset_peak_memory_stats(self.device)
        self.mark("first_step")

    def tick(self) -> bool:
        """Called before each step. Returns True when all that is to be timed is done."""
        n = self._ticks
        self._ticks += 1
        if n == 1:
            self.wait()
            self.mark("")
            self.start["imports"] = self._imported
            self.found["first_step_s"] = self._since - self.begun
        if n in (self.warm, self.end):
            self.wait()
            self.found["wall"] = time.perf_counter() - self.found.get("wall", 0.0)
        if self.warm <= n <= self.end:
            self._stamps.append(self._stamp())
        if n == self.end:
            self._memory()
            self.found["trained_norm"] = self.norm()
            if self.cuda:
                from torch.profiler import ProfilerActivity, profile

                self._profile = profile(activities=[ProfilerActivity.CUDA])
                self._profile.start()
        last = self.end + (PROFILED if self.cuda else 0)
        if n == last and self._profile:
            self.wait()
            self._profile.stop()
        return n >= last

    def wait(self) -> None:
        """Until the device has done what it was given."""
        kind = self.device.partition(":")[0]
        if kind != "cpu":
            import torch

            getattr(torch, kind).synchronize(*([] if kind == "mps" else [self.device]))

    def result(self) -> dict[str, Any]:
        """What was found: seconds, milliseconds and GiB."""
        found = dict(self.found)
        wall = found.pop("wall")
        pairs = list(zip(self._stamps, self._stamps[1:], strict=False))
        times = [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]
        if self._profile:
            kernels = [e for e in self._profile.key_averages() if e.self_device_time_total > 0 and not e.is_user_annotation]
            found["gpu_busy_ms"] = sum(e.self_device_time_total for e in kernels) / 1e3 / PROFILED or None
            found["kernels"] = round(sum(e.count for e in kernels) / PROFILED)
        return {
            **found,
            "step_ms": statistics.median(times),
            "step_ms_least": min(times),
            "mean_step_ms": wall / len(times) * 1e3,
            "start": self.start,
            "peak_host_gib": self.host / GIB,
        }

    def _stamp(self) -> Any:
        if self.cuda:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        self.wait()
        return time.perf_counter()

    def _memory(self) -> None:
        """The most since `ready`. A captured graph allocates while it is captured and never again: its pool is in these peaks."""
        self.host = host_peak()
        if self.cuda:
            import torch

            free, total = torch.cuda.mem_get_info(self.device)
            self.found["peak_device_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            self.found["device"] |= {
                "peak_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
                "used_gib": (total - free) / GIB,  # as the driver sees it: all of it, other programs too
            }


def host_peak() -> int:
    """The most memory in bytes that this process has held."""
    if sys.platform == "linux":  # getrusage would count the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
