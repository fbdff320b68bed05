"""What a person may get wrong, through the command line: a sentence that helps, no traceback, and nothing lost."""

import errno
import io
import json
import os
import pickle
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer import events
from trainer.__main__ import main
from trainer.families.sources import DEMO
from trainer.run_dir import Lock, RunDir, RunError

SHORT = {"train.visits": 1}  # two steps


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """The sentences of an error, which end stderr."""
        assert self.code == 1 and "Traceback" not in self.err, self.err
        lines = self.err[self.err.index("Error: ") :].removeprefix("Error: ").splitlines()
        assert all(line == line.strip() and line[-1] in ".?)" and len(line) > 20 for line in lines), lines
        return lines


def contents(*roots: Path) -> dict[Path, bytes]:
    files = [p for root in roots for p in sorted(root.rglob("*")) if p.is_file()]
    out = {}
    for path in files:
        with open(path, "rb") as file:  # noqa: PTH123 (the builtin, which `deny` leaves alone)
            out[path] = file.read()
    return out


def failed(root: Path) -> list[str]:
    return [e["text"] for e in events.read(root / "events.jsonl") if e["type"] == "failed"]


@pytest.fixture
def mine(tmp_path, draw_pictures) -> Path:
    """What belongs to the user: mine/pictures with two images."""
    draw_pictures(tmp_path / "mine" / "pictures", [(64, 64)] * 2)
    return tmp_path / "mine"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def cli(mine, root, settings, capsys, one_thread):
    """cli(changes, *more): `train` on mine/pictures into `root`, in this process. mine/ must come out as it went in."""

    def go(changes: dict | None = None, *more: str, config: Path | None = None, run_dir: Path = root) -> Said:
        if config is None:
            config = mine / "config.json"
            config.write_text(
                json.dumps(settings({"data": [{"folder": "pictures", "trigger": "zorp"}], **(changes or {})})), encoding="utf-8"
            )
        before = contents(mine)
        code = main(["train", str(config), "--run-dir", str(run_dir), *more])
        assert contents(mine) == before
        return Said(code, *capsys.readouterr())

    return go


@pytest.fixture
def refused(cli, root):
    """refused(changes): the sentences of `train` and of `--dry-run`, which are the same, and stand in the `failed` event."""

    def go(changes: dict) -> list[str]:
        said = cli(changes, "--dry-run")
        assert not root.exists() and said.out == "" and said.err.startswith("Error: ")
        really = cli(changes)
        assert really.problems == said.problems and really.err == said.err
        assert failed(root) == ["\n".join(said.problems)]
        assert not list(root.glob("*.safetensors")) and not list((root / "checkpoints").iterdir())
        return said.problems

    return go


@pytest.fixture
def deny(monkeypatch):
    """deny(name): files of that name cannot be opened. Tests may run as root, who may read everything."""

    def go(name: str) -> None:
        really = io.open

        def refuse(file, *args, **options):
            if isinstance(file, (str, os.PathLike)) and Path(file).name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return really(file, *args, **options)

        monkeypatch.setattr(io, "open", refuse)

    return go


