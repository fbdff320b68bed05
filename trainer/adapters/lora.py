"""LoRA by PEFT: configuration, parameters and names are PEFT's; what the trainer sees is the Adapter handle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from trainer import lean, randomness
from trainer.adapters import Delta, Ranks, plain
from trainer.config import BlockConfig, LoraConfig
from trainer.formats.single_file import weightless

NAME = "default"


class Lora:
    """The adapter of one run over all its parts. Parameters are float32 whatever the base's dtype.

    Args:
        layers: part -> module path -> PEFT layer.
        rates: what multiplies the learning rate, for the layers where that is not 1, by the same keys.
        weights: what holds the parameters and their gradients in few tensors, where the layers have their lean form.
    """

    def __init__(
        self, layers: dict[str, dict[str, torch.nn.Module]], rates: dict[str, dict[str, float]], notes: list[str], weights: Any = None
    ) -> None:
        self.layers, self.rates, self.notes, self.weights = layers, rates, notes, weights
        self._scaling = {id(m): m.scaling[NAME] for p in layers.values() for m in p.values()}
        self._strength = 1.0

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        """Trainable tensors of a part, in a fixed order (down, up, layer by layer)."""
        return [w for m in self.layers.get(part, {}).values() for w in (m.lora_A[NAME].weight, m.lora_B[NAME].weight)]

    def groups(self, part: str) -> list[tuple[float, list[torch.nn.Parameter]]]:
        """(what multiplies the part's learning rate, parameters), in a fixed order; together they are those of `parameters`."""
        out: dict[float, list[torch.nn.Parameter]] = {}
        for path, m in self.layers.get(part, {}).items():
            out.setdefault(self.rates[part].get(path, 1.0), []).extend((m.lora_A[NAME].weight, m.lora_B[NAME].weight))
        return list(out.items())

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

        What differs in scale is folded into `up`; the ranks are those that `build` was given. Raises ValueError with a sentence for
        layers that are not trained here, and for other sizes than those here.
        """
        given = {(d.part, plain(d.path)): d for d in deltas if d.tensors["up"].any() and d.tensors["down"].any()}
        own = {(part, plain(path)): m for part, layers in self.layers.items() for path, m in layers.items()}
        unknown = [f"{part} {path}" for part, path in given if (part, path) not in own]
        if unknown:
            raise ValueError(
                f"it changes {len(unknown)} layers that this run does not train, the first is {unknown[0]}. Train their part, and "
                "add their kind to adapter.targets, so that nothing of the file is lost."
            )
        for (part, path), delta in given.items():
            m = own[part, path]
            down, up = m.lora_A[NAME].weight, m.lora_B[NAME].weight
            new = delta.tensors["down"], delta.tensors["up"]
            if (new[0][0].numel(), new[1].shape[0]) != (down[0].numel(), up.shape[0]):
                raise ValueError(f"its layer {part} {path} has other sizes than the base's. Give a LoRA of a base of this kind.")
            assert len(new[0]) == len(down), "the adapter was built without the ranks of what it starts from"
            down.copy_(new[0].reshape(down.shape))
            up.copy_((new[1].double() * (delta.scale / self._scaling[id(m)])).float().reshape(up.shape))

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

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """For a while in which nothing is trained: without dropout, and without a cast of each weight at each pass."""
        self.train(False)
        try:
            with self.weights.fresh() if self.weights else nullcontext():
                yield
        finally:
            self.train(True)

    def train(self, mode: bool) -> None:
        """Switch the adapter's dropout on or off."""
        for layers in self.layers.values():
            for m in layers.values():
                m.train(mode)


def block_of(config: LoraConfig, part: str, path: str) -> str | None:
    """The name of the longest of the configured blocks that the layer is in; names go with and without `text_model.`."""
    name = f"{part}.{plain(path)}."
    found = [b for b in config.blocks if name.startswith(_block_start(b))]
    return max(found, key=lambda b: len(_block_start(b)), default=None)


def _block_start(block: str) -> str:
    part, _, path = block.partition(".")
    return f"{part}.{plain(f'{path}.')}" if path else f"{part}."


def _settings(config: LoraConfig, part: str, path: str, module: torch.nn.Module) -> tuple[int, float, float]:
    """(rank before the layer's sides limit it, true scale, what multiplies the learning rate) of a layer; rank 0 leaves it out."""
    rank, scale = config.rank, config.alpha / config.rank
    if module.weight.ndim == 4 and module.weight.shape[2:].numel() > 1:
        rank = config.conv_rank or rank
        scale = config.conv_alpha / rank if config.conv_alpha else scale
    name = block_of(config, part, path)
    block = BlockConfig() if name is None else config.blocks[name]
    rank = rank if block.rank is None else block.rank
    if block.alpha and rank:
        scale = block.alpha / rank
    return rank, scale, block.rate


def rank_of(config: LoraConfig, part: str, path: str, module: torch.nn.Module) -> int:
    """The rank that the Linear or Conv2d `module` gets: at most its shorter side; 0 leaves it as it is."""
    return min(_settings(config, part, path, module)[0], *module.weight.shape[:2])


def _check_blocks(config: LoraConfig, targets: dict[str, list[str]]) -> None:
    """Raise ValueError for configured blocks without any layer."""
    names = [f"{part}.{plain(path)}." for part, paths in targets.items() for path in paths]
    idle = [block for block in config.blocks if not any(name.startswith(_block_start(block)) for name in names)]
    if idle:
        there = dict.fromkeys(re.match(r"(.*?\.\d+|.*)\.", name).group(1) for name in names)
        raise ValueError(
            f"adapter.blocks names {', '.join(idle)}, where nothing is trained. Blocks of this run: {', '.join(there)}. "
            "Mend the name, or train the part and the kind of layers (adapter.targets) that it is about."
        )


def build(
    config: LoraConfig,
    parts: dict[str, torch.nn.Module],
    targets: dict[str, list[str]],
    seed: int,
    ranks: Ranks | None = None,
) -> Lora:
    """Attach LoRA layers to the modules `targets[part]` of each part.

    Every layer has the true scale alpha / rank of the configuration, whatever its own rank is: a layer with a side shorter than that
    gets the side as its rank, and one that `ranks` names gets the rank from there.
    `up` starts at zero; `down` is drawn uniformly from +-1/sqrt(fan_in) (PEFT's own start) by a CPU generator that depends
    on the seed and the layer's name alone, so every device starts from the same numbers.
    Raises ValueError for a configured block in which there is no layer, and for a part of which all layers are left out.
    """
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Conv2d, Linear

    peft = PeftConfig(lora_dropout=config.dropout, init_lora_weights=False)
    _check_blocks(config, targets)
    layers: dict[str, dict[str, torch.nn.Module]] = {}
    rates: dict[str, dict[str, float]] = {}
    smaller = 0
    for part, paths in targets.items():
        modules = dict(parts[part].named_modules())
        given = {plain(path): rank for path, rank in (ranks or {}).get(part, {}).items()}
        wanted = {p: s for p in paths if (s := _settings(config, part, p, modules[p]))[0]}
        own = {p: given.get(plain(p)) or min(rank, *modules[p].weight.shape[:2]) for p, (rank, _, _) in wanted.items()}
        smaller += sum(own[p] < rank for p, (rank, _, _) in wanted.items() if plain(p) not in given)
        layers[part], rates[part] = {}, {p: rate for p, (_, _, rate) in wanted.items() if rate != 1}
        if not own:
            continue
        device = next(parts[part].parameters()).device
        for path, rank in own.items():
            parent, _, name = path.rpartition(".")
            kind = Linear if isinstance(modules[path], torch.nn.Linear) else Conv2d
            with weightless():  # PEFT's own way to put layers in looks at all modules again and again, which takes twice as long
                m = layers[part][path] = kind(modules[path], NAME, peft, r=rank)
            setattr(modules[parent], name, m)
            m.scaling[NAME] = wanted[path][1]
            down, up = m.lora_A[NAME], m.lora_B[NAME]
            bound = 1 / math.sqrt(down.weight[0].numel())
            draw = torch.Generator().manual_seed(randomness.key(seed, 0, f"adapter {part} {path}"))
            start = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=draw)
            down.weight = torch.nn.Parameter(start.to(device))
            up.weight = torch.nn.Parameter(torch.zeros(up.weight.shape, device=device))
    for part, paths in targets.items():
        if paths and not layers[part]:
            raise ValueError(
                f"adapter.blocks gives rank 0 to all layers of {part}, so that there is nothing to train. Give one of its blocks a rank, "
                f"or set part.{part}.train to false."
            )
    notes = [f"{smaller} layers are smaller than the rank that is set and get their own size as rank."] if smaller else []
    return Lora(layers, rates, notes, lean.install(parts, layers, NAME))
