"""python -m trainer train | batch | caption | mask | compare | generate | serve | inspect | convert | cache | bench | fits | probe"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


TOY = "model.source is not set, so the base is the built-in toy. For real pictures, set it to the model you make them with."


class Terminal:
    """A run's events as lines and a progress bar."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.total = 0
        self.said = 0.0

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def __call__(self, event: dict[str, Any]) -> None:
        from tqdm import tqdm

        kind = event["type"]
        if kind == "started":
            self.total = event["total"]
            self.say(f"{event['images']} images, {event['total']} steps, on {event['device']} in {event['dtype']}.")
        elif kind == "stage":
            names = {"loading": "Loading the base model ...", "encoding": "Encoding images and captions ..."}
            if event["name"] in names:
                self.say(names[event["name"]])
            if event["name"] == "training" and sys.stderr.isatty():
                layout = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps {postfix}"
                self.bar = tqdm(total=self.total, bar_format=layout, dynamic_ncols=True, mininterval=0)
        elif kind == "progress" and time.time() - self.said > 5:
            self.said = time.time()
            eta = timedelta(seconds=round(event["eta_s"]))
            self.say(f"Encoded {event['done']} of {event['total']} {event['what']}, {eta} left")
        elif kind == "step":
            left = "" if event["eta_s"] is None else f", {timedelta(seconds=round(event['eta_s']))} left"
            text = f"loss {event['loss']:.4f}, {event['images_per_s']:.2f} images/s{left}"
            if self.bar is not None:
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(event["step"] - self.bar.n)
            elif event["step"] in (1, self.total) or time.time() - self.said > 5:  # into a file or pipe: a line now and then
                self.said = time.time()
                self.say(f"Step {event['step']} of {self.total}: {text}")
        elif kind == "changed" and "visits" in event:
            self.total = event["total"]
            self.say(f"After step {event['step']} the run's length is {event['visits']} visits, {event['total']} steps.")
            if self.bar is not None:
                self.bar.total = self.total
        elif kind == "changed":
            self.say(f"After step {event['step']} the sample images show: {'; '.join(event['prompts'])}")
        elif kind == "resumed" and event["step"]:
            self.say(f"Resuming after step {event['step']}.")
        elif kind == "warning":
            self.say(f"Note: {event['text']}")
        elif kind == "validation":
            held = f", held out {event['held_out']:.4f}" if event["held_out"] is not None else ""
            self.say(f"Step {event['step']}: loss on fixed noise {event['train']:.4f}{held}")
        elif kind == "exported":
            modules = ", ".join(f"{n} {part} layers" for part, n in event["modules"].items())
            self.say(f"Saved {event['file']} ({event['bytes'] / 1e6:.1f} MB, {modules}), read back and checked.")
            if event["final"] and event.get("tools"):
                self.say(f"All of it is read by {', '.join(event['tools'])}.")
        if kind in ("finished", "stopped", "failed") and self.bar is not None:
            self.bar.close()
            self.bar = None


def _train(args: argparse.Namespace) -> int:
    from trainer import control, run
    from trainer.config.load import load
    from trainer.run_dir import RunDir, default_run_dir, restart

    path = args.config
    if path is None and args.run_dir and RunDir(args.run_dir).config.exists():
        path = RunDir(args.run_dir).config
    if path is None and not args.preset and not args.set:
        raise ValueError("Nothing to train: give a configuration file, or --preset and --set, or the --run-dir of a run to resume.")
    config = load(path, preset=args.preset, assignments=args.set)
    if args.visits is not None and not args.resume:
        raise ValueError(
            "--visits gives a run that is resumed a new length: add --resume and --run-dir, or set train.visits for a new run."
        )
    if args.visits is not None and not 1 <= args.visits <= control.MOST_VISITS:
        raise ValueError(f"--visits is {args.visits}; it must be from 1 to {control.MOST_VISITS}.")
    terminal = Terminal()
    if args.dry_run:
        return _dry_run(config, as_json=args.json, step=args.step)
    if "source" not in config.model.model_fields_set:
        print(f"Note: {TOY}")
    root = args.run_dir or default_run_dir(config.output.name)
    try:
        outcome, folder = run.train(config, root, resume=args.resume, visits=args.visits, show=terminal, afresh=True)
    except run.Again:
        return restart("-m", "trainer", "train", "--run-dir", str(root), "--resume")
    if not terminal.total:  # of several processes, the first one speaks
        return 0
    if outcome == "stopped":
        print(f"Stopped. Go on with: python launch.py train --run-dir {json.dumps(str(folder.root))} --resume")
        return 130
    print(f"Finished: {folder.lora(config.output.name)}")
    return 0


