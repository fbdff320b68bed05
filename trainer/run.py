"""One run in order: check, plan, load, encode, attach, optimize, fit, export. The command line and the GUI both end here."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from trainer import control, course, events, imports, memory, plan, randomness
from trainer.config import TrainConfig
from trainer.data.scan import Known, scan
from trainer.families import sources
from trainer.formats import probe
from trainer.hardware import Hardware, cap, choose, free_gib, torch_dtype, warm_up
from trainer.run_dir import Lock, RunDir, RunError, write_atomic, write_json

STUCK = "This run was told to end and could not: another of its processes has ended or does not answer. Run again with --resume."

# Two runs are the same for resuming when they differ in nothing but these: what is looked at, not what is learnt.
TEXTS = {"title", "author", "description", "license", "thumbnail", "sidecars"}
MAY_DIFFER = {"preview": True, "validation": True, "output": {"save_every", "checkpoint_every", "keep_checkpoints", *TEXTS}}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no model."""

    config: TrainConfig
    source: Path
    family: str
    plan: plan.Plan


def prepare(config: TrainConfig, say: Callable[[str], None], resumed: bool = False, known: Path | None = None) -> Prepared:
    """Resolve the base and lay out the data; `known` is a run's file of images that decode (RunDir.images). Raises ValueError (its subclasses) with every problem in sentences.

    What training starts from (adapter.start) matters no more to a run that is `resumed` from a checkpoint.
    """
    from trainer import families

    path = sources.resolve(config.model.source, say)
    family = sources.family_of(path, config.model.family)
    if config.adapter.start and not resumed:
        _check_start(config.adapter.start, family)
    native = families.get(family).native_resolution(path, config.model.prediction)
    return Prepared(config, path, family, plan.make(config, native, family, eyes=known and Known(known)))


class Again(Exception):
    """The run in `root` is to be resumed in a fresh process: the memory ran out in a way that spoils this one."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root


@contextlib.contextmanager
def _quick_turns() -> Iterator[None]:
    """Several threads work while a run starts: at each operation of torch one lets the others in, and would wait up to 5 ms to go on."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@_quick_turns()
def train(
    config: TrainConfig,
    root: Path,
    *,
    resume: bool = False,
    visits: int | None = None,
    show: Callable[[dict[str, Any]], None] = lambda event: None,
    stopping: Callable[[], bool] = lambda: False,
    afresh: bool = False,
) -> tuple[str, RunDir]:
    """Train in the folder `root`. Returns ("finished" or "stopped", the folder); `show` sees every event.

    `visits` gives a resumed run a new total length: one that had finished goes on past its end, at the learning rate that the
    schedule has there over the new total; the LoRA of the earlier end stays as NAME-<step>.safetensors. `stopping` is asked
    before each step. Where the GPU's memory runs out, the run goes on in the next smaller of trainer.memory.MODES; `afresh`: by raising
    Again where a failed capture may have spoilt this process.
    Raises ValueError with a sentence for anything that the user can mend; it also stands in the run's `failed` event.
    """
    pool = ThreadPoolExecutor(2)
    scanning = pool.submit(scan, config.data)  # it remembers good images; what is wrong `prepare` finds again
    imports.light(beside=lambda: pool.submit(warm_up, config.train.device))
    wait([scanning])
    pool.shutdown(wait=False)
    import torch

    from trainer.kernels import widened
    from trainer.processes import Processes, ends_when_told

    run, started = RunDir(root), time.time()
    hardware = choose(config.train.device, config.train.dtype, config.train.attention)
    processes = Processes(hardware.device)
    lock = Lock(run)
    if processes.main:
        run.create()
        with _writable(run):
            lock.acquire()
    step = 0  # the last that an event named
    emit: Callable[..., Any] = lambda type, **fields: None  # noqa: E731 (other processes than the first write nothing)
    interrupted = _on_interrupt(stopping)
    around = contextlib.ExitStack()
    try:
        if processes.main:
            with _writable(run):
                _check_folder(config, run, resume, visits)
                writer = events.Writer(run.events)

            def emit(type: str, **fields: Any) -> None:
                nonlocal step
                step = fields.get("step", step)
                show(writer(type, **fields))

            if resume:
                _answer_late(run, True, emit, step)
            _keep_awake(around)
        if processes.size > 1:

            def give_up() -> None:
                emit("failed", step=step, seconds=round(time.time() - started, 1), text=STUCK)

            around.enter_context(ends_when_told(give_up))
        processes.barrier()
        try:
            room = _Room(config, run if resume else None)
            room.choice = processes.agree(room.choice)
            while True:
                try:
                    with widened.where_needed(hardware.device, hardware.dtype), _beside(hardware.device) as beside:
                        outcome, step = _train(config, run, hardware, processes, emit, resume, visits, interrupted, room, beside)
                    break
                except torch.OutOfMemoryError:
                    if processes.size > 1 or not room.shrink(emit):
                        raise
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize(hardware.device)  # before the memory of its graphs is unmapped
                gc.collect()  # what the attempt held goes with its frames, which are free only now
                torch.cuda.empty_cache()
                if afresh and room.spoilt:
                    raise Again(run.root)
                resume, visits = True, None
        except Again:
            raise
        except Exception as error:
            text = _explain(error)
            with contextlib.suppress(OSError):  # on a full disk the log cannot grow either; what is raised says it all
                _answer_late(run, processes.main, emit, step)
                emit("failed", step=step, seconds=round(time.time() - started, 1), text=text or f"{type(error).__name__}: {error}")
            if text:
                raise RunError(text) from error
            raise
        _answer_late(run, processes.main, emit, step)
        emit(outcome, step=step, seconds=round(time.time() - started, 1))
        processes.leave()
        return outcome, run
    finally:
        with contextlib.suppress(Exception):  # as _keep_awake
            around.close()
        interrupted.restore()
        lock.release()


