"""Optimizers: each is built from its configuration and the parts' parameters, one parameter group for each part."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import AdamW8bitConfig, AdamWConfig, ProdigyConfig


def _adamw(config: AdamWConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    if device.type == "cuda":  # a rate that changes by step is a tensor there, so that nothing waits for the host
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return torch.optim.AdamW(
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
