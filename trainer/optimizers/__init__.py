"""Optimizers: each is built from its configuration and the parts' parameters, one parameter group for each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from trainer.config import AdamW8bitConfig, AdamWConfig, ProdigyConfig


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW. Parameters that lie one after the other in memory, as those of the lean step, are updated as one, and their moments
    lie so too; the state of each is a view. All parameters of a group have gradients in a step, or none has.
    """

    _runs: dict[int, list[_Run]]  # of each group

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"state": {k: {**own, "step": own["step"].clone()} for k, own in state["state"].items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on the moments and counts. Options stay as they were built, and so does the tensor that holds a rate: it is on the device,
        where CUDA graphs read it, and a loaded one is on the CPU, whose value would become part of the graph.
        """
        built = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state)
        for group, options in zip(self.param_groups, built, strict=True):
            group.update(options)
        self._runs = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        known = self.__dict__.setdefault("_runs", {})
        for i, group in enumerate(self.param_groups):
            if group["params"][0].grad is None:
                continue
            if i not in known or not all(run.stands(self.state) for run in known[i]):
                known[i] = [self._lay(members) for members in _neighbours(group["params"])]
            runs, (beta1, beta2) = known[i], group["betas"]
            adamw(
                [run.params for run in runs],
                [run.grads for run in runs],
                [run.moments["exp_avg"] for run in runs],
                [run.moments["exp_avg_sq"] for run in runs],
                [],
                [run.count for run in runs],
                fused=True,
                capturable=group["capturable"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _lay(self, members: list[torch.nn.Parameter]) -> _Run:
        """The moments of `members` one after the other, as they are themselves."""
        first, begin = members[0], members[0].storage_offset()
        size = members[-1].storage_offset() + members[-1].numel() - begin
        moments = {name: torch.zeros(size, dtype=first.dtype, device=first.device) for name in ("exp_avg", "exp_avg_sq")}
        count = self.state[first].get("step", torch.zeros((), device=first.device))
        for p in members:
            old, at = self.state[p], p.storage_offset() - begin
            own = {name: x[at : at + p.numel()].view_as(p) for name, x in moments.items()}
            for name in own.keys() & old.keys():
                own[name].copy_(old[name])
            self.state[p] = {"step": count, **own}
        flat = [x.as_strided((size,), (1,)) for x in (first.detach(), first.grad)]
        return _Run(first, *flat, moments, count)


@dataclass(frozen=True)
class _Run:
    """Parameters one after the other: the first of them, all and their gradients flat, their moments flat, their count of steps."""

    first: torch.nn.Parameter
    params: torch.Tensor
    grads: torch.Tensor
    moments: dict[str, torch.Tensor]
    count: torch.Tensor

    def stands(self, state: dict[torch.Tensor, Any]) -> bool:
        """Whether parameters, gradients and state are where they were."""
        here = (self.first.data_ptr(), self.first.grad.data_ptr()) == (self.params.data_ptr(), self.grads.data_ptr())
        return here and state.get(self.first, {}).get("step") is self.count


def _neighbours(params: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """`params` by where they lie, in runs of which each follows the last, as do their gradients; less than 32 bytes may be between two."""

    def follows(a: torch.Tensor, b: torch.Tensor) -> bool:
        same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.is_contiguous() and b.is_contiguous()
        return same and 0 <= b.storage_offset() - a.storage_offset() - a.numel() < 8

    runs: list[list[torch.nn.Parameter]] = []
    for p in sorted(params, key=torch.Tensor.data_ptr):
        if runs and follows(runs[-1][-1], p) and follows(runs[-1][-1].grad, p.grad):
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs


def _adamw(config: AdamWConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    if device.type == "cuda":  # a rate that changes by step is a tensor there, so that nothing waits for the host
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return AdamW(
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=device.type in ("cuda", "cpu", "mps"),
        capturable=device.type == "cuda",
    )


def _adamw8bit(config: AdamW8bitConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    if device.type != "cuda":
        raise ValueError(
            f"optimizer.kind is adamw8bit, which needs an NVIDIA GPU; this run is on {device.type}. Set optimizer.kind to adamw."
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("optimizer.kind is adamw8bit, which needs the package bitsandbytes: pip install bitsandbytes.") from None
    return AdamW8bit(groups, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)


def _prodigy(config: ProdigyConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ValueError("optimizer.kind is prodigy, which needs the package prodigyopt: pip install prodigyopt.") from None
    return Prodigy(
        groups,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        d_coef=config.d_coef,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


OPTIMIZERS = {"adamw": _adamw, "adamw8bit": _adamw8bit, "prodigy": _prodigy}


def build(config: Any, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The configured optimizer over `groups` ({"params", "lr", "part"}). Raises ValueError where it cannot work here."""
    return OPTIMIZERS[config.kind](config, groups, device)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group its learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