def _dry_run(config: Any, as_json: bool, step: int | None) -> int:
    from trainer import families, imports, plan, run
    from trainer.hardware import choose

    imports.light()
    hardware = choose(config.train.device, config.train.dtype, config.train.attention)
    ready = run.prepare(config, lambda text: print(text, file=sys.stderr))  # stdout may be JSON
    laid, total = ready.plan, len(ready.plan.steps)
    counted = families.get(ready.family).count(ready.source, config.adapter)
    parts = {
        name: {"layers": layers, "parameters": size, "learning_rate": part.learning_rate, "steps": plan.stop_step(part.stop, total)}
        for name, (layers, size) in counted.items()
        if (part := getattr(config.part, name)).train
    }
    found = {
        "base": str(ready.source),
        "family": ready.family,
        "images": len(ready.plan.images),
        "held_out": len(ready.plan.held_out),
        "buckets": [[w, h, n] for (w, h), n in ready.plan.buckets().items()],
        "cropped": {i.path.name: round(1 - p.kept, 3) for i, p in zip(laid.images, laid.placements, strict=True) if p.kept < 0.995},
        "steps": total,
        "visits": sum(len(rows) for rows in ready.plan.steps) / len(ready.plan.images),
        "captions": len(ready.plan.captions),
        "parts": parts,
        "device": hardware.name,
        "dtype": hardware.dtype,
        "reasons": hardware.reasons,
        "warnings": [*([hardware.warning] if hardware.warning else []), *ready.plan.warnings],
        "prompts": plan.preview_prompts(config, ready.plan.images),
    }
    if step is not None:
        found["step"] = [row | {"file": str(row["file"])} for row in plan.seen(laid, config, step)]
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    if hardware.warning:
        print(f"Note: {hardware.warning}")
    if "source" not in config.model.model_fields_set:
        print(f"Note: {TOY}")
    print(f"Base      {found['base']} ({found['family']})")
    print(f"Images    {found['images']} to train, {found['held_out']} held out")
    for w, h, n in found["buckets"]:
        print(f"  bucket  {w} x {h}: {n}")
    for name, share in found["cropped"].items():
        print(f"  crop    {name} loses {share:.0%}")
    seen = f"{found['visits']:.4g} visits to each image, {len(ready.plan.captions)} captions"
    print(f"Steps     {total} of up to {config.train.batch_size} images, {seen}")
    for name, part in parts.items():
        print(
            f"Part      {name}: {part['layers']} layers, {part['parameters']:,} parameters, learning rate {part['learning_rate']:g}, "
            f"{part['steps']} steps"
        )
    print(f"Device    {hardware.name}, {hardware.dtype}, {hardware.attention}")
    for reason in hardware.reasons:
        print(f"  {reason}")
    for text in ready.plan.warnings:
        print(f"Note: {text}")
    for row in found.get("step", ()):
        how = "".join(words for words, is_so in ((", mirrored", row["mirrored"]), (", masked", row["masked"])) if is_so)
        print(f"Step {step:<4} {row['file']}{how}: {row['caption'] or '(no caption)'}")
    return 0


def _measure(args: argparse.Namespace) -> int:
    from trainer.config.load import load
    from trainer.measure import measure

    def show(event: dict[str, Any]) -> None:
        if event["type"] == "measured":
            print(
                f"{event['seconds_per_step']:.3g} s a step, {event['images_per_s']:.3g} images/s, {event['memory_gib']:.2f} GiB on "
                f"{event['device']}; {event['start_seconds']:.0f} s until the first step."
            )

    return 0 if measure(load(args.config), args.run_dir, show) == "finished" else 130


def _probe(args: argparse.Namespace) -> int:
    from trainer.hardware import probe

    print(json.dumps(probe(), indent=1, ensure_ascii=False))
    return 0


def _fits(args: argparse.Namespace) -> int:
    from trainer import memory

    if args.gib is None:
        print(memory.table_of_cards())
        return 0
    for (base, side), fit in zip(memory.BASES.values(), memory.fits(args.gib), strict=True):
        how = f"{memory.MODES[fit.mode].title}, about {fit.gib:.1f} GiB, a step {fit.cost:.1f} x as long" if fit else "does not fit"
        print(f"{base} at {side} px: {how}")
    return 0


