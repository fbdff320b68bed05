"""Shared by the tests of the trainer: a handful of small pictures, a run on them that takes a second, what it leaves behind."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
os.environ["LORA_ATELIER_CACHE"] = "off"  # nothing of a test is kept in the user's own, or found by the next test
BLIP_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "red", "green", "blue", "cat", "dog", "house", "on", "the", "grass", "under", "tree", "sky", "with", "of"],
    "##s",
    "araffe",
]
SQUARES, WIDES = [(64, 64)] * 4, [(96, 48)] * 3


@dataclass(frozen=True)
class Trained:
    """A run that has ended, read from its files."""

    outcome: str
    root: Path

    def events(self, *kinds: str) -> list[dict]:
        lines = (self.root / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [e for e in map(json.loads, lines) if not kinds or e["type"] in kinds]

    def checkpoints(self) -> list[Path]:
        return sorted((self.root / "checkpoints").iterdir())

    def lora(self, name: str = "lora.safetensors") -> dict:
        """The exported tensors."""
        from safetensors.torch import load_file

        return load_file(self.root / name)

    def state(self) -> tuple[dict, dict]:
        """(tensors, metadata) of the last checkpoint."""
        from safetensors import safe_open

        with safe_open(self.checkpoints()[-1], "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


@pytest.fixture(scope="session")
def draw_pictures() -> Callable[..., Path]:
    """draw_pictures(folder, sizes): coloured blotches with captions of four tags, the same at every call."""

    def draw(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        for k, size in enumerate(sizes):
            dots = Image.frombytes("RGB", (8, 8), bytes(rng.randrange(256) for _ in range(192)))
            dots.resize(size, Image.Resampling.BICUBIC).save(folder / f"{k:02}.png")
            (folder / f"{k:02}.txt").write_text(f"zorp, thing {k}, red, small", encoding="utf-8")
        return folder

    return draw


@pytest.fixture(scope="session")
def pictures(draw_pictures, tmp_path_factory) -> Path:
    """Seven pictures that fall into two buckets, of four and of three."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"), SQUARES + WIDES)


@pytest.fixture(scope="session")
def settings(pictures) -> Callable[..., dict]:
    """settings({"adapter.rank": 4}): a small run on the demo base as plain values, 8 steps of at most 4 rows at 64 px."""

    def make(changes: dict | None = None) -> dict:
        values = {
            "data": [{"folder": str(pictures), "trigger": "zorp"}],
            "dataset": {"resolution": 64},
            "adapter": {"rank": 2, "alpha": 2},
            "part": {"unet": {"learning_rate": 1e-3}, "text_1": {"learning_rate": 5e-4}},
            "train": {"visits": 4, "batch_size": 4, "device": "cpu"},
            "preview": {"enabled": False},
            "validation": {"enabled": False},
            "output": {"dtype": "fp32"},
        }
        for key, value in (changes or {}).items():
            node, *rest = values, *key.split(".")
            for table in rest[:-1]:
                node = node.setdefault(table, {})
            node[rest[-1]] = value
        return values

    return make


@pytest.fixture(scope="session")
def configure(settings) -> Callable[..., object]:
    """configure({"adapter.rank": 4}): those settings as a TrainConfig."""
    from trainer.config.load import validate

    return lambda changes=None: validate(settings(changes))


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Torch on one thread: models this small gain nothing by more, and lose 20 times when another process wants a core."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def train(configure, one_thread, tmp_path_factory) -> Callable[..., Trained]:
    """train(changes, root=None, resume=False, stop_at=None, visits=None): one run in this process.

    `stop_at`: the step after which a stop request comes in, sent when that step's checkpoint is written (0: before the run).
    `show` sees every event as it is written.
    """
    from trainer import control, run
    from trainer.run_dir import RunDir

    def go(changes=None, root=None, resume=False, stop_at=None, visits=None, show=lambda event: None) -> Trained:
        folder = RunDir(root or tmp_path_factory.mktemp("run"))
        if stop_at is not None:
            changes = {"output.checkpoint_every": stop_at, **(changes or {})}
        sent = [control.send(folder, "stop")] if stop_at == 0 else []

        def watch(event: dict) -> None:
            if event["type"] == "checkpoint" and event["step"] == stop_at and not sent:
                sent.append(control.send(folder, "stop"))
            show(event)

        outcome, _ = run.train(configure(changes), folder.root, resume=resume, visits=visits, show=watch)
        return Trained(outcome, folder.root)

    return go


@pytest.fixture(scope="session")
def command(settings, tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """command(root, changes, *more): `python -m trainer train` as a process of its own; without `changes` from the folder's config.json."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(root: Path, changes: dict | None, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        config = []
        if changes is not None:
            path = tmp_path_factory.mktemp("config") / "config.json"
            path.write_text(json.dumps(settings(changes)), encoding="utf-8")
            config = [str(path)]
        words = [sys.executable, *launcher, "-m", "trainer", "train", *config, "--run-dir", str(root), *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    return start


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., dict]:
    """wait_for(process, root, kind, step): the first such event of a run that is going on; fails when the process ends before."""

    def wait(process: subprocess.Popen, root: Path, kind: str, step: int = 0) -> dict:
        from trainer import events

        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            for event in events.read(root / "events.jsonl"):
                if event["type"] == kind and event.get("step", 0) >= step:
                    return event
            if ended:
                break
            time.sleep(0.01)
        process.kill()
        pytest.fail(f"no event {kind} at step {step}; the process said:\n{process.communicate()[0]}")

    return wait


@pytest.fixture(scope="session")
def same() -> Callable[[dict, dict], bool]:
    """same(a, b): two dicts of tensors, equal to the last bit."""
    import torch

    return lambda a, b: a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def small_blip(tmp_path_factory, one_thread) -> Path:
    """A BLIP of random weights, 32 wide, in the files of a hub repository."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("blip")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**small, **special, "vocab_size": len(BLIP_WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    torch.manual_seed(1)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, initializer_factor=1.0)
    )
    for p in model.parameters():  # as made, its states are so small that every image gets the same words
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():  # words alone, no end: a random model may begin with it
        model.text_decoder.cls.predictions.bias[:5] = -1000
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(BLIP_WORDS), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_clipseg(tmp_path_factory, one_thread) -> Path:
    """A CLIPSeg of random weights, 32 wide, in the files of a hub repository."""
    import torch
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("clipseg")
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    torch.manual_seed(1)
    config = CLIPSegConfig(
        text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": 20},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=32, reduce_dim=16, extract_layers=[1, 2, 3], decoder_num_attention_heads=2, decoder_intermediate_size=32,
        use_complex_transposed_convolution=False,
    )  # fmt: skip
    made = CLIPSegForImageSegmentation(config)
    with torch.no_grad():
        for p in made.parameters():  # as made, every place is as likely
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.4)
    made.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({w: k for k, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
