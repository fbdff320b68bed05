"""What was encoded is kept for the next run: it encodes nothing, and ends as a run that does, to the last bit."""

import errno
import os
import random
import shutil
import threading
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer import __main__ as cli
from trainer import events, families, plan
from trainer.data import cache as cache_module
from trainer.data import store as store_module
from trainer.data.cache import ENVIRONMENT, Cache, default_folder, entries, identity
from trainer.data.store import Texts, encode_images
from trainer.families.sd1 import SD1
from trainer.families.sources import DEMO

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FROZEN_TEXT = {"part.text_1.train": False}
VALIDATED = {"validation.enabled": True, "validation.every": 0, "validation.draws": 1}


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The folder of the cache for this test."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions have been encoded: {"images": n, "captions": n}."""
    counts = {"images": 0, "captions": 0}
    images, captions = SD1.encode, SD1.encode_text

    def encode(self, models, pixels):
        counts["images"] += len(pixels)
        return images(self, models, pixels)

    def encode_text(self, models, part, tokens):
        counts["captions"] += len(tokens.ids) * (not torch.is_grad_enabled())
        return captions(self, models, part, tokens)

    monkeypatch.setattr(SD1, "encode", encode)
    monkeypatch.setattr(SD1, "encode_text", encode_text)
    return counts


@pytest.fixture(scope="module")
def models(one_thread):
    return families.get("sd1").load(DEMO, torch.float32, CPU)


@pytest.fixture
def images(configure, models, tmp_path, draw_pictures):
    """images(changes, models): what `encode_images` makes with the cache at `tmp_path / "kept"`, of five pictures in two buckets."""
    folder = draw_pictures(tmp_path / "data", [(64, 64)] * 3 + [(96, 48)] * 2)

    def make(changes=None, models=models, folder=folder, cache=None):
        laid = plan.make(configure({"data": [{"folder": str(folder)}], **(changes or {})}), 64)
        background = (changes or {}).get("dataset.background", "#ffffff")
        cache = cache or Cache(tmp_path / "kept")
        return encode_images(families.get("sd1"), models, laid.images, laid.placements, background, cache=cache)

    make.folder = folder
    return make


def same_moments(one, other):
    return one.keys() == other.keys() and all(torch.equal(a, b) for k in one for a, b in zip(one[k], other[k], strict=True))


# runs


@pytest.mark.parametrize("pixels", [64 * 64, 512 * 512], ids=["one by one", "in batches"])
def test_a_second_run_encodes_nothing_and_ends_the_same(pixels, train, same, kept, encoded, monkeypatch, pictures, draw_pictures, tmp_path):
    apart = draw_pictures(tmp_path / "apart", [(64, 64)] * 2, seed=9)
    data = [{"folder": str(pictures)}, {"folder": str(apart), "kind": "validation"}]
    changes = {**FROZEN_TEXT, **VALIDATED, "dataset.flip": True, "data": data}
    monkeypatch.setattr(store_module, "ENCODE_PIXELS", pixels)
    monkeypatch.setenv(ENVIRONMENT, "off")
    plain = train(changes)
    without = dict(encoded)
    assert without["images"] > 7 and without["captions"] > 7
    monkeypatch.setenv(ENVIRONMENT, str(kept))
    first = train(changes)
    assert encoded["images"] == 2 * without["images"]
    counted = dict(encoded)
    second = train(changes)
    assert encoded == counted
    for run in (first, second):
        assert same(run.lora(), plain.lora()) and same(run.state()[0], plain.state()[0])
        told = [[{k: v for k, v in e.items() if k not in ("seq", "time")} for e in r.events("validation")] for r in (plain, run)]
        assert told[0] == told[1] and told[0][0]["held_out"] is not None
        assert not run.events("warning")
    assert not [e for r in (plain, first, second) for e in r.events("progress")]  # it took less than a second
    assert not list(kept.glob(f"*{cache_module.HALF_WRITTEN}"))


def test_a_trained_text_encoder_reads_anew(train, same, kept, encoded):
    whole = train()
    assert encoded["images"] == 7
    again = train()
    assert encoded["images"] == 7 and same(whole.lora(), again.lora())
    assert not same(whole.lora(), train({"part.text_1.learning_rate": 1e-3}).lora())


