"""What a training imports, what waits, and that whoever asks for it later finds the real thing. Each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HEAVY = (
    "sympy",
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.bert",
    "transformers.pipelines",
    "diffusers.models.autoencoders.autoencoder_kl_mochi",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines.pipeline_utils",
    "peft.auto",
    "peft.peft_model",
    "peft.tuners.lokr",
)


def run(code: str, **environment: str) -> str:
    """What a fresh process that runs `code` prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def training(configure, tmp_path):
    """training(before): the code of a run of a few steps in which `before` comes first."""
    config = tmp_path / "config.json"
    config.write_text(configure({"train.visits": 1}).model_dump_json(), encoding="utf-8")

    def code(before: str = "") -> str:
        return f"""
import sys
from pathlib import Path
{before}
from trainer import run
from trainer.config import TrainConfig
config = TrainConfig.model_validate_json(Path({str(config)!r}).read_text(encoding="utf-8"))
outcome, folder = run.train(config, Path({str(tmp_path / "run")!r}))
assert outcome == "finished"
"""

    return code


def test_a_training_imports_nothing_heavy_and_leaves_the_collector_on(training):
    out = run(training() + f"import gc, json\nprint(json.dumps([gc.isenabled(), [m for m in {HEAVY!r} if m in sys.modules]]))")
    assert json.loads(out) == [True, []]


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        'imports.USED = (*imports.USED, "peft.there_is_no_such_module")',  # after all was imported
        'imports.USED = ("transformers.models.clip.modeling_clip", "peft.there_is_no_such_module")',  # with a half of it
    ],
)
def test_where_it_does_not_work_all_is_imported_as_usual(broken, training):
    tell = "import warnings\nwarnings.showwarning = lambda message, *_: print(str(message).split()[0])"
    before = f"{tell}\nfrom trainer import imports\n{broken}"
    out = run(
        training(before) + "import peft, transformers\nprint('peft.auto' in sys.modules, type(transformers).__name__, type(peft).__name__)"
    )
    assert out.split() == ["Starting", "True", "_LazyModule", "module"]


def test_what_the_packages_import_where_it_is_installed_waits_until_it_is_used(tmp_path):
    """bitsandbytes, torchvision and the like take seconds and are not used here. `asks` stands for a package that imports one."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("print('begun')\nvalue = 3\n")
    (tmp_path / "torchaudio" / "part.py").write_text("from torchaudio import value\n")
    (tmp_path / "asks.py").write_text("import torchaudio\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from trainer import imports
imports.USED = ("asks",)
imports.light()
print("asks" in sys.modules, "torchaudio" in sys.modules)
import torchaudio.part
print(torchaudio.part.value, torchaudio.value)
"""
    assert run(code).split() == ["True", "True", "begun", "3", "3"]


@pytest.mark.slow
def test_it_trains_the_same(training, train, same):
    from safetensors.torch import load_file

    out = run(training("from trainer import imports\nimports.light = lambda beside=None: None") + "print(folder.lora(config.output.name))")
    plain = load_file(out.strip())
    assert same(plain, train({"train.visits": 1}).lora())


LIGHT = """
import sys
from trainer import imports
imports.light()
import torch
"""
COMPILE = """
@torch.compiler.disable
def apart(x):
    return x * 2

def f(x):
    return apart(x.sin()) + 1

assert float(apart(torch.ones(()))) == 2
assert "torch._dynamo.eval_frame" not in sys.modules
{ask}
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

x = torch.randn(8)
torch.testing.assert_close(torch.compile(f, backend=backend)(x), f(x))
assert len(graphs) == 2, graphs  # before and after what is not to be compiled
import torch._dynamo.utils as utils, torch._dynamo.eval_frame
assert utils is sys.modules["torch._dynamo.utils"] is torch._dynamo.utils
assert utils.__spec__.loader.get_filename("torch._dynamo.utils") == utils.__file__
assert type(torch._dynamo) is type(sys)
from diffusers.models.attention import BasicTransformerBlock  # was marked while nothing was compiled
from torch._dynamo import trace_rules
assert id(BasicTransformerBlock) in trace_rules._allowed_callable_ids
module = torch.compile(torch.nn.Linear(2, 2), backend="eager")
assert isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
torch.optim.AdamW([parameter]).step()
"""


