"""The step as CUDA graphs: a whole step is launched at once, so that the GPU does not wait for the host's launches.

A graph holds one static key: the shapes of a batch, the parts that are trained. Its inputs are copied into the tensors that it was
captured with; draws come from the step's generator, which is registered with the graph and seeded before each replay. Of several
processes each replays two graphs, before and after the sum over all. All graphs share one memory pool. The first step of each key runs
eagerly, which makes the optimizer's state and compiles kernels, and counts.

Blocks are not given to torch.compile besides: it takes minutes where a capture takes a second or two, and next to products, convolutions and
attention little is left that trainer.kernels has not fused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from trainer.step import Batch, Slots, Step


def why_not(step: Step) -> str | None:
    """Why the steps cannot be captured, as the end of a sentence; None: they can."""
    if step.models.device.type != "cuda":
        return f"CUDA graphs need an NVIDIA or AMD GPU, this run is on {step.models.device.type}"
    if torch.version.hip:
        return "CUDA graphs are untried with ROCm"
    if not all(group.get("capturable") for group in step.optimizer.param_groups):
        return f"the optimizer {step.config.optimizer.kind} works on the host between its kernels"
    if step.config.adapter.dropout:
        return "adapter.dropout draws anew at each step"
    return None


def leaves(value: Any) -> list[torch.Tensor]:
    """All tensors of a batch, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        return [x for f in fields(value) for x in leaves(getattr(value, f.name))]
    if isinstance(value, dict):
        return [x for v in value.values() for x in leaves(v)]
    return []


def _static(value: Any) -> Any:
    """The same batch in tensors of its own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if is_dataclass(value):
        return replace(value, **{f.name: _static(getattr(value, f.name)) for f in fields(value)})
    return {k: _static(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclass
class _Graph:
    graphs: list[Any]
    inputs: list[torch.Tensor]
    total_weight: torch.Tensor


class Captured:
    """Runs a Step like `Step.run`, by graphs from the second step of each key on.

    Attributes:
        replays: how many steps were replayed.
        capturing: whether a graph is being captured; still so after a capture that failed.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.replays, self.capturing = step, 0, False
        self._graphs: dict[tuple, _Graph | None] = {}
        self._pool: Any = None

    def run(self, n: int, batch: Batch, slots: Slots, total_weight: float, factor: float, key: str = "") -> None:
        """Step `n`; the arguments are those of `Step.run`."""
        step = self.step
        tensors = leaves(batch)
        kind = (tuple((tuple(x.shape), x.dtype) for x in tensors), tuple(step.active(n)), id(slots))
        if kind not in self._graphs:
            self._graphs[kind] = None
            step.run(n, batch, slots, total_weight, factor, key)
            return
        step.arrange(n, factor)
        if self._graphs[kind] is None:
            self._graphs[kind] = self._capture(n, batch, slots)
        found = self._graphs[kind]
        torch._foreach_copy_(found.inputs, tensors)
        found.total_weight.fill_(total_weight)
        for graph in found.graphs:
            if graph is not found.graphs[0]:
                step.exchange(n)
            graph.replay()
        self.replays += 1

    def _capture(self, n: int, batch: Batch, slots: Slots) -> _Graph:
        gc.collect()
        torch.cuda.empty_cache()
        step, own = self.step, _static(batch)
        found = _Graph([], leaves(own), torch.ones((), device=step.models.device))
        pieces: list[Callable[[], None]] = [lambda: step.work(n, own, slots, found.total_weight, None)]
        if step.reduce:  # what is sent between the processes stays outside
            pieces = [lambda: step.compute(n, own, slots, found.total_weight, None), lambda: step.update(n)]
        self.capturing = True
        for piece in pieces:
            graph = torch.cuda.CUDAGraph()
            if not found.graphs:
                graph.register_generator_state(step.generator)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # NCCL watches from a thread of its own
                piece()
            self._pool = self._pool or graph.pool()
            found.graphs.append(graph)
        self.capturing = False
        return found

    def release(self) -> None:
        """Give the graphs' memory back; they are captured anew when they are needed."""
        self.step.wait()  # their memory is unmapped at once, also while a replay still uses it
        self._graphs.clear()
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()
