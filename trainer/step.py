"""One training step as tensor work: gradients of a batch, then the update. Nothing here waits for the device.

`grads` adds the gradient of a micro-batch into the parameters' static `.grad` buffers; `update` reduces them over the
processes, clips, and lets the optimizer step. Everything drawn comes from one generator that is seeded by (seed, n).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch

from trainer import optimizers, randomness
from trainer.adapters import Adapter
from trainer.config import TrainConfig
from trainer.families import Cond, Family, Models, States
from trainer.families.clip import Tokens


@dataclass(frozen=True)
class Batch:
    """Rows of one bucket.

    `mean`, `std`: (B, C, h, w) of the latents; `weight` (B,) in the loss; `text`: for each text encoder its states, or the tokens that
    it is to read at each step; `size`: (B, 6) of families that are told the image's size; `mask`: (B, 1, h, w) weights of the latents in the
    loss, their mean 1 in each row; `prior`: what the rows say of the class, as `text`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor
    text: dict[str, States | Tokens]
    size: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    prior: dict[str, States | Tokens] | None = None

    def rows(self, index: torch.Tensor, valid: torch.Tensor) -> Batch:
        """Rows `index`, those that are not `valid` (an empty slot of a process) with weight 0."""
        take = [x.index_select(0, index) for x in (self.mean, self.std)]
        text = {part: told.rows(index) for part, told in self.text.items()}
        prior = self.prior and {part: told.rows(index) for part, told in self.prior.items()}
        size, mask = (None if x is None else x.index_select(0, index) for x in (self.size, self.mask))
        return Batch(*take, self.weight.index_select(0, index) * valid, text, size, mask, prior)


Slots = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Draws:
    """What is drawn on the device for the whole batch of a step; every process and micro-batch takes its rows."""

    posterior: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor

    def rows(self, index: torch.Tensor) -> Draws:
        return Draws(*(x.index_select(0, index) for x in (self.posterior, self.noise, self.t)))


def condition(
    family: Family, models: Models, text: dict[str, States | Tokens], size: torch.Tensor | None, active: Container[str] = ()
) -> Cond:
    """What the denoiser is told: states as they are, tokens read by their encoder now, with gradients for the parts that are `active`."""
    states = {}
    for part, told in text.items():
        if isinstance(told, States):
            states[part] = told
        else:
            with torch.set_grad_enabled(part in active):
                states[part] = family.encode_text(models, part, told)
    return family.condition(models, states, size)