@pytest.mark.parametrize(
    "ask",
    [
        "",
        pytest.param("import torch._dynamo.utils", marks=pytest.mark.slow),
        pytest.param("from torch._dynamo.eval_frame import OptimizedModule", marks=pytest.mark.slow),
        pytest.param("assert not isinstance(torch.nn.Linear(2, 2), torch._dynamo.eval_frame.OptimizedModule)", marks=pytest.mark.slow),
        pytest.param("assert torch._dynamo.eval_frame.innermost_fn", marks=pytest.mark.slow),
    ],
)
def test_what_is_compiled_afterwards_is_compiled(ask):
    run(LIGHT + COMPILE.format(ask=ask))


def test_a_compiler_whose_modules_do_not_stand_alone_is_imported_whole():
    """As in a version of torch that is built in another way."""
    run("from trainer import imports\nimports.ALONE = ('config', 'utils')" + LIGHT + "assert torch._dynamo.eval_frame.OptimizedModule")


def test_an_optimizer_and_checkpointing_do_not_need_the_compiler():
    run(
        LIGHT
        + """
from torch.utils.checkpoint import checkpoint
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([parameter])
for _ in range(2):
    checkpoint(lambda p: p.sin().sin(), parameter, use_reentrant=False).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo.eval_frame" not in sys.modules
"""
    )


def test_the_packages_give_all_that_they_give_otherwise():
    run(
        LIGHT
        + """
import importlib, importlib.metadata, torch.distributed
import diffusers, peft, requests, transformers
waiting = {package: names for package, names in imports.WAITING.items() if package.partition(".")[0] not in imports.OPTIONAL}
known = {package: {n: getattr(sys.modules[package], n) for n in names} for package, names in waiting.items()}
waited = {package: sys.modules[package] for package in waiting if package in sys.modules}
assert len(waited) == len(waiting), waited
for name in ("transformers", "peft", "requests", "diffusers", "torch"):
    assert sys.modules[name].__version__.split("+")[0] == importlib.metadata.version(name).split("+")[0] == imports.version(name).split("+")[0]
assert torch.distributed.is_available()
assert not any(isinstance(module, imports._Package) and module.__name__ in imports._ended for module in sys.modules.values())

assert requests.get and requests.exceptions.HTTPError
assert peft.LoraConfig is sys.modules["peft.tuners.lora"].LoraConfig
from peft import AutoPeftModel, LoKrConfig, PeftModel, get_peft_model, inject_adapter_in_model
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel, StableDiffusionXLPipeline, UNet2DModel
from diffusers.hooks import HookRegistry, apply_layerwise_casting
from diffusers.models.transformers import SD3Transformer2DModel
from diffusers.models.autoencoders import VQModel
assert AutoencoderKL is sys.modules["diffusers.models.autoencoders.autoencoder_kl"].AutoencoderKL
from transformers import AutoModel, BertModel, BlipForConditionalGeneration, T5EncoderModel
from transformers.models import bert
assert transformers.BertModel is sys.modules["transformers"].BertModel is bert.BertModel is BertModel
assert sys.modules["transformers"] is not waited["transformers"]  # it has put a module of its own there
for package, names in known.items():
    for name, value in names.items():
        assert getattr(sys.modules[package], name) is value, name
for package in ("transformers", "transformers.models"):
    for name in [m for m in sys.modules if m.rpartition(".")[0] == package]:
        assert getattr(sys.modules[package], name.rpartition(".")[2]) is sys.modules[name], name
try:
    transformers.ThereIsNoSuchModel
except AttributeError as error:
    assert "ThereIsNoSuchModel" in str(error)
else:
    raise AssertionError
for package in waiting:
    if package != imports.DYNAMO:
        dir(sys.modules[package]), sys.modules[package].__all__ if package == "peft" else None
assert "torch._dynamo.eval_frame" not in sys.modules
"""
    )


def test_what_was_imported_before_stays():
    run(
        """
import sys
import transformers
from transformers import CLIPTextModel
from diffusers import UNet2DConditionModel
before = dict(sys.modules)
from trainer import imports
imports.light()
assert all(sys.modules[name] is module for name, module in before.items())
from peft import inject_adapter_in_model
assert transformers.CLIPTextModel is CLIPTextModel
"""
    )


def test_one_of_several_processes_keeps_torch_distributed():
    code = (
        LIGHT + "from transformers.utils import is_torch_distributed_available as f; print(f(), 'torch.distributed.tensor' in sys.modules)"
    )
    assert run(code, WORLD_SIZE="2").split() == ["True", "True"]
    assert run(code).split() == ["False", "False"]
