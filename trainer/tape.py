"""The gradients of a step on the CPU as a tape: written down once for each key, then played without modules and without autograd.

A small model on the CPU waits for Python: the demo base's step takes 48 ms so on one core, where a plain loop's, which goes through modules,
autograd and views, takes 76 (`OMP_NUM_THREADS=1 python -m trainer bench`). So the first time that a key comes, each call of a kernel is
written down as a line of one Python function: the same kernels on the same numbers in the same order, so that what is played is the same to
the last bit. What holds for CUDA graphs (trainer.capture) holds here: whatever changes by step is a tensor, among the inputs or changed in
place. Where Python reads what a kernel computed, or shapes depend on it, there is no tape, and the key's steps are computed as always.

The rows of a batch are shared among the cores, each of which plays the tape of its own rows: so they need not wait for each other at every
kernel. Their sums are added up in a fixed order. Cores that are left over share each kernel, unless another program is busy on one of them:
it would put off one thread, for which all others wait. So a step takes one thread a player then (see Threads), provided that the numbers are
the same.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.capture import leaves
from trainer.step import Batch, Draws, Slots, Step

LONG = 100  # steps; to write a key's tape takes as long as about twelve of its steps, and a run has several keys
MOST = 4  # players; with more of them they wait for Python's lock
RESTS = 16, 256  # plays after which the slower number of threads is tried again: at first, and at most
UNFIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
UNFIT_NAMES = {"aten::resize_", "aten::resize_as_", "aten::set_"}  # they give a tensor another storage

Piece = tuple[Batch, Draws, torch.Tensor]  # what Step.grads takes beside the step's number
Sums = dict[int, torch.Tensor]  # storage -> what the gradients of some rows are added to


def why_not(step: Step, steps: int) -> str | None:
    """Why the steps of a run that is laid out for so many are not written down, as the end of a sentence; None: they are."""
    if steps < LONG:
        return f"a run of fewer than {LONG} steps would take longer so"
    if step.models.device.type != "cpu":
        return f"tapes are for the CPU, this run is on {step.models.device.type}"
    if next(step.models.parts["unet"].parameters()).dtype != torch.float32:
        return "tapes are for float32"  # bf16 may be widened by a mode (trainer.kernels.widened), which is this thread's alone
    if step.config.adapter.dropout:
        return "adapter.dropout draws anew at each step"
    return None


class Taped:
    """Runs a Step like `Step.run`, its gradients by tapes.

    Attributes:
        plays: how many tapes were played.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.plays = step, 0
        self.threads = torch.get_num_threads()
        w = step.weights
        sums = [step.loss, *([w.grad, w.work_grad] if w else step.buffers.values())]
        self._sums: list[Sums] = [{_storage(x): x for x in sums}]  # of each player; the first one's are the step's own
        self._tapes: dict[tuple, Tape | None] = {}
        self._choices: dict[tuple, Threads] = {}
        self._pool = ThreadPoolExecutor(MOST)

    def run(self, n: int, batch: Batch, slots: Slots, total_weight: float, factor: float, key: str = "") -> None:
        """Step `n`; the arguments are those of `Step.run`. Nothing is drawn from the default generator, so that it needs no seed."""
        step, weight = self.step, torch.full((), total_weight)
        step.arrange(n, factor)
        draws = step.draw(batch.mean.shape)
        for index, valid in slots:
            players = min(len(index), self.threads, MOST)
            rows = zip(index.tensor_split(players), valid.tensor_split(players), strict=True)
            pieces = [(batch.rows(i, v), draws.rows(i), weight) for i, v in rows]
            tapes = [self._tape(n, piece) for piece in pieces]
            if all(tapes):
                self._play(tapes, pieces)
            else:
                step.grads(n, batch.rows(index, valid), draws.rows(index), weight)
        step.exchange(n)
        step.update(n)

    def _tape(self, n: int, piece: Piece) -> Tape | None:
        """The tape for such a piece, written now if there was none; None where there can be none. The sums stay what they are."""
        inputs = _inputs(piece)
        kind = (tuple((tuple(x.shape), x.stride(), x.dtype) for x in inputs), tuple(self.step.active(n)))
        if kind not in self._tapes:
            sums = self._sums[0]
            before = [x.clone() for x in sums.values()]
            with Recorder(inputs) as recorder:
                self.step.grads(n, *piece)
            torch._foreach_copy_(list(sums.values()), before)
            self._tapes[kind] = recorder.tape() if recorder.changed <= sums.keys() else None
        return self._tapes[kind]

    def _play(self, tapes: Sequence[Tape], pieces: Sequence[Piece]) -> None:
        """All at once, each on a thread of its own."""
        own = list(self._sums[0].values())
        for _ in range(len(self._sums), len(tapes)):
            self._sums.append({s: torch.zeros_like(x) for s, x in self._sums[0].items()})
        key = tuple(map(id, tapes))
        if key not in self._choices:
            self._choices[key] = Threads(self._numbers(tapes, pieces))
        choice, begun = self._choices[key], time.perf_counter()
        number = choice.pick()
        others = [self._pool.submit(self._play_one, k, tapes[k], pieces[k], number) for k in range(1, len(tapes))]
        try:
            self._play_one(0, tapes[0], pieces[0], number)
        finally:
            torch.set_num_threads(self.threads)
        for k, other in enumerate(others, 1):
            other.result()
            theirs = list(self._sums[k].values())
            torch._foreach_add_(own, theirs)
            torch._foreach_zero_(theirs)
        choice.tell(number, time.perf_counter() - begun)
        self.plays += len(tapes)

    def _play_one(self, player: int, tape: Tape, piece: Piece, threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            tape.of(player, self._sums[player])(*_inputs(piece))

    def _numbers(self, tapes: Sequence[Tape], pieces: Sequence[Piece]) -> list[int]:
        """The numbers of threads that a player may take: all that are left for it; one as well where that gives the same to the last bit."""
        many, sums = self.threads // len(tapes), list(self._sums[0].values())
        if many == 1:
            return [1]
        before, found = [x.clone() for x in sums], []
        for number in (many, 1):
            for tape, piece in zip(tapes, pieces, strict=True):
                self._play_one(0, tape, piece, number)
            found.append([x.clone() for x in sums])
            torch._foreach_copy_(sums, before)
        return [many, 1] if all(map(torch.equal, *found)) else [many]


class Threads:
    """Takes, of one or two numbers of threads, the one that was the quicker of late: the median of its last three plays counts.

    The other is tried again now and then: after 16 plays, and where that changes nothing, after twice as many, up to 256.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._took: dict[int, deque[float]] = {n: deque(maxlen=3) for n in numbers}
        self._rest = self._left = RESTS[0]

    def pick(self) -> int:
        """The number for the next play."""
        best = min(self._took, key=self._seconds)
        if self._left > 0 or len(self._took) == 1:
            return best
        return max(self._took, key=self._seconds)

    def tell(self, number: int, seconds: float) -> None:
        """How long the play with `number` took."""
        best = min(self._took, key=self._seconds)
        self._left -= 1
        if number != best:
            self._took[number].clear()
        self._took[number].append(seconds)
        if number != best:
            self._rest = RESTS[0] if self._seconds(number) < self._seconds(best) else min(2 * self._rest, RESTS[1])
            self._left = self._rest

    def _seconds(self, number: int) -> float:
        return median(self._took[number] or [0.0])


def _inputs(piece: Piece) -> list[torch.Tensor]:
    return [x for value in piece for x in leaves(value)]


@dataclass
class Tape:
    """The code of a function of the inputs, and what it reads by name."""

    code: Any
    own: dict[str, Any]
    _made: dict[int, Callable[..., None]] = field(default_factory=dict)

    def of(self, player: int, sums: Sums) -> Callable[..., None]:
        """The function that adds to `sums`, which are always the same for one player."""
        if player not in self._made:
            own = {name: _instead(x, sums) if isinstance(x, torch.Tensor) else x for name, x in self.own.items()}
            exec(self.code, own)
            self._made[player] = own["tape"]
        return self._made[player]


def _instead(x: torch.Tensor, sums: Sums) -> torch.Tensor:
    """The same place in `sums`, if x lies in one of them."""
    whole = sums.get(_storage(x))
    return x if whole is None else whole.as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass
class _Line:
    makes: list[str]  # a name for each tensor that is returned, "_" for one that is not new
    text: str
    reads: set[str]
    needed: bool = False


class Recorder(TorchDispatchMode):
    """Writes a tape of what it surrounds.

    A tensor is known by where it lies (storage, offset, shape, strides) and not by its object, of which autograd makes several. Views are
    not played: what a kernel takes is cut out of the first tensor in its storage, once for all kernels that take the same. What lies in a
    storage that is neither an input nor made in between is the tape's own: weights, buffers.

    Attributes:
        why: what no tape can play, where something of that kind was met.
        changed: the storages of its own in which the tape changes something.
    """

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.why: str | None = None
        self.changed: set[int] = set()
        self._known: list[Any] = []  # keeps a storage's number from being given to another, without keeping its memory
        self._lines: list[_Line] = []
        self._own: dict[str, Any] = {"cut": torch.as_strided}
        self._own_names: dict[int, str] = {}
        self._names: dict[tuple, str] = {}
        self._first: dict[int, tuple[str, torch.dtype]] = {}  # storage -> its first tensor
        self._reads: set[str] = set()
        self._inputs = [self._new(x) for x in inputs]
        if len(self._first) < len(self._inputs):
            self.why = "inputs that share their memory"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.why is None and _unfit(func, args):
            self.why = str(func)
        if self.why:
            return func(*args, **kwargs)
        self._reads = set()
        said = ", ".join([*map(self._say, args), *(f"{k}={self._say(v)}" for k, v in kwargs.items())])
        reads, older = self._reads, {_storage(x) for x in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        returned = list(out) if isinstance(out, list | tuple) else [out]
        makes = [self._new(x) if isinstance(x, torch.Tensor) and _storage(x) not in older else "_" for x in returned]
        changes = [] if torch.Tag.inplace_view in func.tags else _written(func, args, kwargs)
        self.changed.update(s for x in changes if (s := _storage(x)) not in self._first)
        if changes or makes.count("_") < len(makes):
            target = "" if makes.count("_") == len(makes) else f"{', '.join(makes)}{',' * isinstance(out, list | tuple)} = "
            self._lines.append(_Line(makes, f"{target}{self._keep(func._op)}({said})", reads, bool(changes)))
        return out

    def _new(self, x: torch.Tensor) -> str:
        """A name for a tensor in a storage that was not seen before."""
        name = f"t{len(self._names)}"
        self._names[_place(x)] = name
        if x.layout == torch.strided:
            self._known.append(StorageWeakRef(x.untyped_storage()))
            self._first[_storage(x)] = name, x.dtype
        else:
            self.why = f"a new tensor whose layout is {x.layout}"
        return name

    def _keep(self, value: Any) -> str:
        """The name of something that stays what it is."""
        if id(value) not in self._own_names:
            self._own_names[id(value)] = name = f"own{len(self._own)}"
            self._own[name] = value
        return self._own_names[id(value)]

    def _say(self, value: Any) -> str:
        """An argument as source text."""
        if isinstance(value, torch.Tensor):
            return self._read(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._say, value))}]" if any(map(_is_kept, value)) else repr(tuple(value))
        return self._keep(value) if _is_kept(value) else repr(value)

    def _read(self, x: torch.Tensor) -> str:
        place = _place(x)
        if place not in self._names:
            if place[0] in self._first:
                first, dtype = self._first[place[0]]
                if x.dtype != dtype:
                    self.why = "a tensor that is read as another dtype"
                self._names[place] = name = f"t{len(self._names)}"
                text = f"{name} = cut({first}, {tuple(x.shape)}, {x.stride()}, {x.storage_offset()})"
                self._lines.append(_Line([name], text, {first}))
            else:
                self._names[place] = self._keep(x.detach() if x.layout == torch.strided else x)
        self._reads.add(self._names[place])
        return self._names[place]

    def tape(self) -> Tape | None:
        """What was written; None where `why` says something."""
        if self.why:
            return None
        wanted: set[str] = set()  # names that a later line reads
        lines: list[tuple[_Line, str]] = []  # with what is dropped after it
        for line in reversed(self._lines):
            if line.needed or wanted.intersection(line.makes):
                last = sorted((line.reads | set(line.makes)) - wanted - self._own.keys() - {"_", *self._inputs})
                lines.append((line, f"; del {', '.join(last)}" if last else ""))
                wanted |= line.reads
        source = [f"def tape({', '.join(self._inputs)}):", *(f"    {line.text}{drop}" for line, drop in reversed(lines)), "    return"]
        return Tape(compile("\n".join(source), "<tape>", "exec"), self._own)


def _unfit(func: Any, args: tuple) -> bool:
    """Whether Python reads what `func` gives, or its shape depends on the data, or it gives a tensor another storage."""
    if func is torch.ops.aten.index.Tensor:  # tagged for its masks
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    return bool(UNFIT.intersection(func.tags)) or func._schema.name in UNFIT_NAMES


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments in which `func` writes."""
    named = {a.name: kwargs.get(a.name) if a.kwarg_only or k >= len(args) else args[k] for k, a in enumerate(func._schema.arguments)}
    return [x for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write for x in _tensors(named[a.name])]


def _is_kept(value: Any) -> bool:
    """Whether an argument is called by a name, since its source text would not do."""
    return not (value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


def _place(x: torch.Tensor) -> tuple:
    return (_storage(x), x.storage_offset(), *x.shape, *x.stride(), x.dtype) if x.layout == torch.strided else (id(x),)