def _beside(device: str) -> ThreadPoolExecutor:
    """A thread for what goes on beside the rest, on the same GPU: each thread has one that is current, at first the first."""
    import torch

    if device.startswith("cuda"):
        return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
    return ThreadPoolExecutor(1)


class _Room:
    """How a run keeps within the GPU's memory, from one attempt to the next.

    Attributes:
        choice: that of the current attempt; None until `settle`; why: in a sentence. done: steps that a resumable checkpoint holds, of those made.
        spoilt: whether the memory ran out while a graph was captured.
    """

    def __init__(self, config: TrainConfig, resumed: RunDir | None) -> None:
        self.config, self.done, self.spoilt, self.why = config, 0, False, ""
        self.choice: memory.Choice | None = None
        self.rest: list[memory.Choice] = []
        if resumed:  # as it was, so that a resumed run computes as it would have
            told = [e for e in events.read(resumed.events) if e["type"] == "memory"]
            self.choice = memory.Choice(told[-1]["mode"], told[-1]["accumulation"]) if told else None

    def settle(self, need: memory.Need, free: float | None, emit: Callable[..., Any]) -> TrainConfig:
        """Choose for `free` GiB (None: no GPU) unless it is chosen; returns the configuration with the choice."""
        choices = memory.ladder(self.config, need.rows)
        if self.choice is None:
            self.choice = choices[0] if free is None else memory.choose(self.config, need, free)
            if free is not None and self.config.train.memory == "auto" and self.choice != choices[0]:
                emit("warning", text=f"{free:.1f} GiB of the GPU's memory are free, so the training goes {self.words()}.")
        if free is not None:
            self.choice = memory.settle(self.config, need, self.choice, free)
            about = memory.training(self.config, need, self.choice)
            self.why = f"Training {self.words()}: about {about:.1f} of the {free:.1f} GiB that are free on the GPU."
        own = self._rank(self.choice)
        self.rest = [c for c in choices if self._rank(c) > own]
        more = {"memory": self.choice.mode, "accumulation": self.choice.accumulation}
        return self.config.model_copy(update={"train": self.config.train.model_copy(update=more)})

    @staticmethod
    def _rank(choice: memory.Choice) -> tuple[int, int]:
        return list(memory.MODES).index(choice.mode), choice.accumulation

    def shrink(self, emit: Callable[..., Any]) -> bool:
        """Take the next smaller choice and say so; False where there is none."""
        if not self.rest:
            return False
        self.choice = self.rest[0]
        emit("warning", text=f"The GPU's memory ran out after step {self.done}. The run goes on {self.words()}.")
        emit("memory", mode=self.choice.mode, accumulation=self.choice.accumulation)
        return True

    def words(self) -> str:
        assert self.choice is not None
        cut = (
            f", its batches cut into {self.choice.accumulation} parts" if self.choice.accumulation > self.config.train.accumulation else ""
        )
        return memory.MODES[self.choice.mode].title + cut


