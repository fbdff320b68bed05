"""Resumable checkpoints: the state of every registered object and the step, in one safetensors file without any pickle.

Tensors stand under `object/path/to/value`; everything else (numbers, strings, lists) is a JSON skeleton in the file's
metadata, with each tensor's place marked by its key. Written to a temporary file, synced, then renamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainer.run_dir import RunDir, RunError, write_atomic


class Stateful(Protocol):
    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class OptimizerState:
    """An optimizer as a Stateful."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state(self) -> Any:
        return self.optimizer.state_dict()

    def load(self, state: Any) -> None:
        state["state"] = {int(k): v for k, v in state["state"].items()}
        self.optimizer.load_state_dict(state)


def save_checkpoint(run: RunDir, step: int, objects: dict[str, Stateful], keep: int) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`. Raises RunError when the disk is full."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = {name: _flatten(thing.state(), name, tensors) for name, thing in objects.items()}
    metadata = {"format": "lora-atelier-checkpoint-1", "step": str(step), "state": json.dumps(skeleton)}
    path = run.checkpoint(step)
    write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata), "the checkpoint")
    for old in sorted(run.checkpoints.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path, objects: dict[str, Stateful]) -> int:
    """Put every object into the state of the checkpoint and return its step. Raises RunError for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"The checkpoint {path} cannot be read ({error}). Checkpoints are safetensors files; pickles are not loaded. "
            "Delete it to resume from an older one."
        ) from None
    if metadata.get("format") != "lora-atelier-checkpoint-1":
        raise RunError(f"{path} is not a checkpoint of this trainer. Resume from a file in the run's checkpoints folder.")
    skeleton = json.loads(metadata["state"])
    if skeleton.keys() != objects.keys():
        raise RunError(f"The checkpoint {path} was written with other settings; resume with the run's own config.json.")
    for name, thing in objects.items():
        thing.load(_restore(skeleton[name], tensors))
    return int(metadata["step"])


def ranks(path: Path) -> dict[str, dict[str, int]]:
    """{part: {module path: rank}} of the adapter in a checkpoint: a run that started from a LoRA took its ranks from there."""
    found: dict[str, dict[str, int]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.startswith("adapter/") and key.endswith(".down"):
                    part, _, layer = key.removeprefix("adapter/").removesuffix(".down").partition("/")
                    found.setdefault(part, {})[layer] = file.get_slice(key).get_shape()[0]
    except (SafetensorError, OSError):  # load_checkpoint says what is wrong with it
        return {}
    return found


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, dict):
        return {str(k): _flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}/{k}", tensors) for k, v in enumerate(value)]
    return value


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["__tensor__"]] if "__tensor__" in value else {k: _restore(v, tensors) for k, v in value.items()}
    return [_restore(v, tensors) for v in value] if isinstance(value, list) else value
