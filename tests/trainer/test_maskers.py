"""Masks by words: what the model finds in each image stands beside it, what was there is backed up, and what cannot mask is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import __main__ as program
from trainer import control, events
from trainer.captioners import files
from trainer.config import DataConfig
from trainer.data.scan import scan
from trainer.maskers import clipseg
from trainer.maskers.job import mask
from trainer.run_dir import RunDir, is_alive

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(draw_pictures, tmp_path) -> Path:
    folder = draw_pictures(tmp_path / "images", [(64, 64), (96, 48), (64, 64)])
    draw_pictures(folder / "more", [(1400, 700)], seed=5)
    return folder


def job(root: Path, *kinds: str) -> list[dict]:
    return [e for e in events.read(root / "events.jsonl") if not kinds or e["type"] in kinds]


def masks(folder: Path) -> dict[str, Path | None]:
    """The mask of each image, as the trainer finds it (and takes its shape)."""
    return {i.path.relative_to(folder).as_posix(): i.mask for i in scan([DataConfig(folder=folder)]).images}


def test_a_mask_is_what_the_model_finds_for_these_words(small_clipseg, folder, tmp_path):
    root = tmp_path / "job"
    assert mask(folder, root, " a  cat ", settings={"source": str(small_clipseg), "batch": 3}, device="cpu") == "finished"
    told = {e["file"]: e["area"] for e in job(root, "masked")}
    found = masks(folder)
    assert set(told) == set(found) and {n for n, m in found.items() if m} == {n for n, area in told.items() if area}
    assert sum(bool(m) for m in found.values()) >= 2, told
    end = job(root)[-1]
    assert (end["type"], end["done"], end["total"], end["found"]) == ("finished", 4, 4, sum(bool(m) for m in found.values()))
    asked = json.loads((root / "config.json").read_text())
    assert (asked["prompt"], asked["source"]) == ("a cat", str(small_clipseg)) and not (root / "backup").exists()

    # transformers alone finds the same places
    import torch
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    name = next(n for n, m in found.items() if m)
    image = Image.open(folder / name).convert("RGB")
    pixels = ViTImageProcessorPil.from_pretrained(small_clipseg)(image, return_tensors="pt")
    with torch.no_grad():
        logits = CLIPSegForImageSegmentation.from_pretrained(small_clipseg).eval()(
            **CLIPTokenizer.from_pretrained(small_clipseg)("a cat", return_tensors="pt"), **pixels
        )
    likely = logits.logits.reshape(64, 64).sigmoid().numpy()
    grey = np.asarray(Image.open(found[name]).resize((64, 64), Image.Resampling.BOX))
    assert grey[likely > 0.7].mean() > 200 and grey[likely < 0.1].mean() < 55
    assert Image.open(found["more/00.png"]).size == (1024, 512)

    other = tmp_path / "other"
    mask(folder, other, "a dog", settings={"source": str(small_clipseg)}, device="cpu")
    assert {e["file"]: e["area"] for e in job(other, "masked")} != told  # the words matter


def test_what_stood_there_is_backed_up_a_stop_is_heeded_and_only_missing_goes_on(small_clipseg, folder, tmp_path):
    root, settings = tmp_path / "job", {"source": str(small_clipseg), "batch": 1}
    Image.new("L", (64, 64), 77).save(folder / "00-MaskLabel.png")
    mine = (folder / "00-MaskLabel.png").read_bytes()

    def show(event):
        if event["type"] == "masked" and event["done"] == 2:
            control.send(RunDir(root), "stop")

    assert mask(folder, root, "cat", settings=settings, device="cpu", show=show) == "stopped"
    first = {e["file"]: e["area"] for e in job(root, "masked")}
    assert len(first) == 2 and not is_alive(RunDir(root))
    assert first["00.png"] and (root / "backup" / "00-MaskLabel.png").read_bytes() == mine
    assert not (folder / "00-masklabel.png").exists()
    kept = {p: p.read_bytes() for p in folder.rglob("*.png") if "mask" in p.name.lower()}
    assert mask(folder, root, "cat", settings=settings, only_missing=True, device="cpu") == "finished"
    again = [e["file"] for e in job(root, "masked")][2:]
    assert "00.png" not in again and "more/00.png" in again and job(root, "started")[-1]["total"] == len(again)
    assert len(kept) == 2 and all(p.read_bytes() == raw for p, raw in kept.items())


def test_images_of_one_name_and_unreadable_ones_are_passed_over(small_clipseg, folder, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(folder / "00.jpg")
    (folder / "02.png").write_bytes(b"no image")
    words = ["mask", str(folder), "--prompt", "cat", "--source", str(small_clipseg), "--run-dir", str(tmp_path / "job"), "--device", "cpu"]
    assert program.main(words) == 0
    said = capsys.readouterr().out
    assert "00.jpg would share its mask" in said and "02.png cannot be read" in said and "2 of 3: more/00.png: " in said
    assert job(tmp_path / "job")[-1]["skipped"] == 3 and not (folder / "00-masklabel.png").exists()


def test_nothing_found_leaves_what_is_there(small_clipseg, folder, tmp_path, monkeypatch):
    Image.new("L", (64, 64), 77).save(folder / "00-masklabel.png")
    mine = (folder / "00-masklabel.png").read_bytes()
    monkeypatch.setattr(clipseg, "build", lambda *given: lambda images, words: [np.full((64, 64), 0.9, np.float32)] * len(images))
    mask(folder, tmp_path / "job", "unicorn", settings={"source": str(small_clipseg)}, device="cpu")
    assert job(tmp_path / "job")[-1]["found"] == 0 and {n: bool(m) for n, m in masks(folder).items() if m} == {"00.png": True}
    assert (folder / "00-masklabel.png").read_bytes() == mine


def test_what_cannot_mask_is_refused_with_a_sentence(small_clipseg, folder, tmp_path, capsys):
    def copy(name: str, leave: str = "", **changes: object) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in small_clipseg.iterdir():
            if path.name != leave:
                (target / path.name).write_bytes(path.read_bytes())
        if changes:
            (target / "config.json").write_text(json.dumps(json.loads((target / "config.json").read_text()) | changes))
        return target

    pickle = copy("pickle", "model.safetensors")
    (pickle / "pytorch_model.bin").write_bytes(b"\x80\x02")
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    expected = {
        pickle: "pytorch_model.bin is a pickle and is not opened",
        torn: "model.safetensors",
        copy("words", "vocab.json"): "tokenizer.json is missing",
        copy("processor", "preprocessor_config.json"): "preprocessor_config.json is missing",
        copy("other", model_type="sam"): "a model of the kind sam (CLIPSegForImageSegmentation). Give a CLIPSeg model",
        tmp_path / "none": "there is no such folder",
        folder / "00.png": "which is a file",
    }
    for n, (source, words) in enumerate(expected.items()):
        root = tmp_path / f"job-{n}"
        assert (
            program.main(["mask", str(folder), "--prompt", "cat", "--source", str(source), "--run-dir", str(root), "--device", "cpu"]) == 1
        )
        assert words in capsys.readouterr().err and words in job(root)[-1]["text"] and not is_alive(RunDir(root))
    assert program.main(["mask", str(folder), "--prompt", " ", "--source", str(small_clipseg), "--run-dir", str(tmp_path / "job")]) == 1
    assert "--prompt is empty" in capsys.readouterr().err and not list(folder.rglob("*masklabel*"))


def test_of_the_hub_only_the_needed_files_are_fetched_and_torch_waits():
    class Sibling:
        def __init__(self, name):
            self.rfilename = name

    names = {"config.json", "preprocessor_config.json", "model.safetensors", "vocab.json", "merges.txt"}
    others = {"pytorch_model.bin", "README.md", "weights/x.safetensors"}
    assert {f.rfilename for f in files.wanted(clipseg.SHAPE, "a/b", [Sibling(n) for n in names | others])} == names
    code = "import sys, trainer.maskers.job; print('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
