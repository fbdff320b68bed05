"""Who may know whom: the rules of the design, read from the syntax trees of the whole repository, not from what a run happens to import."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GRADIO = ("app/ui.py", "app/server.py", "app/forms.py", "app/pages/", "app/parts/")
SUBPROCESS = ("app/runner.py", "launch.py", "trainer/bench/sides.py")  # the bench times whole processes
SQLITE = ("app/jobs.py",)
FORMATS = ("trainer/formats/", "tests/")
KEYS = re.compile(r"lora_unet|lora_te|\bss_")
FREE = (  # what the app may import of the trainer: none of it imports torch
    "trainer.config",
    "trainer.plan",
    "trainer.memory",
    "trainer.run_dir",
    "trainer.events",
    "trainer.control",
    "trainer.formats.probe",
    "trainer.formats.metadata",
    "trainer.data.scan",
    "trainer.data.captions",
    "trainer.data.images",
    "trainer.data.buckets",
    "trainer.captioners",
)
SHARED = ("sources", "common", "unet", "clip", "prediction")  # of trainer/families: what families have in common
TORCH_FREE = (*FREE, "trainer.randomness", "trainer.hardware", "trainer.families.sources")
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors.torch")


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path with slashes, tree) of every module of the project."""
    for path in sorted([*root.glob("*.py"), *root.glob("app/**/*.py"), *root.glob("trainer/**/*.py")]):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Every module that the nodes import; `from a import b` gives `a.b`, which may be a module or a name in it."""
    package = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_start(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function bodies, nothing under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from at_start(node.orelse)
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            yield from at_start(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from at_start(handler.body)


def strings(tree: ast.Module) -> Iterator[str]:
    """Every string in the code, pieces of f-strings too, docstrings not."""
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    return (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in texts)


def violations(root: Path) -> list[str]:
    """A line for every place where a rule is broken."""
    found = []
    trees = dict(sources(root))
    for path, tree in trees.items():
        names = set(imports(path, ast.walk(tree)))
        own, kind = module_of(path), path.split("/")[0]

        def broken(rule: str, wrong, path: str = path) -> None:
            found.extend(f"{path}: {rule}: {name}" for name in sorted(wrong))

        # 1
        if kind == "trainer":
            broken("trainer imports app", (n for n in names if within(n, "app")))
        if not path.startswith(GRADIO):
            broken("gradio outside the front end", (n for n in names if within(n, "gradio")))
        # 2
        if kind == "app":
            broken("app imports of trainer what it may not", (n for n in names if within(n, "trainer") and not within(n, *FREE)))
            broken("app imports torch", (n for n in names if within(n, *HEAVY)))
        if own in TORCH_FREE or path.startswith("trainer/config/"):
            broken("torch at module level", (n for n in imports(path, at_start(tree.body)) if within(n, *HEAVY)))
        # 3
        if not path.startswith(FORMATS):
            broken("key string outside formats", {m.group() for text in strings(tree) for m in KEYS.finditer(text)})
        if path not in SQLITE:
            broken("sqlite3", (n for n in names if within(n, "sqlite3")))
        if path not in SUBPROCESS:
            broken("subprocess", (n for n in names if within(n, "subprocess") or n in ("os.system", "os.popen")))
        if kind == "app" and path not in SUBPROCESS:
            broken("psutil", (n for n in names if within(n, "psutil")))
        # 4
        for room in ("app/pages/", "trainer/families/"):
            package = room.replace("/", ".")[:-1]
            if path.startswith(room) and not path.endswith("__init__.py"):
                others = {module_of(p) for p in trees if p.startswith(room)} - {own, package, *(f"{package}.{n}" for n in SHARED)}
                broken("imports its neighbour", (n for n in names if within(n, *others)))
        if path.startswith("app/pages/") and not path.endswith("__init__.py"):
            allowed = [f"app.{n}" for n in ("forms", "parts", "jobs", "runner", "run_reader", "pages")]
            broken("a page knows too much", (n for n in names if within(n, "app") and not within(n, *allowed)))
    return found


def test_the_repository_keeps_the_rules():
    assert len(dict(sources(ROOT))) > 30
    assert violations(ROOT) == []


PLANTED = [
    ("trainer/loop.py", "import app.jobs", "trainer imports app: app.jobs"),
    ("trainer/loop.py", "def f():\n    from app import jobs", "trainer imports app: app.jobs"),
    ("trainer/loop.py", "import gradio as gr", "gradio outside the front end: gradio"),
    ("app/api.py", "from gradio import Blocks", "gradio outside the front end: gradio.Blocks"),
    ("app/api.py", "from trainer import run", "app imports of trainer what it may not: trainer.run"),
    ("app/api.py", "from trainer.formats import kohya", "app imports of trainer what it may not: trainer.formats.kohya"),
    ("app/pages/runs.py", "def f():\n    import torch", "app imports torch: torch"),
    ("trainer/plan.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass", "torch at module level: torch.nn"),
    ("trainer/config/__init__.py", "from torch import Tensor", "torch at module level: torch.Tensor"),
    ("trainer/data/scan.py", "class A:\n    import peft", "torch at module level: peft"),
    ("trainer/tools/merge.py", "x = f'lora_unet_{1}'", "key string outside formats: lora_unet"),
    ("app/run_reader.py", "x = {'ss_tag': 1}", "key string outside formats: ss_"),
    ("app/runner.py", "import sqlite3", "sqlite3: sqlite3"),
    ("trainer/run.py", "def f():\n    import subprocess", "subprocess: subprocess"),
    ("trainer/run.py", "from os import system", "subprocess: os.system"),
    ("app/machine.py", "def f():\n    import psutil", "psutil: psutil"),
    ("trainer/families/sdxl.py", "from trainer.families.sd1 import SD1", "imports its neighbour: trainer.families.sd1.SD1"),
    ("trainer/families/sdxl.py", "from . import sd1", "imports its neighbour: trainer.families.sd1"),
    ("app/pages/runs.py", "from app.pages import tools", "imports its neighbour: app.pages.tools"),
    ("app/pages/runs.py", "from app import server", "a page knows too much: app.server"),
]
LEGAL = [
    ("app/pages/runs.py", "import gradio\nfrom app import forms\nfrom app.parts import cards\nfrom trainer.config.load import load"),
    ("app/runner.py", "import psutil, subprocess\nfrom trainer import run_dir, events\nfrom trainer.data.images import load"),
    ("app/jobs.py", "import sqlite3"),
    ("launch.py", "import subprocess"),
    ("trainer/plan.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
    ("trainer/formats/kohya.py", "x = 'lora_unet_', 'lora_te_', 'ss_base'"),
    ("trainer/loop.py", '"""lora_unet in a docstring"""\nx = "process_ss"'),
    ("trainer/families/sdxl.py", "from trainer.families import Cond, sources\nimport torch"),
]


@pytest.mark.parametrize(("path", "text", "said"), PLANTED)
def test_a_broken_rule_is_seen(path, text, said, tmp_path):
    for name in (path, "trainer/families/sd1.py", "app/pages/tools.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if name == path else "")
    assert f"{path}: {said}" in violations(tmp_path)


@pytest.mark.parametrize(("path", "text"), LEGAL)
def test_what_is_allowed_is_not_complained_of(path, text, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert violations(tmp_path) == []


def there(names) -> list[str]:
    return [n for n in names if (ROOT / f"{n.replace('.', '/')}.py").exists() or (ROOT / n.replace(".", "/") / "__init__.py").exists()]


def loaded_by(modules: list[str]) -> set[str]:
    """The packages that importing these modules loads, in a process of its own."""
    code = f"import sys\nfor name in {modules!r}: __import__(name)\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_what_must_be_free_of_torch_is():
    names = there(TORCH_FREE)
    assert len(names) >= 14
    loaded = loaded_by([*names, "trainer.config.load", "trainer.__main__", "trainer.adapters", "trainer.families", "trainer.run"])
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "accelerate", "app", "gradio"}
    assert "torch" in loaded_by(["trainer.step"])


@pytest.mark.skipif(not there(["app.ui"]), reason="there is no app yet")
def test_the_front_end_starts_without_torch():
    pytest.importorskip("gradio")
    assert not loaded_by(["app.ui"]) & {"torch", "diffusers", "transformers", "peft", "accelerate"}