def test_a_stopped_run_is_resumed_the_same_with_and_without_what_was_kept(train, same, kept, encoded):
    whole = train(FROZEN_TEXT)
    counted = dict(encoded)
    part = train(FROZEN_TEXT, stop_at=4)
    part = train(FROZEN_TEXT, root=part.root, resume=True)
    assert encoded == counted
    other = train(FROZEN_TEXT, stop_at=4)
    shutil.rmtree(kept)
    other = train(FROZEN_TEXT, root=other.root, resume=True)
    assert encoded == {k: 2 * n for k, n in counted.items()}
    for run in (part, other):
        assert same(run.lora(), whole.lora()) and same(run.state()[0], whole.state()[0])


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "folder"])
def test_a_damaged_file_is_made_again(harm, train, same, kept, encoded):
    whole = train(FROZEN_TEXT)
    counted, rng = dict(encoded), random.Random(1)
    for *_, path in entries(kept):
        data = bytearray(path.read_bytes())
        if harm == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.unlink()
        if harm == "folder":
            path.mkdir()
        else:
            path.write_bytes({"flip": data, "cut": data[: rng.randrange(len(data))], "empty": b""}[harm])
    again = train(FROZEN_TEXT)
    assert same(whole.lora(), again.lora())
    assert encoded == {k: 2 * n for k, n in counted.items()}
    if harm != "folder":
        train(FROZEN_TEXT)
        assert encoded == {k: 2 * n for k, n in counted.items()}


def test_a_folder_that_cannot_be_written_to_is_said_once(train, same, tmp_path, monkeypatch):
    plain = train(FROZEN_TEXT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "file" / "kept"))
    run = train(FROZEN_TEXT)
    assert run.outcome == "finished" and same(run.lora(), plain.lora())
    (warning,) = run.events("warning")
    assert "cannot be kept in" in warning["text"] and ENVIRONMENT in warning["text"]


def test_a_folder_that_can_only_be_read_serves(train, kept, encoded):
    train(FROZEN_TEXT)
    counted = dict(encoded)
    kept.chmod(0o500)
    try:
        if os.access(kept, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert not train(FROZEN_TEXT).events("warning")
        assert encoded == counted
        said = [e["text"] for e in train({**FROZEN_TEXT, "dataset.resolution": 128}).events("warning")]
    finally:
        kept.chmod(0o700)
    assert ["cannot be kept" in text for text in said] == [False, True]  # the first is of enlarged images


def test_progress_is_told_once_a_second_while_something_is_encoded(train, kept, monkeypatch, capsys):
    monkeypatch.setattr(store_module, "ENCODE_PIXELS", 1)
    clock = iter(range(10**6))
    monkeypatch.setattr(events, "time", types.SimpleNamespace(time=events.time.time, monotonic=lambda: next(clock) * 0.5))
    terminal = cli.Terminal()
    run = train(FROZEN_TEXT, show=terminal)
    told = [(e["what"], e["done"], e["total"], e["eta_s"]) for e in run.events("progress")]
    assert told == [("images", 2, 7, 2.5), ("images", 4, 7, 1.5), ("images", 6, 7, 0.5)]  # two an s; the captions are one batch
    kinds = [e["type"] for e in run.events()]
    assert kinds.index("progress") > kinds.index("stage") and kinds.index("progress") < kinds.index("step")
    assert "Encoded 2 of 7 images, 0:00:02 left\n" in capsys.readouterr().out
    assert not train(FROZEN_TEXT).events("progress")


# what an entry is of


def test_another_image_crop_background_or_weight_is_encoded_anew(images, models, encoded, draw_pictures, tmp_path):
    first = images()
    assert encoded["images"] == 5 and same_moments(images(), first) and encoded["images"] == 5
    for changes, many in (({"dataset.resolution": 128}, 5), ({"dataset.background": "#000000"}, 5)):
        before = encoded["images"]
        images(changes)
        assert encoded["images"] == before + many
    before = encoded["images"]
    draw_pictures(images.folder, [(64, 64)], seed=5)  # 00.png, in its bucket's batch of three
    assert not same_moments(images(), first) and encoded["images"] == before + 3
    weight = models.vae.encoder.conv_in.weight
    held = weight.detach().clone()
    try:
        weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(torch.inf))
        before = encoded["images"]
        images()
        assert encoded["images"] == before + 5
    finally:
        weight.data.copy_(held)
    before = encoded["images"]
    images()
    assert encoded["images"] == before


def test_images_of_full_batches_are_kept_one_by_one(images, encoded, monkeypatch):
    monkeypatch.setattr(store_module, "ENCODE_PIXELS", 64 * 64)
    images()
    Image.new("RGB", (64, 64), "red").save(images.folder / "000.png")  # comes first
    assert len(images()) == 6 and encoded["images"] == 6