def _train(
    config: TrainConfig,
    run: RunDir,
    hardware: Hardware,
    processes: Any,
    emit: Callable[..., Any],
    resume: bool,
    visits: int | None,
    interrupted: Callable[[], bool],
    room: _Room,
    beside: ThreadPoolExecutor,
) -> tuple[str, int]:
    import torch

    started = time.time()
    if hardware.warning:
        emit("warning", text=hardware.warning)
    device = processes.device if processes.size > 1 else torch.device(hardware.device)

    # 1. the data, and the run on paper
    emit("stage", name="loading")
    last = run.last_checkpoint() if resume else None
    room.done = start = last[0] if last else 0
    ready = prepare(config, lambda text: emit("warning", text=text), resumed=last is not None, known=run.images)
    seen = [(i.digest, i.caption, i.mask_digest) for i in ready.plan.images + ready.plan.held_out]
    ours = config.model_dump(
        include={"dataset", "adapter", "part", "optimizer", "schedule", "loss", "train"}, exclude={"adapter": {"start"}}
    )
    processes.check_alike({"settings": ours, "images and captions": seen, "checkpoints": start})
    for text in ready.plan.warnings:
        emit("warning", text=text)
    cap(device)
    need = _need(ready, hardware.dtype, device, processes.size)
    config = room.settle(need, processes.agree(free_gib(device)), emit)
    mode = memory.MODES[config.train.memory]
    now = course.Course(config, ready.plan)
    told = processes.agree(course.changes(events.read(run.events)) if resume and processes.main else [])
    longer = [{"step": start, "visits": visits}] if visits else []
    plans, late = [], []  # the plans as they followed each other; the changes that readers must hear of (again)
    for change in told + longer:
        said = now.change(**change | {"step": min(change["step"], start)})
        if "visits" in change:
            plans.append(now.plan)
        if change["step"] > start or change in longer:
            late.append(said)
    total = now.total
    emit(
        "started",
        name=config.output.name,
        total=total,
        images=len(ready.plan.images),
        buckets=[[w, h, n] for (w, h), n in ready.plan.buckets().items()],
        device=hardware.name,
        dtype=hardware.dtype,
        reasons=[*hardware.reasons, *([room.why] if room.why else [])],
        family=ready.family,
        resolution=ready.plan.resolution,
        visits=now.config.train.visits,
        batch_size=config.train.batch_size,
        schedule=plan.describe_schedule(config, ready.family),
    )
    emit("memory", mode=config.train.memory, accumulation=config.train.accumulation)

    # 2. the base, frozen (these imports take seconds: only now)
    from trainer import adapters, bases, capture, checkpoints, families, lean, optimizers, preview, tape, validation
    from trainer.data.cache import Cache
    from trainer.data.store import Store
    from trainer.formats import kohya
    from trainer.formats.export import export
    from trainer.loop import Diverged, Hooks, fit
    from trainer.pace import Pace
    from trainer.pace import limit as limit_of
    from trainer.step import Step

    if config.train.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
    dtype = torch_dtype(hardware.dtype)
    family = families.get(ready.family)
    models = bases.load(ready.source, family, dtype, device, config.model, config.train.attention, mode.bits, room.choice.parked, beside)
    models.windows, models.weighted = config.dataset.text_windows, config.dataset.prompt_weights
    for text in models.notes:
        emit("warning", text=text)
    parts = {name: getattr(config.part, name) for name in family.parts}
    targets = {name: family.targets(models, name, config.adapter.targets) for name, part in parts.items() if part.train}
    trained = {name: parts[name] for name, paths in targets.items() if paths}
    stops = {name: plan.stop_step(part.stop, total) for name, part in trained.items()}
    if max(stops.values(), default=0) < total:
        raise ValueError(
            f"adapter.targets is {list(config.adapter.targets)}, which no part has that is trained to the end of the run. "
            "Add attention, or set that part's stop to 1."
        )

    # 3. latents and text, once
    emit("stage", name="encoding")
    cache = Cache.of_the_user(lambda text: emit("warning", text=text), events.Progress(emit))
    store = Store(config, ready.plan, family, models, trained, cache)
    for laid in plans:
        store.extend(laid)
    models.arrive()
    if models.prediction == "unknown":
        emit("warning", text=bases.measure(ready.source, family, models, store.some_latents()))
    measures = _measures(config, ready.plan, store, trained, validation) if config.validation.enabled else {}
    if processes.main:
        cache.prune()
    previews = preview.Previews(config, family, models, trained, next(iter(ready.plan.buckets())), run, lambda t: emit("warning", text=t))
    if processes.main:
        previews.read(now.prompts)
    parking = beside.submit(models.park, "vae", *(p for p in models.text if p not in store.text.live))  # while the adapter is made
    if "unet" in models.parked:  # there is not room for all of them
        parking.result()
    models.fetch("unet", *store.text.live)

    # 4. what is trained
    layers = kohya.layers(models.parts)
    wanted = {name: targets[name] for name in trained}
    ranks = last and checkpoints.ranks(last[1])
    deltas = None if last or not config.adapter.start else list(_read_start(config.adapter.start))
    adapter = adapters.build(config.adapter, models.parts, wanted, config.train.seed, ranks or (deltas and adapters.ranks_of(deltas)))
    if deltas is not None:
        _start(adapter, config.adapter.start, deltas)
    adapter.train(True)
    for text in adapter.notes:
        emit("warning", text=text)
    lean.recompute(models.parts["unet"], mode.again, keep_random=config.adapter.dropout > 0)
    groups = [
        {"params": params, "lr": trained[name].learning_rate * rate, "part": name}
        for name in trained
        for rate, params in adapter.groups(name)
    ]
    optimizer = optimizers.build(config.optimizer, groups, device)
    reduce = processes.reduce if processes.size > 1 else None
    step = Step(config, family, models, adapter, optimizer, stops, reduce, fp16=hardware.dtype == "fp16")
    parking.result()
    reason = capture.why_not(step)
    runner = capture.Captured(step) if not reason else step if tape.why_not(step, len(ready.plan.steps)) else tape.Taped(step)
    previews.adapter, previews.sampler.room = adapter, getattr(runner, "release", None)
    objects = {"adapter": adapter, "optimizer": checkpoints.OptimizerState(optimizer)} | ({"loss_scale": step.scale} if step.scale else {})
    if last:
        checkpoints.load_checkpoint(last[1], objects)
    if resume:
        emit("resumed", step=start)
    for change in late:
        emit("changed", **change)

    # 5. what happens beside the steps
    def do_preview(n: int) -> None:
        if not processes.main:
            return
        try:
            emit("preview", step=n, images=previews.make(now.prompts, n), prompts=list(now.prompts))
        except torch.OutOfMemoryError:
            emit("warning", text=f"The GPU's memory is too full for sample images after step {n}. The training goes on without them.")

    def do_look(n: int) -> None:
        if processes.main and previews.due(n, now.total):
            do_preview(n)

    def do_validate(n: int) -> None:
        if measures and processes.main:
            losses = {kind: round(m.measure(adapter), 6) for kind, m in measures.items()}
            emit("validation", step=n, train=losses["train"], held_out=losses.get("held_out"))

    def do_checkpoint(n: int) -> None:
        if processes.main:
            if not torch.stack([t.isfinite().all() for t in adapter.state().values()]).all():
                raise Diverged(f"The weights are not numbers any more after step {n}.")  # the older checkpoints stay
            path = checkpoints.save_checkpoint(run, n, objects, config.output.keep_checkpoints)
            emit("checkpoint", step=n, file=path.relative_to(run.root).as_posix())

    def do_export(n: int, final: bool = False) -> None:
        if processes.main:
            target = run.lora(config.output.name, None if final else n)
            deltas = list(adapter.deltas())
            pictured = sorted(run.previews.glob("step-*-1.png"))
            done = export(
                target,
                deltas,
                family=family.name,
                naming=config.output.naming,
                dtype=config.output.dtype,
                facts=_facts(now.config, ready, models, trained, deltas, n, started),
                layers=layers,
                picture=pictured[-1] if pictured else None,
                thumbnail=config.output.thumbnail,
                sidecars=config.output.sidecars,
            )
            for note in done.notes:
                emit("warning", text=note)
            more = {"also": [path.name for path in done.also], "tools": list(done.vouched)}
            emit("exported", step=n, file=target.name, bytes=done.bytes, modules=done.modules, final=final, **more)

    def do_change(n: int, change: dict[str, Any]) -> None:
        said = now.change(n, **change)
        if "visits" in change:
            store.extend(now.plan)
            step.stops = {name: plan.stop_step(part.stop, now.total) for name, part in trained.items()}
        emit("changed", **said)

    # 6. train
    emit("stage", name="training")
    if start == 0:
        do_validate(0)
        if config.preview.enabled:
            do_preview(0)
    hooks = Hooks(do_validate, do_preview, do_look, do_checkpoint, do_export, do_change)
    if reason and device.type == "cuda":
        emit("warning", text=f"The steps run without CUDA graphs, which is slower: {reason}.")
    previews.begin(start)
    t = memory.TABLES[need.table]
    limit = limit_of(device, t.tflop * need.rows * need.pixels / t.native**2, hardware.dtype)
    try:
        outcome, n = fit(now, store, step, runner.run, processes, run, emit, hooks, Pace(start, limit), start, interrupted)
    except torch.OutOfMemoryError:
        room.done, room.spoilt = step.done, getattr(runner, "capturing", False)
        if processes.main and (room.spoilt or not step.updating):  # while a graph is captured, nothing is computed
            do_checkpoint(step.done)
        raise

    # 7. keep it
    emit("stage", name="exporting")
    if not run.checkpoint(n).exists():
        do_checkpoint(n)
    if outcome == "finished" and processes.main:
        _keep_earlier(run, config.output.name, n, emit)
    shown = outcome == "finished" and config.preview.enabled
    if shown and (config.output.thumbnail or "png" in config.output.sidecars):
        do_preview(n)
        shown = False
    do_export(n, final=outcome == "finished")
    if outcome == "finished":
        do_validate(n)
        if shown:
            do_preview(n)
    processes.barrier()
    return outcome, n


