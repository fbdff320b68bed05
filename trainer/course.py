"""What of a run can change while it goes on: its length and the prompts of its sample images. Torch-free.

A change is an event `changed` that names its step. A resumed run replays them, and so ends as if it had not been interrupted:
which rows a step trains on, its learning rate and the parts it trains are functions of the step and of the changes before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainer import plan
from trainer.config import TrainConfig


class Course:
    """A run's plan as it stands now.

    Attributes:
        config: the run's settings with the length that it has now; plan: its steps; prompts: of the sample images.
        due: when it stops to look and to save.
    """

    def __init__(self, config: TrainConfig, laid: plan.Plan) -> None:
        self.asked = config
        self.prompts = plan.preview_prompts(config, laid.images)
        self._set(config, laid)

    def _set(self, config: TrainConfig, laid: plan.Plan) -> None:
        self.config, self.plan = config, laid
        self.due = plan.due(config, len(laid.steps))

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return len(self.plan.steps)

    def change(self, step: int, *, visits: int | None = None, prompts: Iterable[str] | None = None) -> dict[str, Any]:
        """Have `visits` or `prompts` hold after `step` steps; returns the fields of the `changed` event.

        Raises plan.TooShort, changing nothing, when so few visits leave no step to do.
        """
        if visits is not None:
            config = plan.with_visits(self.asked, visits)
            self._set(config, plan.relaid(self.plan, config, step))
            return {"step": step, "visits": visits, "total": self.total}
        self.prompts = tuple(prompts)
        return {"step": step, "prompts": list(self.prompts)}


def changes(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The live changes among a run's events, oldest first, as {"step", "visits" or "prompts"}: what Course.change takes.

    A change whose step was lost, since the run was resumed from an earlier one, holds from that earlier one on: it was asked for.
    """
    found: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "resumed":
            found = [c | {"step": min(c["step"], event["step"])} for c in found]
        elif event["type"] == "changed":
            found.append({k: event[k] for k in ("step", "visits", "prompts") if k in event})
    return found