def test_an_edit_under_the_same_name_and_time_is_seen(images, encoded):
    first, path = images(), images.folder / "01.png"
    stat = path.stat()
    with Image.open(path) as image:
        other = image.rotate(180)
    other.save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not same_moments(images(), first)


def test_captions_are_kept_by_their_tokens_and_their_encoder(models, kept, encoded):
    def read(*captions, models=models):
        return Texts(families.get("sd1"), models, captions, cache=Cache(kept)).held["text_1"].hidden

    first = read("a zorp", "a red zorp")
    assert encoded["captions"] == 2
    assert torch.equal(read("a zorp", "a red zorp"), first) and encoded["captions"] == 2
    assert torch.equal(read("A  zorp", "a red zorp"), first) and encoded["captions"] == 2  # the same tokens
    assert not torch.equal(read("a zorp", "a blue zorp"), first) and encoded["captions"] == 4
    skipped = families.get("sd1").load(DEMO, torch.float32, CPU)
    skipped.clip_skip = 2
    assert not torch.equal(read("a zorp", "a red zorp", models=skipped), first) and encoded["captions"] == 6
    skipped.clip_skip, skipped.weighted = 1, True
    assert not torch.equal(read("a (zorp:1.5)", "a red zorp", models=skipped), first) and encoded["captions"] == 8


def test_the_identity_of_a_model_is_its_weights_and_settings(models):
    torch.manual_seed(0)
    first = identity(models.vae)
    assert identity(models.vae) == first and identity(families.get("sd1").load(DEMO, torch.float32, CPU).vae) == first
    small = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)).to(torch.bfloat16)  # odd sizes
    seen = {identity(small)}
    for name, tensor in small.state_dict().items():
        for at in range(tensor.numel()):
            flat = tensor.view(-1)
            held = flat[at].clone()
            flat[at] = held + (1 if tensor.dtype == torch.int64 else 0.5)
            seen.add(identity(small))
            flat[at] = held
        assert tensor.numel() > 0, name
    assert len(seen) == 1 + sum(t.numel() for t in small.state_dict().values())
    assert identity(small) in seen
    assert identity(small.float()) not in seen


def test_threads_are_part_of_the_name(images, encoded):
    images()
    torch.set_num_threads(2)
    try:
        images()
    finally:
        torch.set_num_threads(1)
    assert encoded["images"] == 10


# the folder


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    names = [f"{k:040x}" for k in range(5)]
    for k, name in enumerate(names):
        cache.write(name, {"x": torch.full((1000,), float(k))})
        os.utime(tmp_path / f"{name}.encoded", (k, k))
    size = entries(tmp_path)[0][1]
    assert size > 4000
    for k, name in enumerate(["of-a-killed-process", "of-a-running-one"]):
        (tmp_path / f"{name}{cache_module.HALF_WRITTEN}").write_bytes(b"x")
        if k == 0:
            os.utime(tmp_path / f"{name}{cache_module.HALF_WRITTEN}", (0, 0))
    (tmp_path / "model.safetensors").write_bytes(b"somebody else's")
    assert torch.equal(cache.read(names[0])["x"], torch.zeros(1000))  # used now
    cache.prune()
    assert len(entries(tmp_path)) == 5
    monkeypatch.setattr(cache_module, "LIMIT", 3 * size)
    cache.prune()
    assert {path.stem for *_, path in entries(tmp_path)} == {names[0], names[3], names[4]}
    assert {p.name for p in tmp_path.iterdir()} > {"model.safetensors", f"of-a-running-one{cache_module.HALF_WRITTEN}"}
    assert len(list(tmp_path.iterdir())) == 5
    free = types.SimpleNamespace(free=cache_module.SPARE - size)  # the disk gets what it lacks
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    cache.prune()
    assert {path.stem for *_, path in entries(tmp_path)} == {names[0], names[4]}


def test_a_run_leaves_no_more_than_the_limit(train, kept, monkeypatch):
    train({"dataset.resolution": 128})
    whole = sum(size for _, size, _ in entries(kept))
    monkeypatch.setattr(cache_module, "LIMIT", whole)
    train()
    assert 0 < sum(size for _, size, _ in entries(kept)) <= whole


