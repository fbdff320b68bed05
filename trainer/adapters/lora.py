"""LoRA by PEFT: configuration, parameters and names are PEFT's; what the trainer sees is the Adapter handle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from trainer import randomness
from trainer.adapters import Delta
from trainer.config import LoraConfig

NAME = "default"


class Lora:
    """The adapter of one run over all its parts. Parameters are float32 whatever the base's dtype."""

    def __init__(self, layers: dict[str, dict[str, torch.nn.Module]], notes: list[str]) -> None:
        self.layers = layers  # part -> module path -> PEFT layer
        self.notes = notes
        self._scaling = {id(m): m.scaling[NAME] for p in layers.values() for m in p.values()}
        self._strength = 1.0

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        """Trainable tensors of a part, in a fixed order (down, up, layer by layer)."""
        return [w for m in self.layers.get(part, {}).values() for w in (m.lora_A[NAME].weight, m.lora_B[NAME].weight)]

    def state(self) -> dict[str, torch.Tensor]:
        """All weights by `part/path.down` and `part/path.up`."""
        out = {}
        for part, layers in self.layers.items():
            for path, m in layers.items():
                out[f"{part}/{path}.down"] = m.lora_A[NAME].weight.detach()
                out[f"{part}/{path}.up"] = m.lora_B[NAME].weight.detach()
        return out

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave. Raises ValueError when the layers or ranks differ."""
        own = self.state()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise ValueError("The saved adapter has other layers or ranks than the configured one; use the settings it was saved with.")
        for k, tensor in own.items():
            tensor.copy_(state[k])

    @torch.no_grad()
    def start(self, deltas: Iterable[Delta]) -> None:
        """Take on the change that a file's `deltas` make; layers that it leaves as they are stay as `build` made them.

        What differs in scale is folded into `up`. Raises ValueError with a sentence for layers that are not trained here, and for
        other ranks and sizes than those here.
        """
        given = {(d.part, d.path): d for d in deltas if d.tensors["up"].any() and d.tensors["down"].any()}
        unknown = [f"{part} {path}" for part, path in given if path not in self.layers.get(part, {})]
        if unknown:
            raise ValueError(
                f"it changes {len(unknown)} layers that this run does not train, the first is {unknown[0]}. Train their part, and "
                "add their kind to adapter.targets, so that nothing of the file is lost."
            )
        for (part, path), delta in given.items():
            m = self.layers[part][path]
            own = m.lora_A[NAME].weight, m.lora_B[NAME].weight
            down, up = delta.tensors["down"], delta.tensors["up"]
            sides = (own[0].shape[1:].numel(), own[1].shape[0])
            if (down[0].numel(), up.shape[0]) != sides:
                raise ValueError(f"its layer {part} {path} has other sizes than the base's. Give a LoRA of a base of this kind.")
            if down.shape[0] != own[0].shape[0]:
                ranks = ", ".join(str(r) for r in sorted({d.tensors["down"].shape[0] for d in given.values()}))
                raise ValueError(f"its rank is {ranks}, where this run has {own[0].shape[0]}. Set adapter.rank to the file's.")
            own[0].copy_(down.reshape(own[0].shape))
            own[1].copy_((up.double() * (delta.scale / self._scaling[id(m)])).float().reshape(own[1].shape))

    def deltas(self) -> Iterator[Delta]:
        for part, layers in self.layers.items():
            for path, m in layers.items():
                down, up = (w[NAME].weight.detach().float().cpu() for w in (m.lora_A, m.lora_B))
                yield Delta(part, path, "lora", {"down": down, "up": up}, self._scaling[id(m)] * self._strength)

    @property
    def strength(self) -> float:
        """Multiplies the adapter's effect; 1 while training, 0 is the base alone."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        for layers in self.layers.values():
            for m in layers.values():
                m.scaling[NAME] = self._scaling[id(m)] * value

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base as it is without the adapter."""
        before, self.strength = self.strength, 0.0
        try:
            yield
        finally:
            self.strength = before

    def train(self, mode: bool) -> None:
        """Switch the adapter's dropout on or off."""
        for layers in self.layers.values():
            for m in layers.values():
                m.train(mode)


def build(config: LoraConfig, parts: dict[str, torch.nn.Module], targets: dict[str, list[str]], seed: int) -> Lora:
    """Attach LoRA layers to the modules `targets[part]` of each part.

    Every layer has the true scale alpha / rank; a layer with a side shorter than the rank gets that side as its rank.
    `up` starts at zero; `down` is drawn uniformly from +-1/sqrt(fan_in) (PEFT's own start) by a CPU generator that depends
    on the seed and the layer's name alone, so every device starts from the same numbers.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    layers: dict[str, dict[str, torch.nn.Module]] = {}
    smaller = 0
    for part, paths in targets.items():
        modules = dict(parts[part].named_modules())
        ranks = {p: min(config.rank, *modules[p].weight.shape[:2]) for p in paths}
        reduced = {p: r for p, r in ranks.items() if r < config.rank}
        smaller += len(reduced)
        peft = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=paths,
            rank_pattern={f"^{p}$": r for p, r in reduced.items()},
            alpha_pattern={f"^{p}$": config.alpha * r / config.rank for p, r in reduced.items()},
        )
        inject_adapter_in_model(peft, parts[part], adapter_name=NAME)
        layers[part] = {n: m for n, m in parts[part].named_modules() if isinstance(m, LoraLayer)}
        assert list(layers[part]) == paths, f"PEFT attached {len(layers[part])} layers to {part}, {len(paths)} were named"
        for path, m in layers[part].items():
            for w in (m.lora_A[NAME], m.lora_B[NAME]):
                w.weight.data = w.weight.data.float()
            bound = 1 / math.sqrt(m.lora_A[NAME].weight[0].numel())
            draw = torch.Generator().manual_seed(randomness.key(seed, 0, f"adapter {part} {path}"))
            start = torch.empty(m.lora_A[NAME].weight.shape).uniform_(-bound, bound, generator=draw)
            with torch.no_grad():
                m.lora_A[NAME].weight.copy_(start)
                m.lora_B[NAME].weight.zero_()
    notes = [f"{smaller} layers are smaller than rank {config.rank} and get their own size as rank."] if smaller else []
    return Lora(layers, notes)
