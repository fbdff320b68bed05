"""Import of transformers, diffusers and PEFT only what a training uses: imports are most of what a user waits for before the first step.

Their packages import far more than is asked of them. `light` imports the few classes that a training needs, which takes .5 s beside the 1.1
of `import torch` where plain imports take 3.2 (one core of a server). What it saves, each measured by doing without it:

    .9  torch._dynamo, the compiler, by which diffusers, transformers and each optimizer mark functions as not to be compiled
    .7  transformers reads the sources of all its 500 models three times, to know what each of them exports
    .7  peft.auto, PEFT's other forty adapters, diffusers' other transformers and autoencoders, and what these import
    .5  torch.distributed's tensors and shards, with sympy, which transformers imports wherever torch has them
    .3  the garbage collector, which finds nothing while modules are loaded (and as much again until the first step)
    .2  which package brought each installed file: diffusers reads the lists of all of them; and whole descriptions, for version numbers

A package that waits is in sys.modules without its `__init__` having run, and its modules can be imported. Whatever else is asked of it runs
the `__init__` first, so code that uses more (a pipeline of diffusers, torch.compile) finds all that it would find otherwise, only later.
Where an installed version is built in another way, all is imported as usual.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import os
import re
import sys
import threading
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

USED = (
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "peft.tuners.lora",
)
DYNAMO = "torch._dynamo"
CLIP, T5 = "models.clip.modeling_clip", "models.t5"
# packages whose `__init__` waits -> what is taken from one of their modules without it, since we, diffusers or PEFT ask for it
WAITING: dict[str, dict[str, str]] = {
    DYNAMO: {},
    "transformers": {
        "AutoImageProcessor": "models.auto.image_processing_auto",
        "BloomPreTrainedModel": "models.bloom.modeling_bloom",
        "CLIPTextModel": CLIP,
        "CLIPTextModelWithProjection": CLIP,
        "CLIPTokenizer": "models.clip.tokenization_clip",
        "PreTrainedModel": "modeling_utils",
        "T5EncoderModel": f"{T5}.modeling_t5",
        "T5Tokenizer": f"{T5}.tokenization_t5",
    },
    "transformers.models": {},
    "diffusers.hooks": {},
    "diffusers.models.autoencoders": {},
    "diffusers.models.transformers": {},
    "diffusers.models.unets": {},
    "peft": {
        "LoraConfig": "tuners.lora",
        "PeftConfig": "config",
        "PeftType": "utils",
        "inject_adapter_in_model": "mapping",
    },
    "peft.tuners": {},
    "requests": {},
    "scipy.optimize": {"linear_sum_assignment": "_lsap"},
    "torchvision.transforms": {"InterpolationMode": "functional"},
}
OPTIONAL = (
    "bitsandbytes",
    "scipy",
    "torchaudio",
    "torchvision",
    "xformers",
)  # which transformers and diffusers import wherever they are installed
FIRST = {"peft": "peft.utils"}  # a module that the others of a package expect to be there
ROOTS = ("transformers", "diffusers", "peft", "accelerate")  # what is imported anew where this does not work

_real_version, _real_packages = importlib.metadata.version, importlib.metadata.packages_distributions
_lock = threading.RLock()
_done = _importing = False


def light(beside: Callable[[], object] = lambda: None) -> None:
    """Import what every training uses, and no more. What is imported already stays as it is; a second call does nothing.

    To gain all, call it before anything imports torch. `beside` is called when torch is there, to start in a thread what needs it alone.
    """
    global _done, _importing
    with _lock:
        if _done:
            return
        _done = _importing = True
        sys.meta_path.insert(0, _Finder())
        collecting = gc.isenabled()
        gc.disable()
        try:
            import torch  # noqa: F401

            beside()
            before = set(sys.modules)
            try:
                _import_used()
            except Exception as error:  # of a version that is built in another way
                warnings.warn(
                    f"Starting takes some seconds longer: all of transformers and diffusers is imported ({type(error).__name__}: {error}).",
                    stacklevel=2,
                )
                _undo(before)
        finally:
            _importing = False
            if collecting:
                # Nearly all of the half million objects that are there now stay. A full collection looks at each that is not frozen
                # (.15 s); the capture of each CUDA graph makes one.
                gc.freeze()
                gc.enable()


def _import_used() -> None:
    import torch

    # transformers, PEFT and diffusers find a torch without torch.distributed, as some builds are, and remember that. Their parallel
    # training is not there in this process. Ours is accelerate's; one of several processes is left out here all the same.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    with (
        instead(importlib.metadata, "version", version),
        instead(importlib.metadata, "packages_distributions", _WhenRead),
        instead(torch.distributed, "is_available", (lambda: False) if alone else torch.distributed.is_available),
    ):
        import transformers
        from transformers import utils

        with instead(utils, "direct_transformers_import", lambda *_, **__: transformers):  # by which it loads itself a second time
            for name in USED:
                importlib.import_module(name)


def _undo(before: set[str]) -> None:
    """Forget what was imported since `before`, so that the next import finds no half of it, and import as usual from now on."""
    for name in [*WAITING]:
        if name != DYNAMO:
            del WAITING[name]
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ROOTS:
            del sys.modules[name]


@contextlib.contextmanager
def instead(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Have `value` in the place of a module's attribute for a while, if it has one of this name."""
    if (real := getattr(module, name, None)) is not None:
        setattr(module, name, value)
    try:
        yield
    finally:
        if real is not None:
            setattr(module, name, real)