def _cache(args: argparse.Namespace) -> int:
    from trainer.data import cache

    folder = cache.default_folder()
    if folder is None:
        print(f"Encoded images are not kept: {cache.ENVIRONMENT} is {cache.OFF}.")
        return 0
    if args.clear:
        cache.clear(folder)
    found = cache.entries(folder)
    size = sum(size for _, size, _ in found) / 1e6
    print(f"{folder}: {len(found)} files, {size:.1f} MB of at most {cache.LIMIT / 1e6:.0f} MB")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from trainer.tools.inspect import format_text, inspect

    found = inspect(args.file)
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else format_text(found, args.file.name))
    return 0 if args.file.exists() else 1


def _convert(args: argparse.Namespace) -> int:
    from trainer.tools.convert import convert, target_of

    target = args.out or target_of(args.file, args.to)
    for text in convert(args.file, target, args.to):
        print(f"Note: {text}")
    print(f"Saved {target}, read back and checked.")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from trainer.generate import generate

    for path in generate(
        args.base, args.prompt, lora=args.lora, strength=args.strength, seed=args.seed, steps=args.steps, guidance=args.guidance,
        negative=args.negative, size=(args.width, args.height), out=args.out, device=args.device,
    ):  # fmt: skip
        print(path)
    return 0


def _tell(event: dict[str, Any]) -> None:
    """A job's event as a line."""
    kind = event["type"]
    if kind == "started":
        print(f"{event['total']} to do, on {event['device']} in {event['dtype']}.", flush=True)
    elif kind == "masked":
        said = f"{event['area']:.0%} of it" if event["area"] else "nothing like it found"
        print(f"{event['done']} of {event['total']}: {event['file']}: {said}", flush=True)
    elif kind in ("captioned", "picture", "scored") and "done" in event:
        print(f"{event['done']} of {event['total']}: {event['file']}{': ' + event['text'] if 'text' in event else ''}", flush=True)
    elif kind == "picture":
        print(f"{event['id']}: {event['with'] or event['without']}", flush=True)
    elif "text" in event and kind != "failed":
        print(f"Note: {event['text']}", flush=True)


def _end(outcome: str) -> int:
    """The exit code of a job. One that was stopped leaves at once: a download may still be under way in a thread."""
    from trainer.job import leave

    if outcome == "stopped":
        leave(130)
    return 0


def _caption(args: argparse.Namespace) -> int:
    from trainer.captioners import job

    settings = {key: value for key in ("source", "max_tokens", "batch") if (value := getattr(args, key)) is not None}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set is {text!r}; it must be NAME=VALUE, like general=0.4.")
        settings[name] = value
    folder = args.run_dir or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-caption"
    names = ("captioner", "only_missing", "add", "only", "purpose", "trigger", "class_word", "device")
    outcome = job.caption(args.folder, folder, settings=settings, show=_tell, **{name: getattr(args, name) for name in names})
    print(f"Captions that were there before: {folder / 'backup'}" if (folder / "backup").exists() else "No caption was written over.")
    return _end(outcome)


def _mask(args: argparse.Namespace) -> int:
    from trainer.maskers import job

    settings = {key: value for key, value in {"source": args.source, "batch": args.batch}.items() if value is not None}
    folder = args.run_dir or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-mask"
    more = {"only_missing": args.only_missing, "device": args.device}
    outcome = job.mask(args.folder, folder, args.prompt, settings=settings, show=_tell, **more)
    print(f"Masks that were there before: {folder / 'backup'}" if (folder / "backup").exists() else "No mask was written over.")
    return _end(outcome)


def _batch(args: argparse.Namespace) -> int:
    from trainer.batch import batch, free, job

    if args.run_dir:
        return _end(job(args.source, args.step, args.run_dir, args.device, _tell))
    out = free(args.out or Path(f"batch-{args.step}.png"))
    for row in batch(args.source, args.step, out, args.device, lambda text: print(text, file=sys.stderr)):
        how = "".join(words for words, is_so in ((", mirrored", row["mirrored"]), (", masked", row["masked"])) if is_so)
        print(f"{row['file']}{how}: {row['caption'] or '(no caption)'}")
    print(out)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from trainer.compare import compare

    outcome = compare(args.run_dir, device=args.device, show=_tell)
    results = args.run_dir / "results" / "results.json"
    if outcome == "finished":
        found = json.loads(results.read_text(encoding="utf-8"))
        print(f"Recommended: {found['recommended']['file']}. {found['recommended']['why']}")
        for hint in found["hints"]:
            print(hint)
        print(results)
    return _end(outcome)


