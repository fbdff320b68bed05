"""The captured step against the eager one. What needs CUDA is run by hand with `pytest -m gpu`."""

import os
from types import SimpleNamespace

import pytest
import torch

from trainer import adapters, capture, families, optimizers, plan
from trainer.config.load import validate
from trainer.data.store import Store
from trainer.demo.run import DEMO as DEMO_DATA
from trainer.families.sources import DEMO
from trainer.step import Step


@pytest.fixture
def build(tmp_path):
    """build(device, dtype, changes): what a run puts together before its first step."""

    def make(device, dtype, **changes):
        values = {
            "data": [{"folder": str(DEMO_DATA / "data/zorp/train"), "trigger": "zorp"}],
            "adapter": {"rank": 8, "alpha": 8, "targets": ["attention", "feed_forward", "projections", "convolutions"]},
            "part": {"unet": {"learning_rate": 1e-3}, "text_1": {"learning_rate": 1e-3, "stop": 0.25}},
            "train": {"visits": 40, "batch_size": 4},
            "dataset": {"flip": True},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            values[section][name] = value
        config = validate(values)
        family = families.get("sd1")
        laid = plan.make(config, 128)
        device = torch.device(device)
        models = family.load(DEMO, dtype, device, config.model)
        rates = {name: getattr(config.part, name) for name in family.parts if getattr(config.part, name).train}
        store = Store(config, laid, family, models, rates)
        targets = {name: family.targets(models, name, config.adapter.targets) for name in rates}
        adapter = adapters.build(config.adapter, models.parts, targets, config.train.seed)
        adapter.train(True)
        groups = [{"params": adapter.parameters(name), "lr": part.learning_rate, "part": name} for name, part in rates.items()]
        optimizer = optimizers.build(config.optimizer, groups, device)
        total = len(laid.steps)
        stops = {name: plan.stop_step(part.stop, total) for name, part in rates.items()}
        step = Step(config, family, models, adapter, optimizer, stops, fp16=dtype == torch.float16)
        return SimpleNamespace(config=config, plan=laid, store=store, adapter=adapter, step=step, total=total)

    return make


def train(made, steps, run_step):
    device = made.step.models.device
    slots: dict[int, list] = {}
    losses = []
    for n in range(steps):
        rows = len(made.plan.steps[n])
        if rows not in slots:
            slots[rows] = [(torch.arange(rows, device=device), torch.ones(rows, device=device))]
        run_step(n, made.store.batch(n), slots[rows], made.store.total_weight[n], plan.factor(made.config, n, made.total))
        losses.append(made.step.loss.clone())
    return torch.stack(losses).cpu(), {k: t.cpu().clone() for k, t in made.adapter.state().items()}


@pytest.fixture
def deterministic(monkeypatch):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_graphs_equal_eager_steps_to_the_last_bit(dtype, build, deterministic):
    """Over 50 steps, in which the text encoder stops."""
    one, other = build("cuda", dtype), build("cuda", dtype)
    assert min(one.step.stops.values()) < 50 < one.total
    captured = capture.Captured(other.step)
    losses, weights = train(one, 50, one.step.run)
    again, graphs = train(other, 50, captured.run)
    assert captured.replays >= 40
    assert torch.equal(losses, again)
    assert all(torch.equal(weights[k], graphs[k]) for k in weights)
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.gpu
def test_two_graphs_with_a_sum_between_them_equal_one(build, deterministic):
    """As each of several processes does it; the sum here is over one."""
    one, other = build("cuda", torch.bfloat16), build("cuda", torch.bfloat16)
    summed = []
    other.step.reduce = lambda tensors: summed.append(len(tensors))
    losses, weights = train(one, 12, capture.Captured(one.step).run)
    again, graphs = train(other, 12, capture.Captured(other.step).run)
    assert summed == [2] * 12
    assert torch.equal(losses, again)
    assert all(torch.equal(weights[k], graphs[k]) for k in weights)


@pytest.mark.gpu
def test_a_released_graph_is_captured_anew(build, deterministic):
    one, other = build("cuda", torch.bfloat16), build("cuda", torch.bfloat16)
    captured = capture.Captured(other.step)

    def run(n, *rest):
        if n == 12:
            captured.release()
        captured.run(n, *rest)

    losses, _ = train(one, 24, one.step.run)
    again, _ = train(other, 24, run)
    assert torch.equal(losses, again)


@pytest.mark.parametrize(
    "changes, said",
    [({}, "this run is on cpu"), ({"adapter__dropout": 0.1}, "this run is on cpu")],
)
def test_it_says_why_steps_are_not_captured(changes, said, build):
    assert said in capture.why_not(build("cpu", torch.float32, **changes).step)


def test_a_batch_keeps_its_values_in_tensors_of_its_own(build):
    made = build("cpu", torch.float32)
    batch = made.store.batch(0)
    own = capture._static(batch)
    first, second = capture.leaves(batch), capture.leaves(own)
    assert len(first) == len(second) >= 4
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