def _need(ready: Prepared, dtype: str, device: Any, processes: int) -> memory.Need:
    from trainer.formats import single_file

    table = "demo" if ready.source == sources.DEMO else probe.identify(ready.source).variant or ready.family
    rows = -(-max(map(len, ready.plan.steps)) // processes)
    t5 = ready.family == "sd3" and single_file.uses_t5(ready.source, ready.config.model.text_encoders, ready.config.model.t5)
    table = table if table in memory.TABLES else "sd35_medium"
    return memory.Need(table, max(w * h for w, h in ready.plan.buckets()), dtype, rows, device.type == "cpu", t5)


def _measures(config: TrainConfig, laid: plan.Plan, store: Any, trained: Container[str], validation: Any) -> dict[str, Any]:
    """The fixed losses of a run: over training images (evenly chosen when there are many) and over the held-out ones."""
    out = {}
    for kind, images, placements in (("train", laid.images, laid.placements), ("held_out", laid.held_out, laid.held_out_placements)):
        if images:
            subject = [k for k, i in enumerate(images) if config.data[i.source].kind != "prior"]
            limit = min(len(subject), config.validation.images) if kind == "train" else len(subject)
            chosen = sorted(randomness.host(config.train.seed, 0, "validation images").sample(subject, limit))
            out[kind] = validation.FixedLoss(
                store.family,
                store.models,
                [images[k] for k in chosen],
                [placements[k] for k in chosen],
                background=config.dataset.background,
                draws=config.validation.draws,
                seed=config.train.seed,
                trained=trained,
                latents=[store.mean(k) for k in chosen] if kind == "train" else None,
                cache=store.cache,
            )
    return out


def _facts(
    config: TrainConfig, ready: Prepared, models: Any, trained: dict[str, Any], deltas: list[Any], steps: int, started: float
) -> Any:
    """What the exported file's metadata says of the run."""
    from trainer.formats.metadata import Facts, Folder

    folders = [
        Folder(d.folder.name, len(captions), plan.visits(config, d), captions)
        for k, d in enumerate(config.data)
        if d.kind == "train" and (captions := tuple(i.caption for i in ready.plan.images if i.source == k))
    ]
    return Facts(
        base=config.model.source if ready.source != sources.DEMO else "LoRA Atelier demo base",
        rank=max(len(d.tensors["down"]) for d in deltas) if config.adapter.start else config.adapter.rank,
        alpha=config.adapter.alpha,
        prediction=models.prediction,
        zero_terminal_snr=models.scheduler.get("rescale_betas_zero_snr"),
        clip_skip=models.clip_skip if models.clip_skip > 1 else None,
        conv_rank=config.adapter.conv_rank if "convolutions" in config.adapter.targets else None,
        conv_alpha=config.adapter.conv_alpha if "convolutions" in config.adapter.targets else None,
        learning_rates={name: part.learning_rate for name, part in trained.items()},
        steps=steps,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        optimizer=config.optimizer.kind,
        scheduler=config.schedule.kind,
        resolution=ready.plan.resolution,
        folders=tuple(folders),
        buckets=ready.plan.buckets(),
        trigger_words=tuple(dict.fromkeys(d.trigger for d in config.data if d.trigger)),
        title=config.output.title,
        author=config.output.author,
        description=config.output.description,
        license=config.output.license,
        started_at=started,
        finished_at=time.time(),
    )


def _check_start(path: Path, family: str) -> None:
    """Raise ValueError where adapter.start is no LoRA for this family."""
    try:
        found = probe.identify(path)
    except ValueError as error:
        raise ValueError(f"adapter.start is {path}: {error}") from None
    if found.kind != "lora":
        raise ValueError(f"adapter.start is {path}, which is {found.what}. Give a LoRA file, or leave it empty.")
    if found.family not in (None, family):
        raise ValueError(f"adapter.start is {path}, which is {found.what}; the base is {family}. Give a LoRA that was trained for it.")


def _read_start(path: Path) -> Any:
    """The layers of the LoRA file at `path`. Raises ValueError for one that cannot be read as a plain LoRA."""
    from trainer.tools.inspect import read_lora

    try:
        return read_lora(path)[1]
    except ValueError as error:
        raise ValueError(f"adapter.start is {path}: {error}") from None


def _start(adapter: Any, path: Path, deltas: Any) -> None:
    """Give a fresh adapter the effect of the `deltas` of a LoRA file. Raises ValueError where they do not fit."""
    try:
        adapter.start(deltas)
    except ValueError as error:
        raise ValueError(f"adapter.start is {path}: {error}") from None


def _keep_earlier(run: RunDir, name: str, step: int, emit: Callable[..., Any]) -> None:
    """Keep the LoRA of an earlier end under the name of its step before that of `step` takes its place."""
    ends = [e for e in events.read(run.events) if e["type"] == "exported" and e["final"] and e["step"] != step]
    kept = run.lora(name, ends[-1]["step"]) if ends else None
    if kept is None or kept.exists() or not run.lora(name).exists():
        return
    ended = run.lora(name)
    also = []
    for source in (ended, *(ended.with_name(file) for file in ends[-1].get("also", [f"{name}.json"]))):
        if source.exists():
            target = source.with_name(kept.stem + source.name.removeprefix(ended.stem))
            write_atomic(target, source.read_bytes(), "the LoRA of the earlier end")
            also.append(target.name)
    size, modules = kept.stat().st_size, ends[-1]["modules"]
    emit("exported", step=ends[-1]["step"], file=kept.name, also=also[1:], bytes=size, modules=modules, final=False)


def _keep_awake(stack: contextlib.ExitStack) -> None:
    """Keep the computer from sleeping until `stack` is closed, where the system lets us."""
    from wakepy import keep

    try:
        stack.enter_context(keep.running(on_fail="pass"))
    except Exception:  # whatever a desktop's services answer: training does not depend on it
        stack.close()


def _answer_late(run: RunDir, main: bool, emit: Callable[..., Any], step: int) -> None:
    """Answer the requests that an ended run did not get to: a second "stop", or one before a crash, must not end the resumed run."""
    for request in control.take(run) if main else ():
        emit("answered", request=request.kind, id=request.id, step=step, detail="too late: the run was ending or had ended")


def _check_folder(config: TrainConfig, run: RunDir, resume: bool, visits: int | None) -> None:
    """Write config.json and versions.json into a new folder, or make sure that a resumed one was made with the same settings."""
    if resume:
        if not run.config.exists():
            raise RunError(f"There is no run to resume in {run.root}: config.json is missing. Start it without --resume.")
        try:
            kept = TrainConfig.model_validate_json(run.config.read_text(encoding="utf-8"))
        except ValueError:  # torn, edited, or of another version
            raise RunError(f"{run.config} cannot be read as this version's settings, so the run cannot be resumed. Start anew.") from None
        mine, theirs = (json.loads(c.model_dump_json(exclude=MAY_DIFFER)) for c in (config, kept))
        for section, values in mine.items():
            if values != theirs[section]:
                raise RunError(
                    f"The run in {run.root} was made with other settings in [{section}], so it cannot be resumed with these. "
                    "Resume with its own config.json (train --run-dir DIR --resume), or start anew in another folder."
                )
        _check_end(config, run, visits)
        for left in (*run.root.rglob(".*.tmp"), *run.root.rglob(".*.part")):  # of a process that was killed while it wrote
            left.unlink()
    elif any(e["type"] in ("step", "checkpoint", "exported") for e in events.read(run.events)):
        raise RunError(f"{run.root} already holds a run. Add --resume to go on with it, or choose another --run-dir.")
    else:
        run.events.unlink(missing_ok=True)  # of a run that failed before its first step: mended settings may start in its folder
    write_json(run.config, config.model_dump(mode="json"))
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow")
    write_json(run.versions, {name: imports.version(name) for name in names})


def _check_end(config: TrainConfig, run: RunDir, visits: int | None) -> None:
    """Raise RunError for a finished run that has nothing left to do."""
    seen = list(events.read(run.events))
    if not seen or seen[-1]["type"] != "finished" or not run.lora(config.output.name).exists():
        return
    had = next((c["visits"] for c in reversed(course.changes(seen)) if "visits" in c), config.train.visits)
    if visits is None or visits <= had:
        asked = "" if visits is None else f"; visits is {visits}"
        raise RunError(
            f"The run in {run.root} is finished: it has made its {had} visits{asked}. To train it further, resume it with a greater "
            f"total length, such as --resume --visits {had + max(1, had // 2)}."
        )


@contextlib.contextmanager
def _writable(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"The run folder {run.root} cannot be written to: {error.strerror}. Choose another with --run-dir.") from None


class _on_interrupt:
    """Ctrl-C (and a polite kill) asks the run to end after its step; a second one ends it at once."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.asked, self.before, self.stopping = False, {}, stopping
        for kind in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[kind] = signal.signal(kind, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                break

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        return self.asked or self.stopping()

    def restore(self) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


def _explain(error: Exception) -> str | None:
    """A sentence for an error that the user can mend, None for one that is ours."""
    import torch

    from trainer.loop import Diverged

    if type(error) is ValueError or (isinstance(error, ValueError) and type(error).__module__.startswith("trainer")):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full. Free some space, then run again with --resume."
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and re.search(r"gloo|NCCL", str(error))):
        return "Another process of this run ended or cannot be reached, so that it cannot go on. Run again with --resume."
    if isinstance(error, Diverged):
        return f"{error} Start anew with a lower learning rate, with train.max_grad_norm = 1, or with train.dtype = bf16 or fp32."
    if isinstance(error, torch.OutOfMemoryError):
        gc.collect()
        return (
            "The GPU's memory is full, even with everything that saves it. Lower dataset.resolution, train.batch_size or adapter.rank, or "
            "choose a smaller base; other programs may be using it too."
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "The computer's memory is full. Close other programs, or lower train.batch_size or dataset.resolution."
    return None