@contextmanager
def disk_full(root: Path, pattern: str) -> Iterator[None]:
    """No file that matches `pattern` below `root` can be brought to the disk."""
    really = os.fsync

    def fsync(fd: int) -> None:
        if list(root.glob(pattern)):
            raise OSError(errno.ENOSPC, "No space left on device")
        really(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


# Images


def huge_png(path: Path, side: int) -> None:
    """A PNG whose header promises a square of `side`, with nothing in it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


def half_a_jpeg(path: Path) -> None:
    PIL.Image.effect_noise((300, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IMAGES = {
    "zero bytes": ("x.png", Path.touch, ["is empty (0 bytes)", "copy it again or remove it"]),
    "cut off": ("x.jpg", half_a_jpeg, ["damaged or cut off", "copy it again, or remove it"]),
    "text": ("x.png", lambda p: p.write_text("I am a caption"), ["no image of a kind that is read", "save it as .png, or remove it"]),
    "huge": ("x.png", lambda p: huge_png(p, 30_000), ["900,000,000 pixels", "at most 200,000,000", "Make it smaller"]),
}


@pytest.mark.parametrize(("name", "make", "words"), IMAGES.values(), ids=IMAGES)
def test_an_image_that_cannot_be_read(mine, refused, name, make, words):
    path = mine / "pictures" / name
    make(path)
    start = time.monotonic()
    (problem,) = refused({})
    assert time.monotonic() - start < 10
    assert problem.startswith(str(path)) and all(w in problem for w in words), problem


def test_an_image_that_may_not_be_read(mine, refused, deny):
    deny("01.png")
    (problem,) = refused({})
    assert problem.startswith(str(mine / "pictures" / "01.png")) and "Permission denied" in problem and "check its permissions" in problem


def test_every_image_that_is_wrong_is_named_at_once(mine, refused):
    for k, (name, make, _) in enumerate(IMAGES.values()):
        make(mine / "pictures" / f"bad {k}{Path(name).suffix}")
    assert [problem.count(f"bad {k}") for k, problem in enumerate(refused({}))] == [1] * len(IMAGES)


def test_folders_that_hold_nothing(mine, refused):
    (mine / "empty").mkdir()
    (mine / "file").write_text("x")
    folders = {
        "nowhere": ["does not exist", "give the path of a folder"],
        "empty": ["no image", "Put some there"],
        "file": ["which is a file", "give the folder"],
        "a\0b": ["no folder can be called", "give the path"],
    }
    problems = refused({"data": [{"folder": name} for name in folders]})
    assert len(problems) == len(folders)
    for k, (problem, (name, words)) in enumerate(zip(problems, folders.items(), strict=True)):
        assert f"data.{k + 1}.folder" in problem and all(w in problem for w in [name.replace("\0", "\\x00"), *words]), problem


def test_a_caption_in_latin_1_is_read_right_and_trains_with_a_note(mine, cli, root):
    (mine / "pictures" / "00.txt").write_bytes("zorp, Zoë’s café".encode("cp1252"))
    said = cli(SHORT)
    assert said.code == 0
    (note,) = [line for line in said.out.splitlines() if "UTF-8" in line]
    assert note.startswith("Note: ") and "00.txt" in note and "01.txt" not in note and "Save them as UTF-8" in note
    with safe_open(root / "lora.safetensors", "pt") as file:
        tags = json.loads(file.metadata()["ss_tag_frequency"])
    assert "Zoë’s café" in tags["1_pictures"]


def test_odd_names_train_and_are_exported(mine, cli, root):
    folder = mine / 'Ünï "côdé" 猫 & $HOME'
    (mine / "pictures").rename(folder)
    for k, name in enumerate(('it\'s "mine"', "two  spaces; 100% (1)")):
        for end in (".png", ".txt"):
            (folder / f"0{k}{end}").rename(folder / f"{name}{end}")
    name = "it's Zoë, 猫 (1)"
    odd = root.with_name("a run's “folder”")
    said = cli(SHORT | {"data": [{"folder": folder.name, "trigger": "zorp"}], "output.name": name}, run_dir=odd)
    assert said.code == 0 and said.out.splitlines()[-1] == f"Finished: {odd / name}.safetensors"
    with safe_open(odd / f"{name}.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == name and len(list(file.keys())) > 100


# Settings


SETTINGS = {
    "misspelt": ({"train.visit": 3}, ["train.visit is not a known setting. Did you mean visits?"]),
    "misspelt table": ({"adaptor": {"rank": 3}}, ["adaptor is not a known setting. Did you mean adapter?"]),
    "wrong type": ({"train.batch_size": "many"}, ["train.batch_size", "'many'", "integer"]),
    "alpha 0": ({"adapter.alpha": 0}, ["adapter.alpha is 0", "greater than 0"]),
    "file name": ({"output.name": "a/b"}, ["output.name is 'a/b'", "without any of"]),
    "resolution": ({"dataset.resolution": 500}, ["dataset.resolution is 500", "multiple of 8", "504"]),
}


@pytest.mark.parametrize(("changes", "words"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_is_wrong(cli, root, changes, words):
    said = cli(changes)
    (problem,) = said.problems
    assert said.err == f"Error: {problem}\n" and said.out == "" and not root.exists()
    assert all(w in problem for w in words), problem


def test_all_wrong_settings_are_told_at_once(cli):
    problems = cli({"train.visit": 3, "adapter.alpha": 0, "preview.steps": 999}).problems
    assert (
        [any(w in p for p in problems) for w in ("train.visit ", "adapter.alpha", "preview.steps")] == [True] * 3 == [True] * len(problems)
    )


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("gone.toml", None, ["no configuration file", "gone.toml", ".toml or .json"]),
        ("c.toml", b"hello there", ["c.toml is not valid TOML", "line 1"]),
        ("c.json", b"{hello", ["c.json is not valid JSON", "line 1"]),
        ("c.toml", "# Zoë".encode("latin-1"), ["c.toml", "UTF-8"]),
        ("c.toml", b"\x89PNG\r\n\x1a\n\0\0", ["c.toml", "UTF-8"]),
        (".", None, ["directory"]),
    ],
)
def test_a_configuration_file_that_is_none(mine, cli, root, name, raw, words):
    if raw is not None:
        (mine / name).write_bytes(raw)
    (problem,) = cli(config=mine / name).problems
    assert all(w in problem for w in words) and not root.exists(), problem


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "adapter.rank"], ["--set 'adapter.rank' has no value", "section.name=value"]),
        (["--set", "adapter.rnak=4"], ["adapter.rnak is not a known setting", "Did you mean rank?"]),
        (["--preset", "sd1/balancd"], ["preset is 'sd1/balancd'", "Did you mean sd1/balanced?"]),
        (["--preset", "nothing like it"], ["preset is 'nothing like it'", "There are: ", "sd1/quick"]),
    ],
)
def test_a_word_of_the_command_line_that_is_wrong(cli, root, more, words):
    (problem,) = cli({}, *more).problems
    assert all(w in problem for w in words) and not root.exists(), problem


def test_nothing_to_train(capsys, root):
    assert main(["train", "--run-dir", str(root)]) == 1
    assert "give a configuration file" in capsys.readouterr().err and not root.exists()


# The base


def header(path: Path, *keys: str, shape: tuple[int, ...] = (4, 4)) -> Path:
    save_file({k: torch.zeros(shape) for k in keys}, path)
    return path


def pickled(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    return path


def cut(path: Path) -> Path:
    whole = (DEMO / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def folder(path: Path, *gone: str) -> Path:
    """The demo base without some of its files; a name that ends in - is cut off instead, one with = is put in another's place."""
    shutil.copytree(DEMO, path)
    for name in gone:
        old, _, new = name.partition("=")
        target = path / old.rstrip("-")
        if name.endswith("-"):
            target.write_bytes(target.read_bytes()[:1000])
        elif new:
            target.rename(path / new)
        elif target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()
    return path


UNET = "unet/diffusion_pytorch_model.safetensors"
LDM = "model.diffusion_model.input_blocks.1.0.w"
LORA = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
BASES = {
    "missing": (lambda p: p / "none.safetensors", ["no such file or folder", "or demo"]),
    "missing pickle": (lambda p: Path("models/none.ckpt"), ["no such file or folder", "or demo"]),
    "empty": (lambda p: "", ["model.source is ''", "or demo"]),
    "too long": (lambda p: "x" * 5000, ["no such file or folder", "x ...'"]),
    "pickle": (lambda p: pickled(p / "b.ckpt"), ["b.ckpt is a pickle", "not opened", "Get the .safetensors version"]),
    "pickle in disguise": (lambda p: pickled(p / "b.safetensors"), ["b.safetensors is a pickle", "Get the .safetensors version"]),
    "LoRA": (lambda p: header(p / "l.safetensors", LORA), ["l.safetensors", "which is a LoRA", "Choose a base model of Stable Diffusion"]),
    "SDXL without a VAE": (
        lambda p: header(p / "xl.safetensors", "conditioner.embedders.1.x", LDM),
        ["Stable Diffusion XL without VAE", "Choose"],
    ),
    "refiner": (
        lambda p: header(p / "r.safetensors", "conditioner.embedders.0.model.x", LDM, "first_stage_model.x"),
        ["the SDXL refiner", "Choose"],
    ),
    "VAE": (lambda p: header(p / "vae.safetensors", "decoder.conv_in.weight"), ["which is a VAE", "Choose"]),
    "UNet": (lambda p: DEMO / UNET, ["one part of a diffusers model", "model_index.json"]),
    "unknown": (lambda p: header(p / "u.safetensors", "something"), ["no model that is known here", "something", "Choose"]),
    "cut off": (lambda p: cut(p / "cut.safetensors"), ["cut.safetensors", "cut off or damaged", "copy it again"]),
    "no index": (lambda p: folder(p / "base", "model_index.json"), ["no model_index.json", "Choose the folder that holds it"]),
    "no UNet": (lambda p: folder(p / "base", "unet"), ["unet/config.json", "missing", "again"]),
    "no UNet weights": (lambda p: folder(p / "base", UNET), [UNET, "missing", "again"]),
    "half UNet": (lambda p: folder(p / "base", UNET + "-"), ["where " + UNET, "again"]),
    "half text encoder": (lambda p: folder(p / "base", "text_encoder/model.safetensors-"), ["text_encoder/model", "again"]),
    "pickled UNet": (lambda p: folder(p / "base", f"{UNET}=unet/x.bin"), [UNET, "x.bin is a pickle", "Choose a model"]),
    "fp16 UNet": (lambda p: folder(p / "base", f"{UNET}=unet/x.fp16.safetensors"), [UNET, "x.fp16.safetensors", "Choose a model"]),
    "no VAE config": (lambda p: folder(p / "base", "vae/config.json"), ["vae/config.json", "missing", "again"]),
    "no tokenizer": (lambda p: folder(p / "base", "tokenizer"), ["tokenizer/", "again"]),
    "no scheduler": (lambda p: folder(p / "base", "scheduler"), ["scheduler/scheduler_config.json", "again"]),
}


@pytest.mark.parametrize(("make", "words"), BASES.values(), ids=BASES)
def test_a_base_that_cannot_be_used(mine, refused, make, words):
    (problem,) = refused({"model.source": str(make(mine))})
    assert all(w in problem for w in words), problem


def test_a_base_that_may_not_be_read(mine, refused, deny):
    header(mine / "locked.safetensors", "x")
    deny("locked.safetensors")
    (problem,) = refused({"model.source": str(mine / "locked.safetensors")})
    assert "locked.safetensors" in problem and "Permission denied" in problem


# The run's folder


def test_a_run_folder_that_is_a_file(mine, cli):
    (mine / "notes").write_text("mine")
    for path in (mine / "notes", mine / "notes" / "run"):
        (problem,) = cli(SHORT, run_dir=path).problems
        assert str(path) in problem and "cannot be made" in problem and "--run-dir" in problem


def test_a_run_folder_that_cannot_be_made(cli, root, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    (problem,) = cli(SHORT).problems
    assert str(root) in problem and "Permission denied" in problem and "--run-dir" in problem


@pytest.mark.parametrize("name", ["lock", "events.jsonl"])
def test_a_run_folder_that_cannot_be_written_to(cli, root, deny, name):
    root.mkdir()
    deny(name)
    (problem,) = cli(SHORT).problems
    assert str(root) in problem and "cannot be written to: Permission denied" in problem and "--run-dir" in problem


def test_a_folder_where_another_run_is_going_on(cli, root):
    run = RunDir(root)
    run.create()
    lock = Lock(run)
    lock.acquire()
    try:
        run.events.write_text("theirs\n")
        before = contents(root)
        (problem,) = cli(SHORT).problems
        assert "Another process is training in" in problem and str(root) in problem and "--run-dir" in problem
        assert contents(root) == before
    finally:
        lock.release()


@pytest.fixture
def done(cli, root):
    """A finished run of 8 steps with checkpoints at 4 and 8; returns the changes that it was made with."""
    changes = {"train.visits": 8, "train.batch_size": 2, "output.checkpoint_every": 4}
    assert cli(changes).code == 0
    assert [p.stem for p in sorted((root / "checkpoints").iterdir())] == ["step-000004", "step-000008"]
    return changes


def test_a_second_run_in_a_folder_that_holds_one(done, cli, root):
    before = contents(root)
    (problem,) = cli(done).problems
    assert f"{root} already holds a run" in problem and "--resume" in problem and "--run-dir" in problem
    (problem,) = cli(done | {"adapter.rank": 3}, "--resume").problems
    assert "other settings in [adapter]" in problem and "another folder" in problem
    now = contents(root)
    assert {p: now[p] for p in before if p.name != "process.json"} == {p: b for p, b in before.items() if p.name != "process.json"}


def test_nothing_to_resume(cli, root):
    (problem,) = cli(SHORT, "--resume").problems
    assert f"no run to resume in {root}" in problem and "without --resume" in problem


@pytest.mark.parametrize("raw", [pickle.dumps({"step": 8}), b"", b"\xff" * 100])
def test_a_checkpoint_that_is_none(done, cli, root, raw):
    last = root / "checkpoints" / "step-000008.safetensors"
    last.write_bytes(raw)
    before = contents(root / "checkpoints") | {root / "lora.safetensors": (root / "lora.safetensors").read_bytes()}
    (problem,) = cli(done, "--resume", "--visits", "10").problems
    assert str(last) in problem and "pickles are not loaded" in problem and "Delete it to resume from an older one" in problem
    assert failed(root) == [problem] and before.items() <= contents(root).items()
    last.unlink()
    said = cli(done, "--resume")
    assert said.code == 0 and "Resuming after step 4." in said.out


def test_settings_of_a_run_that_cannot_be_read(done, cli, root):
    (root / "config.json").write_text("{torn")
    before = contents(root / "checkpoints")
    (problem,) = cli(done, "--resume").problems
    assert str(root / "config.json") in problem and "cannot be resumed" in problem and contents(root / "checkpoints") == before


# The disk


FULL = {"train.visits": 8, "train.batch_size": 2, "output.checkpoint_every": 2, "output.keep_checkpoints": 9, "output.save_every": 4}


@pytest.mark.parametrize(
    ("pattern", "what", "kept"),
    [
        ("checkpoints/.step-000006*", "step-000006.safetensors", ["lora-000004", "step-000002", "step-000004"]),
        (".lora.safetensors*", "lora.safetensors", ["lora-000004", *(f"step-{n:06d}" for n in (2, 4, 6, 8))]),
    ],
    ids=["checkpoint", "export"],
)
def test_a_full_disk_loses_nothing_that_was_written(cli, root, pattern, what, kept):
    with disk_full(root, pattern):
        (problem,) = cli(FULL).problems
    assert what in problem and "disk is full" in problem and " MB" in problem
    assert failed(root) == [problem]
    assert sorted(p.stem for p in root.rglob("*.safetensors")) == kept
    assert not list(root.rglob(".*"))
    for path in root.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert len([file.get_tensor(k) for k in file.keys()]) > 50  # noqa: SIM118 (not a dict)
    said = cli(FULL, "--resume")
    assert said.code == 0 and f"Resuming after step {kept[-1][-1]}." in said.out and (root / "lora.safetensors").is_file()


def test_a_disk_that_is_too_full_for_the_log(cli, root, monkeypatch):
    really = events.Writer.__call__

    def write(self, type, **fields):
        if type == "step" or self.seq > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(self, type, **fields)

    monkeypatch.setattr(events.Writer, "__call__", write)
    assert cli(SHORT).problems == ["The disk is full. Free some space, then run again with --resume."]


# What is not the user's


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "boom")])
def test_an_error_of_ours_is_not_swallowed(cli, root, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("trainer.data.store.Store.__init__", fail)
    with pytest.raises(type(error)) as caught:
        cli(SHORT)
    assert caught.value is error
    (text,) = failed(root)
    assert text.startswith(f"{type(error).__name__}: ") and "boom" in text


def test_an_error_of_the_user_is_one_class_for_callers(configure, root):
    from trainer import run

    with pytest.raises(RunError, match="no such file or folder"):
        run.train(configure({"model.source": "nowhere.safetensors"}), root)