@pytest.mark.parametrize("how", ["nearly full", "full"])
def test_a_full_disk_is_left_alone(how, tmp_path, monkeypatch):
    said = []
    cache = Cache(tmp_path, said.append)
    module = torch.nn.Linear(1, 1)

    def make():
        return cache.recall("images", [1] * 9, str, module, torch.device("cpu"), lambda missing: ({"x": torch.zeros(9)} for _ in missing))

    cache.write("a", {"x": torch.zeros(9)})
    if how == "nearly full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=cache_module.SPARE))
    else:

        def full(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    assert len(make()) == len(make()) == 9
    assert len(said) == 1 and "No space left on device" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.encoded"]
    assert torch.equal(cache.read("a")["x"], torch.zeros(9))


def test_what_is_not_a_number_is_not_kept(tmp_path):
    cache = Cache(tmp_path)
    cache.write("a", {"x": torch.tensor([1.0, torch.nan])})
    assert cache.read("a") is None


def test_every_type_comes_back_as_it_was(tmp_path):
    cache, wide = Cache(tmp_path), torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    there = {"x": torch.randn(5).bfloat16(), "y": torch.randn(3, 3).half(), "z": wide[:, :2].contiguous()}
    cache.write("a", there)
    back = cache.read("a")
    assert back.keys() == there.keys()
    assert all(torch.equal(back[k], there[k]) and back[k].dtype == there[k].dtype for k in there)


def test_readers_and_writers_at_once_see_whole_entries(tmp_path):
    wanted, wrong, ended = torch.arange(50_000.0), [], threading.Event()

    def read():
        while not ended.is_set():
            found = Cache(tmp_path).read("a")
            if found is not None and not torch.equal(found["x"], wanted):
                wrong.append(found)

    def write():
        wrong.extend(filter(None, (Cache(tmp_path).write("a", {"x": wanted}) for _ in range(20))))

    def remove():
        while not ended.is_set():
            cache_module.clear(tmp_path / ".")
            ended.wait(0.005)

    around = [threading.Thread(target=t) for t in (read, remove)]
    writers = [threading.Thread(target=write) for _ in range(3)]
    for thread in (*around, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in around:
        thread.join()
    assert not wrong


def test_the_folder_is_where_the_system_keeps_caches_or_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.setenv(ENVIRONMENT, "OFF")
    assert default_folder() is None
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for system, place in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(cache_module.sys, "platform", system)
        assert default_folder() == tmp_path / place / "lora-atelier" / "encoded"
    monkeypatch.setattr(cache_module.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "lora-atelier" / "encoded"
    monkeypatch.setenv(ENVIRONMENT, "~nobody-of-that-name/x")
    said = []
    assert Cache.of_the_user(said.append, print).folder is None and ENVIRONMENT in said[0]


def test_the_command_says_how_much_is_kept_and_deletes_it(kept, capsys, monkeypatch):
    Cache(kept).write("a", {"x": torch.zeros(250_000)})
    (kept / "other.safetensors").write_bytes(b"somebody else's")
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"{kept}: 1 files, 1.0 MB of at most 5369 MB\n"
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"{kept}: 0 files, 0.0 MB of at most 5369 MB\n"
    assert [p.name for p in kept.iterdir()] == ["other.safetensors"]
    monkeypatch.setenv(ENVIRONMENT, "off")
    assert cli.main(["cache"]) == 0
    assert "not kept" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu_what_is_kept_is_what_is_encoded(images, encoded, tmp_path):
    there = families.get("sd1").load(DEMO, torch.float32, torch.device("cuda"))
    first = images(models=there)
    assert same_moments(images(models=there), first) and encoded["images"] == 5
    shutil.rmtree(tmp_path / "kept")
    assert same_moments(images(models=there), first) and encoded["images"] == 10


def test_an_image_too_large_to_encode_is_encoded_in_tiles(train, monkeypatch, same):
    """Told once, trained as ever, and kept apart from what is encoded whole."""
    from diffusers import AutoencoderKL

    from trainer.data import store

    monkeypatch.setattr(store, "TILE", 4)
    changes = {"train.visits": 1}
    whole, encode = train(changes), AutoencoderKL.encode

    def short(self, x, **more):
        if not self.use_tiling:
            raise torch.OutOfMemoryError("no")
        return encode(self, x, **more)

    monkeypatch.setattr(AutoencoderKL, "encode", short)
    tiled = train(changes)
    (told,) = [e["text"] for e in tiled.events("warning") if "tiles" in e["text"]]
    assert told.startswith("The GPU's memory is too small to encode an image at once.")
    assert tiled.outcome == "finished" and not same(whole.lora(), tiled.lora())