@functools.cache
def version(package: str) -> str:
    """As importlib.metadata.version, which parses a package's whole description for it. 75 times at a start that is .1 s."""
    found = re.search(r"^Version: *(\S+)", importlib.metadata.distribution(package).read_text("METADATA") or "", re.M)
    return found[1] if found else _real_version(package)


class _WhenRead(UserDict):
    """What importlib.metadata.packages_distributions gives; made when something is looked up in it."""

    def __init__(self) -> None:
        pass

    @functools.cached_property
    def data(self) -> Any:
        return _real_packages()


# packages that wait


class _Package(ModuleType):
    """A package whose `__init__` has not run, or has put another object in the place of this one."""

    def __getattr__(self, name: str) -> Any:
        own = self.__name__
        if name == "__version__" and "." not in own:
            return version(own)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {own!r} has no attribute {name!r}")
        if own not in _begun:
            if name in (known := WAITING.get(own, {})):
                with contextlib.suppress(ImportError, AttributeError):  # of a version that has it elsewhere
                    return getattr(importlib.import_module(f"{own}.{known[name]}"), name)
            if _apart(own) and PathFinder.find_spec(f"{own}.{name}", self.__path__):
                return importlib.import_module(f"{own}.{name}")
        return getattr(_run(self), name)


def _apart(package: str) -> bool:
    """Whether modules of a package that waits are imported without its `__init__`."""
    return package != DYNAMO and (_importing or package.partition(".")[0] in ROOTS)


def _waits(package: str) -> bool:
    return package not in _begun and isinstance(sys.modules.get(package), _Package)


_begun: set[str] = set()  # packages whose `__init__` runs or has run
_ended: set[str] = set()  # those of them whose `__init__` has run


def _run(package: ModuleType) -> ModuleType:
    """Run the `__init__` of a package that waits for it; returns the module that it left in sys.modules.

    Meanwhile the package has what was set so far, as in any circular import.
    """
    name = package.__name__
    with _lock:
        if _waits(parent := name.rpartition(".")[0]) and not _apart(parent):
            _run(sys.modules[parent])
        if name not in _begun:
            _begun.add(name)
            try:
                package.__spec__.loader.exec_module(package)
            except BaseException as error:
                _begun.discard(name)
                if isinstance(error, AttributeError):  # which would be taken for a name that is not there
                    raise ImportError(f"{name} cannot be imported: {error}") from error
                raise
            if (found := sys.modules[name]) is package:
                package.__class__ = ModuleType
            else:
                _replaced(name, found)
            _ended.add(name)
            while name == DYNAMO and _marked:
                _marked.pop(0)()
        elif name not in _ended:
            raise AttributeError(f"partially initialized module {name!r} (most likely due to a circular import)")
    return sys.modules[name]