def _serve(args: argparse.Namespace) -> int:
    from trainer.serve import serve

    return _end(serve(args.run_dir, idle=args.idle, device=args.device, show=_tell))


def _bench(args: argparse.Namespace) -> int:
    from trainer.bench import report, scaling, sides
    from trainer.bench.case import Case

    if args.processes is not None and (args.compare or args.only):
        raise ValueError(f"--processes times no reference: leave {'--compare' if args.compare else '--only'} out.")
    old = report.read(args.compare) if args.compare else None
    given = {k: getattr(args, k) for k in ("model", "size", "batch", "rank", "te", "dtype", "device", "steps", "checkpointing", "previews")}
    case = Case(**given, targets=tuple(dict.fromkeys(args.targets)), assignments=tuple(args.set))
    say = functools.partial(print, file=sys.stderr, flush=True)
    if args.processes is None:
        found = sides.bench(case, args.work, args.only, say)
    else:
        found = scaling.scaling(case, args.processes, args.work, say)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(report.text(found) if args.processes is None else scaling.text(found))
    if old:
        print("\n" + report.compare(found, old))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m trainer", description="Train, try, inspect and convert LoRAs.")
    commands = top.add_subparsers(dest="command", required=True)

    p = commands.add_parser("train", help="train a LoRA from a configuration file")
    p.add_argument("config", nargs="?", type=Path, help=".toml or .json file; see README")
    p.add_argument("--preset", help="settings to start from, like sd1/balanced (the file's own settings win)")
    p.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting; may be repeated")
    p.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/DATE-NAME)")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --run-dir")
    p.add_argument("--visits", type=int, help="with --resume: the run's new total length; one that had finished is trained further")
    p.add_argument("--dry-run", action="store_true", help="show what would be done, train nothing")
    p.add_argument("--step", type=int, metavar="N", help="with --dry-run: also what step N will see: images, mirrored or not, and captions")
    p.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    p.set_defaults(call=_train)

    p = commands.add_parser("measure", help="make about ten steps of a run, to know its seconds and memory")
    p.add_argument("config", type=Path, help="as for train")
    p.add_argument("--run-dir", type=Path, required=True, help="folder for what is found")
    p.set_defaults(call=_measure)

    p = commands.add_parser("generate", help="make pictures with a base and a LoRA")
    p.add_argument("prompt", nargs="+")
    p.add_argument("--base", default="demo", help="as model.source")
    p.add_argument("--lora", type=Path)
    p.add_argument("--strength", type=float, default=1.0)
    p.add_argument("--negative", default="")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=7.0)
    p.add_argument("--width", type=int)
    p.add_argument("--height", type=int)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures")
    p.set_defaults(call=_generate)

    p = commands.add_parser("caption", help="write a caption beside each image of a folder")
    p.add_argument("folder", type=Path)
    p.add_argument("--captioner", choices=("auto", "blip", "florence", "qwen", "wd"), default="auto", help="default: by --source, or blip")
    p.add_argument("--source", help="hub id or folder of the captioner's model (default: its own)")
    p.add_argument(
        "--purpose", choices=("character", "style", "object"), default="", help="what the LoRA is for, for captioners with a prompt"
    )
    p.add_argument("--class-word", default="", metavar="WORD", help="what the subject is called in captions: cat, woman, chair")
    p.add_argument("--trigger", default="", metavar="WORD", help="goes first in each caption")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the captioner, as its Config names it")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--only-missing", action="store_true", help="leave the images alone that have a caption")
    which.add_argument("--add", action="store_true", help="write behind the caption that is there what it lacks")
    p.add_argument("--only", action="append", default=[], metavar="FILE", help="this image of the folder alone; may be repeated")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest caption, in tokens")
    p.add_argument("--batch", type=int, metavar="N", help="images at once")
    p.add_argument("--device", default="auto")
    p.add_argument("--run-dir", type=Path, help="folder of the job, for its events and backups (default: runs/DATE-caption)")
    p.set_defaults(call=_caption)

    p = commands.add_parser("mask", help="write a mask beside each image of a folder: where it shows what words say")
    p.add_argument("folder", type=Path)
    p.add_argument("--prompt", required=True, metavar="WORDS", help="what is to be learned, like cat or a person")
    p.add_argument("--source", help="hub id or folder of a CLIPSeg model (default: CIDAS/clipseg-rd64-refined)")
    p.add_argument("--only-missing", action="store_true", help="leave the images alone that have a mask")
    p.add_argument("--batch", type=int, metavar="N", help="images at once")
    p.add_argument("--device", default="auto")
    p.add_argument("--run-dir", type=Path, help="folder of the job, for its events and backups (default: runs/DATE-mask)")
    p.set_defaults(call=_mask)

    p = commands.add_parser("batch", help="show what a step is trained on: its images decoded from their latents, masks laid over them")
    p.add_argument("source", type=Path, help="folder of a run, or a configuration file")
    p.add_argument("--step", type=int, default=1, metavar="N")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, help="the picture (default: batch-N.png); where there is one, another name is taken")
    p.add_argument("--run-dir", type=Path, help="folder of the job, for the app: its events and the picture")
    p.set_defaults(call=_batch)

    p = commands.add_parser("compare", help="measure and draw what a run's LoRAs do, and recommend one")
    p.add_argument("run_dir", type=Path, help="folder of the run")
    p.add_argument("--device", default="auto")
    p.set_defaults(call=_compare)

    p = commands.add_parser("serve", help="keep a base loaded and make pictures on request (the app's playground)")
    p.add_argument("--run-dir", type=Path, required=True, help="folder of the job")
    p.add_argument("--idle", type=float, default=300, metavar="SECONDS", help="end after this long without a request")
    p.add_argument("--device", default="auto")
    p.set_defaults(call=_serve)

    p = commands.add_parser("inspect", help="say what a model or LoRA file is")
    p.add_argument("file", type=Path)
    p.add_argument("--json", action="store_true")
    p.set_defaults(call=_inspect)

    p = commands.add_parser("convert", help="rename a LoRA file's keys for other tools")
    p.add_argument("file", type=Path)
    p.add_argument("--to", choices=("kohya", "diffusers", "comfy"), required=True, help="whose names the layers get")
    p.add_argument("--out", type=Path, help="the new file (default: beside the old one)")
    p.set_defaults(call=_convert)

    p = commands.add_parser("cache", help="say where encoded images and captions are kept for the next run, and how much of them")
    p.add_argument("--clear", action="store_true", help="delete them")
    p.set_defaults(call=_cache)

    p = commands.add_parser("bench", help="time this trainer beside a plain diffusers + PEFT + accelerate loop, on random weights")
    p.add_argument("--model", choices=("demo", "sd15", "sd2", "sdxl", "sd35"), default="demo")
    p.add_argument("--size", type=int, default=0, metavar="PIXELS", help="side of the pictures (default: the model's own)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--te", action="store_true", help="train the text encoders too")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--steps", type=int, default=0, help="timed steps (default: 20; on a CPU 100 of the demo base, 8 of real models)")
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    kinds = ("attention", "feed_forward", "projections", "convolutions")
    p.add_argument("--targets", nargs="+", choices=kinds, default=["attention"], help="kinds of layers that get an adapter")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="a setting of our run alone")
    p.add_argument("--no-previews", dest="previews", action="store_false", help="time no sample images")
    p.add_argument("--only", choices=("ours", "reference"), help="time one side alone")
    p.add_argument("--processes", type=int, metavar="N", help="time N processes, a GPU each, against one, instead of the reference")
    p.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next time (default: a temporary folder)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="set the figures against those of an older --json")
    p.set_defaults(call=_bench)

    p = commands.add_parser("fits", help="which bases train in how much memory, and how: a table by card")
    p.add_argument("gib", nargs="?", type=float, help="free memory of a GPU in GiB, for this alone")
    p.set_defaults(call=_fits)

    p = commands.add_parser("probe", help="print this machine's hardware and versions as JSON")
    p.set_defaults(call=_probe)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.call(args)
    except KeyboardInterrupt:
        print("Stopped at once.", file=sys.stderr)
        return 130
    except ValueError as error:
        if type(error) is ValueError or type(error).__module__.startswith("trainer"):
            print(f"Error: {error}", file=sys.stderr)
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