class LossScale:
    """Dynamic loss scale for fp16, kept on the device: halved on an overflow, doubled after 1,000 steps without one."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(2.0**14, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, finite: torch.Tensor) -> None:
        self.good.copy_(torch.where(finite, self.good + 1, 0.0))
        grow = self.good >= 1000
        self.scale.copy_(torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale * 0.5).clamp(1.0, 2.0**24))
        self.good.copy_(torch.where(grow, 0.0, self.good))

    def state(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.good.copy_(state["good"])


class Step:
    """The arithmetic of a run: family, adapter and optimizer put together.

    Args:
        rates: peak learning rate of each trained part; stops: the first step that no longer trains it.
        reduce: sums a list of tensors over all processes, in place.

    Attributes:
        done: completed steps, as the loop counts them; updating: whether the optimizer is at work, so that the weights are of no step.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        models: Models,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        stops: dict[str, int],
        reduce: Callable[[list[torch.Tensor]], None] | None = None,
        fp16: bool = False,
    ) -> None:
        self.config, self.family, self.models, self.adapter, self.optimizer = config, family, models, adapter, optimizer
        self.stops, self.reduce = stops, reduce
        self.done, self.updating = 0, False
        self.generator = torch.Generator(models.device)
        self.scale = LossScale(models.device) if fp16 else None
        self.loss = torch.zeros((), device=models.device)  # of the current step, then of all steps since it was read
        self.total = torch.zeros((), device=models.device)
        self.trains: dict[str, bool] = {}  # for each part, what `arrange` made of it last
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.peak = {part: max(r for r, g in zip(self.peaks, optimizer.param_groups, strict=True) if g["part"] == part) for part in stops}
        self.weights = adapter.weights
        params = [p for part in stops for p in adapter.parameters(part)]
        self.buffers = self.weights.grads if self.weights else {p: torch.zeros_like(p) for p in params}

    def active(self, n: int) -> list[str]:
        """The parts that step `n` trains."""
        return [part for part, stop in self.stops.items() if n < stop]

    def arrange(self, n: int, factor: float = 1.0) -> None:
        """What the host does for step `n`: freeze the parts that have stopped, seed, set each part's rate to its peak times `factor`."""
        active = set(self.active(n))
        for part in self.stops:
            if (part in active) != self.trains.get(part):
                for p in self.adapter.parameters(part):
                    p.requires_grad_(part in active)
                    p.grad = self.buffers[p] if part in active else None
                self.trains[part] = part in active
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            optimizers.set_rate(group, peak * factor)
        self.generator.manual_seed(randomness.key(self.config.train.seed, n, "device"))

    def draw(self, shape: torch.Size) -> Draws:
        """Set the gradients to zero and draw for latents of `shape`."""
        if self.weights:
            self.weights.begin()
        else:
            torch._foreach_zero_(list(self.buffers.values()))
        self.loss.zero_()
        g, device = self.generator, self.models.device
        posterior = torch.randn(shape, generator=g, device=device)
        noise = torch.randn(shape, generator=g, device=device)
        if self.config.loss.noise_offset:
            noise = noise + self.config.loss.noise_offset * torch.randn((*shape[:2], 1, 1), generator=g, device=device)
        return Draws(posterior, noise, self.family.timesteps(self.models, shape[0], g, self.config.loss))

    def begin(self, n: int, batch: Batch, factor: float = 1.0) -> Draws:
        """Arrange step `n` and draw for it."""
        self.arrange(n, factor)
        return self.draw(batch.mean.shape)

    def run(self, n: int, batch: Batch, slots: Slots, total_weight: float, factor: float, key: str = "") -> None:
        """Step `n` whole: `slots` are (rows, which of them count) of each micro-batch; `key` names the process."""
        self.arrange(n, factor)
        self.work(n, batch, slots, torch.full((), total_weight, device=self.models.device), key)

    def work(self, n: int, batch: Batch, slots: Slots, total_weight: torch.Tensor, key: str | None) -> None:
        """What the device does for a step that is arranged. `key` None: no dropout, so that nothing else is drawn."""
        self.compute(n, batch, slots, total_weight, key)
        self.exchange(n)
        self.update(n)

    def compute(self, n: int, batch: Batch, slots: Slots, total_weight: torch.Tensor, key: str | None) -> None:
        """The gradients of this process's rows."""
        draws = self.draw(batch.mean.shape)
        for k, (index, valid) in enumerate(slots):
            if key is not None:
                torch.manual_seed(randomness.key(self.config.train.seed, n, f"default {key} {k}"))
            self.grads(n, batch.rows(index, valid), draws.rows(index), total_weight)

    def grads(self, n: int, batch: Batch, draws: Draws, total_weight: torch.Tensor | float) -> None:
        """Add the gradient of sum(weight * loss) / `total_weight` over these rows.

        With prior preservation (Ruiz et al. 2022, arXiv:2208.12242, section 3.2, with the base's own prediction in the place of pictures that
        it has made) a second term keeps what the model says of the class, of the same noisy latents, what it is without the adapter.
        """
        models, family = self.models, self.family
        latents = batch.mean + batch.std * draws.posterior
        noisy, target = family.process(models, latents, draws.noise, draws.t)
        weight = batch.weight * family.weight(models, draws.t, self.config.loss.min_snr_gamma) / total_weight
        cond = condition(family, models, batch.text, batch.size, self.active(n))
        self._learn(family.predict(models, noisy, draws.t, cond), target, weight, batch.mask)
        if batch.prior is not None:
            with self.adapter.disabled(), torch.no_grad():
                cond = condition(family, models, batch.prior, batch.size)
                target = family.predict(models, noisy, draws.t, cond)
            cond = condition(family, models, batch.prior, batch.size, self.active(n))
            self._learn(family.predict(models, noisy, draws.t, cond), target, weight * self.config.loss.prior_weight, None)

    def _learn(self, predicted: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add the gradient of sum(weight * mean squared error), the mean weighted by the mask."""
        square = (predicted - target).square()
        loss = ((square if mask is None else square * mask).mean((1, 2, 3)) * weight).sum()
        (loss * self.scale.scale if self.scale else loss).backward()
        self.loss += loss.detach()
        if self.weights:
            self.weights.collect()

    def exchange(self, n: int) -> None:
        """Sum gradients and loss over the processes."""
        if self.reduce:
            self.reduce([*self._gradients(n), self.loss])

    def _gradients(self, n: int) -> list[torch.Tensor]:
        """What the parts of step `n` have for gradients, in few tensors; those of stopped parts are zero."""
        return [self.weights.grad] if self.weights else [p.grad for part in self.active(n) for p in self.adapter.parameters(part)]

    def update(self, n: int) -> None:
        """Unscale, clip and step."""
        params, grads = [p for part in self.active(n) for p in self.adapter.parameters(part)], self._gradients(n)
        if self.scale:
            torch._foreach_div_(grads, self.scale.scale)
        limit = self.config.train.max_grad_norm
        norm = torch.nn.utils.get_total_norm(grads) if limit or self.scale else None
        if limit:
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
        self.updating = True
        if self.scale:
            self._step_if_finite(params, torch.isfinite(norm))
        else:
            self.optimizer.step()
        self.updating = False
        self.total += self.loss

    def _step_if_finite(self, params: list[torch.nn.Parameter], finite: torch.Tensor) -> None:
        """Step, then put back the parameters and the optimizer's tensors if the gradients had overflowed."""
        grads = [p.grad for p in params]
        for g in grads:
            g.copy_(torch.where(finite, g, 0.0))
        known = [*params, *(v for p in params for v in self.optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor))]
        before = [x.detach().clone() for x in known]
        fresh = [p for p in params if p not in self.optimizer.state]
        self.optimizer.step()
        with torch.no_grad():
            for now, old in zip(known, before, strict=True):
                now.copy_(torch.where(finite.to(now.device), now, old))
            for p in fresh:  # their state was made just now; of zero gradients it is zero, but for the count of steps
                if isinstance(count := self.optimizer.state[p].get("step"), torch.Tensor):
                    count.mul_(finite.to(count.device))
        self.scale.update(finite)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.models.device.type == "cuda":
            torch.cuda.synchronize(self.models.device)

    def read_loss(self, steps: int) -> float:
        """Mean loss since the last call. This one waits for the device."""
        value = float(self.total) / max(1, steps)
        self.total.zero_()
        return value