def _replaced(name: str, found: ModuleType) -> None:
    """Tell a module that has put itself in the place of a package what was imported of it before, and its parent of it."""
    for path, module in [*sys.modules.items()]:
        parent, _, child = path.rpartition(".")
        if parent == name:
            found.__dict__.setdefault(child, module)
        if path == name and parent:
            setattr(sys.modules[parent], child, found)


# torch._dynamo


class _Dynamo(_Package):
    """torch._dynamo while nothing is compiled: marks are kept for the real one, or mean nothing without it."""

    def __getattr__(self, name: str) -> Any:
        if name in MARKS and DYNAMO not in _begun:
            return MARKS[name]
        return super().__getattr__(name)


_marked: list[Callable[[], object]] = []  # what is to be told to the real one


def _disable(fn: Any = None, recursive: bool = True, **more: Any) -> Any:
    """As torch._dynamo.disable; the function learns of the real one when it is there."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **more)
    if not isinstance(fn, (FunctionType, MethodType, BuiltinFunctionType)):
        return _run(sys.modules[DYNAMO]).disable(fn, recursive, **more)
    real = None

    @functools.wraps(fn)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal real
        if DYNAMO not in _ended:
            return fn(*args, **named)
        real = real or sys.modules[DYNAMO].disable(fn, recursive, **more)
        return real(*args, **named)

    return call


def _mark(name: str) -> Callable[[Any], Any]:
    def mark(fn: Any) -> Any:
        _marked.append(lambda: getattr(sys.modules[DYNAMO], name)(fn))
        return fn

    return mark


class _EvalFrame:
    """torch._dynamo.eval_frame for those who ask whether a module is a compiled one, as each of diffusers' pipelines does."""

    OptimizedModule = type("OptimizedModule", (), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(_run(sys.modules[DYNAMO]).eval_frame, name)


MARKS = {
    "allow_in_graph": _mark("allow_in_graph"),
    "assume_constant_result": _mark("assume_constant_result"),
    "disable": _disable,
    "eval_frame": _EvalFrame(),
    "graph_break": lambda *_, **__: None,
}
ALONE = ("config", "_trace_wrapped_higher_order_op")  # its modules that are asked for without compiling, and need none of the others


def _import_alone(package: ModuleType, name: str) -> None:
    path = Path(package.__path__[0], f"{name}.py")
    if path.is_file():
        spec = spec_from_file_location(f"{package.__name__}.{name}", path)
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        setattr(package, name, module)


# Python's import system


class _Finder(MetaPathFinder):
    """Stands first in sys.meta_path."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if _waits(parent := name.rpartition(".")[0]) and not _apart(parent):
            _run(sys.modules[parent])  # which its modules expect. It imports most of them, so this one may be there now
            module = sys.modules.pop(name, None)
            return ModuleSpec(name, _There(module)) if module else None
        if name in _begun or not (name in WAITING or (_importing and name.partition(".")[0] in OPTIONAL)):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or type(spec.loader) is not SourceFileLoader or spec.submodule_search_locations is None:
            return None
        spec.loader = _Wait(spec.loader)
        return spec


class _Wait(Loader):
    """Leaves a package's `__init__` for later."""

    def __init__(self, real: SourceFileLoader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.real
        if module.__name__ == DYNAMO:
            try:
                for name in ALONE:
                    _import_alone(module, name)
            except Exception:  # of a version in which they do need the others
                for name in ALONE:
                    sys.modules.pop(f"{DYNAMO}.{name}", None)
                _begun.add(DYNAMO)
                self.real.exec_module(module)
                _ended.add(DYNAMO)
                return
        module.__class__ = _Dynamo if module.__name__ == DYNAMO else _Package
        if first := FIRST.get(module.__name__):
            importlib.import_module(first)


class _There(Loader):
    """Gives a module that was imported while Python looked for it; Python would make a second one."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
