"""trainer/hardware.py: device, dtype and attention, each with its reason; what can't work is refused in a sentence."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import hardware

ROOT = Path(__file__).parents[2]
MODERN = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def cpu_only(monkeypatch):
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_present", lambda: False)


@pytest.fixture
def cuda(monkeypatch):
    """cuda(*capabilities, archs): as if these GPUs were there and torch built for those architectures; gives those made the current one."""
    current = []

    def setup(*capabilities, archs=MODERN):
        number = lambda device: int(str(device).partition(":")[2] or 0) if isinstance(device, str) else device  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[number(device)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {number(device)}")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        return current

    return setup


def test_importing_it_imports_no_torch():
    code = "import sys, trainer.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("wish", ["auto", "cpu", "cuda:7", "a toaster"])
def test_waking_the_gpu_fails_in_silence(wish, cpu_only):
    hardware.warm_up(wish)


def test_a_cpu(cpu_only):
    chosen = hardware.choose()
    assert (chosen.device, chosen.dtype, chosen.attention, chosen.warning) == ("cpu", "fp32", "sdpa", None)
    assert chosen.name and len(chosen.reasons) == 3
    assert hardware.choose(device="cpu", dtype="bf16").dtype == "bf16"


@pytest.mark.parametrize(("capability", "dtype"), [((8, 6), "bf16"), ((9, 0), "bf16"), ((12, 1), "bf16"), ((7, 5), "fp16")])
def test_a_gpu(cuda, capability, dtype):
    cuda(capability)
    chosen = hardware.choose()
    assert (chosen.device, chosen.name, chosen.dtype, chosen.warning) == ("cuda", "GPU 0", dtype, None)


def test_bf16_on_an_old_gpu_is_done_but_said(cuda):
    cuda((7, 5))
    chosen = hardware.choose(dtype="bf16")
    assert chosen.dtype == "bf16" and "emulates" in chosen.reasons[1]


def test_a_gpu_without_kernels_is_passed_over(cuda):
    current = cuda((6, 1), (8, 6), (8, 6))
    assert hardware.choose().device == "cuda:1"
    assert hardware.choose(device="cuda:2").name == "GPU 2"
    assert current == [1, 2]
    with pytest.raises(ValueError, match=r'device is "cuda:0".*compute capability 6\.1.*no kernels.*launch.py update'):
        hardware.choose(device="cuda:0")
    with pytest.raises(ValueError, match="cuda has devices 0 to 2"):
        hardware.choose(device="cuda:3")


def test_a_machine_whose_only_gpu_has_no_kernels_trains_on_the_cpu_and_says_so(cuda):
    cuda((6, 1))
    chosen = hardware.choose()
    assert chosen.device == "cpu" and "no kernels" in chosen.warning
    cuda((6, 1), archs=["sm_50", "sm_60", "sm_70"])
    assert hardware.choose().device == "cuda"
    cuda((8, 0), archs=["sm_86"])
    assert hardware.choose().device == "cpu", "a binary for 8.6 does not run on 8.0"
    cuda((13, 0))
    assert hardware.choose().device == "cuda", "PTX compute_120 is compiled for newer GPUs by the driver"


@pytest.mark.parametrize(
    ("build", "visible", "words"),
    [(None, None, "build without CUDA"), ("13.0", None, "driver is too old"), ("13.0", "", "CUDA_VISIBLE_DEVICES hides it")],
)
def test_a_gpu_that_torch_does_not_see_is_the_first_thing_said(cpu_only, monkeypatch, build, visible, words):
    monkeypatch.setattr(hardware, "nvidia_present", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    chosen = hardware.choose()
    assert chosen.device == "cpu" and words in chosen.warning
    with pytest.raises(ValueError, match=words):
        hardware.choose(device="cuda")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux paths")
@pytest.mark.parametrize(
    ("paths", "present"),
    [
        ([], False),
        (["/proc/driver/nvidia/gpus"], True),
        (["/dev/dxg"], False),
        (["/dev/dxg", "/usr/lib/wsl/lib/nvidia-smi"], True),
    ],
)
def test_nvidia_is_found_without_starting_a_program(paths, present):
    assert hardware.nvidia_present(paths.__contains__) is present


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"device": "cuda"}, 'device is "cuda", which does not work here; what works: cpu'),
        ({"device": "gpu"}, 'device is "gpu"; allowed are "auto"'),
        ({"device": "cuda:x"}, "allowed are"),
        ({"dtype": "half"}, 'dtype is "half"; allowed are "auto", "fp32", "bf16", "fp16"'),
        ({"dtype": "fp16"}, 'dtype is "fp16" on a CPU.*choose "fp32"'),
        ({"attention": "flash"}, 'attention is "flash"; allowed are'),
        ({"attention": "xformers"}, 'needs a CUDA GPU.*choose "sdpa"'),
    ],
)
def test_impossible_wishes_are_refused(cpu_only, wish, words):
    with pytest.raises(ValueError, match=words):
        hardware.choose(**wish)


def test_xformers_must_be_installed(cuda, monkeypatch):
    cuda((8, 6))
    monkeypatch.setattr(hardware, "_version", lambda package: None)
    with pytest.raises(ValueError, match="not installed; choose"):
        hardware.choose(attention="xformers")
    monkeypatch.setattr(hardware, "_version", lambda package: "0.0.35")
    assert hardware.choose(attention="xformers").attention == "xformers"


def test_probe_is_json_and_the_doctor_reads_it():
    found = json.loads(json.dumps(hardware.probe()))
    assert found["versions"]["torch"] == torch.__version__ and found["versions"].keys() == set(hardware.PACKAGES)
    assert found["cpu"]["cores"] >= 1 and found["memory_gib"] >= found["free_memory_gib"] > 0
    spec = importlib.util.spec_from_file_location("launch_for_doctor", ROOT / "launch.py")
    launch = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    lines = "\n".join(launch.doctor_lines(found))
    assert torch.__version__ in lines and found["choice"]["reasons"][0] in lines and all(line in lines for line in found["slow"])


def test_slow_says_why():
    gpu = {"name": "Small", "memory_gib": 6.0, "free_gib": 5.5, "compute_capability": "7.5", "bf16": False}
    found = {
        "choice": {"device": "cuda"},
        "gpus": [gpu],
        "gpu_unusable": None,
        "cpu": {"cores": 8},
        "free_memory_gib": 4.0,
        "disk_free_gib": 3.0,
    }
    said = " ".join(hardware.slow(found))
    for words in ("6.0 GiB, less than 8", "no bf16 units", "4.0 GiB of memory", "3.0 GiB of disk"):
        assert words in said
    fine = {**gpu, "memory_gib": 24.0, "free_gib": 23.0, "bf16": True}
    assert hardware.slow({**found, "gpus": [fine], "free_memory_gib": 32.0, "disk_free_gib": 100.0}) == []


@pytest.mark.gpu
def test_the_chosen_gpu_multiplies():
    chosen = hardware.choose()
    assert chosen.device.startswith("cuda") and chosen.warning is None
    x = torch.ones(64, 64, device=chosen.device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[chosen.dtype])
    assert (x @ x)[0, 0].item() == 64.0
    assert hardware.probe()["gpus"][0]["memory_gib"] > 1
