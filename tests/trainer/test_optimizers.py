import math
import sys
from importlib.util import find_spec

import pytest
import torch
from pydantic import TypeAdapter

from trainer import checkpoints, optimizers
from trainer.config import AdamWConfig, OptimizerConfig
from trainer.optimizers import OPTIMIZERS
from trainer.run_dir import RunDir

NEEDS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
RATES = {"prodigy": 1.0}
STEPS = 30


def configured(kind, **options):
    return TypeAdapter(OptimizerConfig).validate_python({"kind": kind, **options})


class Toy:
    """Two parts that learn a fixed linear map as up @ down, as a LoRA does. A Stateful, so that checkpoints keep it."""

    def __init__(self, kind, device="cpu", size=24):
        draw = torch.Generator().manual_seed(0)
        self.wanted = (torch.randn(size, size, generator=draw) / size**0.5).to(device)
        shapes = {"unet": [(size, size // 2), (size // 2, size)], "text_1": [(size,)]}
        self.parts = {
            part: [torch.nn.Parameter((torch.randn(s, generator=draw) * 0.1).to(device)) for s in sizes] for part, sizes in shapes.items()
        }
        rate = RATES.get(kind, 0.02)
        groups = [
            {"params": self.parts["unet"], "lr": rate, "part": "unet"},
            {"params": self.parts["text_1"], "lr": rate, "part": "text_1"},
        ]
        self.rate, self.device = rate, device
        self.optimizer = optimizers.build(configured(kind), groups, torch.device(device))
        self.objects = {"adapter": self, "optimizer": checkpoints.OptimizerState(self.optimizer)}

    def state(self):
        return {f"{part}/{k}": p.detach() for part, params in self.parts.items() for k, p in enumerate(params)}

    @torch.no_grad()
    def load(self, state):
        for k, t in self.state().items():
            t.copy_(state[k])

    def loss(self, n):
        draw = torch.Generator().manual_seed(n)
        x = torch.randn(16, len(self.wanted), generator=draw).to(self.device)
        up, down = self.parts["unet"]
        return (x @ (up @ down).T + self.parts["text_1"][0] - x @ self.wanted.T - 0.5).square().mean()

    def train(self, start, end):
        """Steps `start` to `end`; the second part stops at 20, as a text encoder may."""
        for n in range(start, end):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(n).backward()
            if n >= 20:
                self.parts["text_1"][0].grad = None
            for group in self.optimizer.param_groups:
                optimizers.set_rate(group, self.rate / (1 + n / 200))
            self.optimizer.step()
        return self


def check_lowers_and_resumes(kind, device, folder, same):
    toy = Toy(kind, device)
    before = float(toy.loss(99).detach())
    toy.train(0, 200 if kind == "prodigy" else STEPS)
    assert float(toy.loss(99).detach()) < 0.7 * before

    whole = Toy(kind, device).train(0, STEPS)
    for at in (1, 10, 25):
        run = RunDir(folder / str(at))
        run.create()
        first = Toy(kind, device).train(0, at)
        path = checkpoints.save_checkpoint(run, at, first.objects, keep=2)
        second = Toy(kind, device)
        assert checkpoints.load_checkpoint(path, second.objects) == at
        second.train(at, STEPS)
        assert same(whole.state(), second.state())
        untouched = Toy(kind, device).train(at, STEPS)  # what it would be had nothing been kept
        assert not same(whole.state(), untouched.state())


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if k != "adamw8bit"])
def test_it_lowers_a_loss_and_resumes_to_the_last_bit(kind, tmp_path, same):
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    check_lowers_and_resumes(kind, "cpu", tmp_path, same)


def test_a_loaded_state_leaves_the_options_and_the_tensor_of_the_rate(tmp_path):
    """A CUDA graph reads the rate from that tensor, on the GPU; a state of a run on the CPU has a number."""
    run = RunDir(tmp_path)
    run.create()
    path = checkpoints.save_checkpoint(run, 5, Toy("adamw").train(0, 5).objects, keep=1)
    toy = Toy("adamw")
    rates = [torch.tensor(0.5), torch.tensor(0.25)]
    for group, rate in zip(toy.optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, capturable=True, betas=(0.8, 0.9))
    checkpoints.load_checkpoint(path, toy.objects)
    for group, rate in zip(toy.optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate and group["capturable"] and group["betas"] == (0.8, 0.9)
        assert all(int(toy.optimizer.state[p]["step"]) == 5 and toy.optimizer.state[p]["exp_avg"].any() for p in group["params"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_lowers_a_loss_and_resumes_on_the_gpu(kind, tmp_path, same):
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_lowers_and_resumes(kind, "cuda", tmp_path, same)


def test_every_kind_of_the_configuration_is_there():
    kinds = {m.model_fields["kind"].default for m in OptimizerConfig.__args__[0].__args__}
    assert kinds == set(OPTIMIZERS)


def test_options_reach_the_optimizer():
    def build(kind, **options):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5, "part": part} for part in ("unet", "text_1")]
        built = optimizers.build(configured(kind, **options), groups, torch.device("cpu")).param_groups
        assert [(g["part"], float(g["lr"])) for g in built] == [("unet", 0.5), ("text_1", 0.5)]
        return built

    for group in build("adamw", beta1=0.5, beta2=0.6, eps=1e-3, weight_decay=0.7):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.7)
    if find_spec("prodigyopt"):
        for group in build("prodigy", d_coef=3, weight_decay=0.2, beta1=0.8):
            assert (group["d_coef"], group["weight_decay"], group["betas"]) == (3, 0.2, (0.8, 0.99))


def test_8bit_without_an_nvidia_gpu_says_what_to_do():
    with pytest.raises(ValueError, match=r"adamw8bit, which needs an NVIDIA GPU; this run is on cpu\. Set optimizer\.kind to adamw\."):
        Toy("adamw8bit")


@pytest.mark.parametrize("kind", NEEDS)
def test_a_missing_package_is_named(kind, monkeypatch):
    for name in (NEEDS[kind], f"{NEEDS[kind]}.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"{kind}, which needs the package {NEEDS[kind]}: pip install {NEEDS[kind]}\."):
        optimizers.build(configured(kind), [], torch.device("cuda"))


def test_a_rate_is_set_in_place_where_it_is_a_tensor():
    rate = torch.tensor(1.0)
    group = {"lr": rate}
    optimizers.set_rate(group, 0.25)
    assert group["lr"] is rate
    assert float(rate) == 0.25
    group = {"lr": 1.0}
    optimizers.set_rate(group, 0.25)
    assert group["lr"] == 0.25


def test_adamw_updates_neighbours_as_one_and_as_torch_does():
    torch.manual_seed(0)
    shapes = [(4, 6), (30,), (5, 3), (8, 8), (7,)]
    master, grads = torch.randn(160), torch.zeros(160)
    places = [0, 24, 56, 72, 136]  # gaps of 2 and 1 numbers
    own = [torch.nn.Parameter(master[at : at + math.prod(shape)].view(shape)) for at, shape in zip(places, shapes, strict=True)]
    for p, at in zip(own, places, strict=True):
        p.grad = grads[at : at + p.numel()].view_as(p)
    plain = [torch.nn.Parameter(p.detach().clone()) for p in own]

    def groups(params):  # the order of a group is not that of the memory, and its second run stands alone
        return [
            {"params": [params[1], params[0], params[3]], "lr": 0.01, "part": "a"},
            {"params": [params[2], params[4]], "lr": 0.1, "part": "b"},
        ]

    config = AdamWConfig(beta1=0.8, beta2=0.99, weight_decay=0.02)
    ours = optimizers.build(config, groups(own), torch.device("cpu"))
    theirs = torch.optim.AdamW(groups(plain), betas=(0.8, 0.99), weight_decay=0.02, fused=True)
    stopped = {own[2], own[4]}
    for n in range(6):
        if n == 3:  # resumed: another optimizer goes on with the state
            state = ours.state_dict()
            ours = optimizers.build(config, groups(own), torch.device("cpu"))
            ours.load_state_dict(state)
        for p, q, at in zip(own, plain, places, strict=True):
            q.grad = torch.randn_like(q) if n < 5 or p not in stopped else None
            if q.grad is None:
                p.grad = None
            else:
                grads[at : at + p.numel()] = q.grad.flatten()
        ours.step()
        theirs.step()
        for p, q in zip(own, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert [len(runs) for runs in ours._runs.values()] == [2, 2]
    theirs, ours = theirs.state_dict()["state"], ours.state_dict()["state"]
    for k, state in theirs.items():
        for name, value in state.items():
            torch.testing.assert_close(ours[k][name], value, rtol=0, atol=0)
