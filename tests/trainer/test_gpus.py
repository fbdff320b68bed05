"""What only a machine with several CUDA devices can show (NCCL); run by hand with `pytest -m gpu`."""

from __future__ import annotations

import re

import psutil
import pytest
import torch

from trainer import events

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")]

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
GPU = {"train.device": "cuda", "train.dtype": "bf16", "train.reproducible": True, "train.visits": 40, "output.checkpoint_every": 40}


@pytest.fixture(scope="module")
def one(command, tmp_path_factory):
    """One GPU that does both GPUs' shares one after the other. A process of its own, since reproducible ways hold for a whole process."""
    root = tmp_path_factory.mktemp("one") / "run"
    trained(command(root, GPU | {"train.accumulation": 2}))
    return root


def trained(process):
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said


def told(root, kind):
    return [e for e in events.read(root / "events.jsonl") if e["type"] == kind]


def weights(root):
    from safetensors.torch import load_file

    return load_file(root / "lora.safetensors")


@pytest.mark.parametrize("launcher", [TWO, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_gpus_equal_one_bit_by_bit(launcher, one, command, same, tmp_path):
    """In the reproducible mode, by two graphs with NCCL's sum between them; one writer of events and files."""
    root = tmp_path / "run"
    trained(command(root, GPU, launcher=launcher))
    numbers = [e["seq"] for e in events.read(root / "events.jsonl")]
    assert numbers == list(range(len(numbers)))
    assert [(e["step"], e["loss"]) for e in told(root, "step")] == [(e["step"], e["loss"]) for e in told(one, "step")]
    assert same(weights(root), weights(one))
    assert not any("CUDA graphs" in e["text"] for e in told(root, "warning"))
    assert {p.name for p in root.rglob("*")} == {p.name for p in one.rglob("*")}


def test_a_killed_process_ends_the_run_which_one_gpu_resumes(command, wait_for, tmp_path):
    changes = GPU | {"train.visits": 4000}
    process = command(tmp_path, changes, launcher=TWO)
    wait_for(process, tmp_path, "checkpoint", 40)
    ranks = {c.environ().get("RANK"): c for c in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    last = list(events.read(tmp_path / "events.jsonl"))[-1]
    assert last["type"] == "failed" and re.search("[Aa]nother (of its processes|process of this run)", last["text"]), last
    assert not any(psutil.pid_exists(c.pid) and c.status() != psutil.STATUS_ZOMBIE for c in ranks.values())
    process = command(tmp_path, None, "--resume")
    at = wait_for(process, tmp_path, "resumed")["step"]
    assert at >= 40 and at % 40 == 0
    process.terminate()
    process.communicate(timeout=60)
    assert told(tmp_path, "stopped")


def test_two_gpus_resume_what_one_began(command, wait_for, tmp_path):
    """In float32; each of the two cuts its share in two again, so it is equal to rounding."""
    changes = GPU | {"train.dtype": "fp32", "train.accumulation": 2}
    alone, root = tmp_path / "alone", tmp_path / "run"
    trained(command(alone, changes))
    process = command(root, changes)
    wait_for(process, root, "checkpoint", 40)
    process.terminate()
    process.communicate(timeout=60)
    trained(command(root, None, "--resume", launcher=TWO))
    assert told(root, "resumed") and told(root, "finished")
    a, b = weights(root), weights(alone)
    assert a.keys() == b.keys()
    apart = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5
    assert apart < 1e-3 * sum(float(b[k].square().sum()) for k in b) ** 0.5


@pytest.mark.parametrize("te", [True, False], ids=["text encoder too", "denoiser"])
def test_a_chosen_gpu_is_the_one_that_works(te, command, tmp_path):
    """Triton's kernels and CUDA graphs are launched on the current device of the thread; a denoiser's adapter is attached by another one."""
    trained(command(tmp_path / "run", GPU | {"train.device": "cuda:1", "train.visits": 12, "part.text_1.train": te}))
    assert not told(tmp_path / "run", "warning")
    losses = [e["loss"] for e in told(tmp_path / "run", "step")]
    assert losses and all(loss == loss for loss in losses)
