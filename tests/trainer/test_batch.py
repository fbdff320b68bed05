"""A step's batch as a picture: the crop that was moved and the mask are in the latents that are trained on."""

import json

import numpy as np
from PIL import Image

from trainer import __main__ as program
from trainer import batch, plan

RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (30, 160, 40)


def test_the_moved_crop_and_the_mask_show_in_the_decoded_batch(settings, one_thread, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    stripes = np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), 256, 1).repeat(128, 0)  # 768 x 128: more than the bucket's shape
    for name in ("a.png", "b.png"):
        Image.fromarray(stripes).save(folder / name)
        half = Image.new("L", (768, 128))
        half.paste(255, (0, 0, 768, 64))
        half.save(folder / name.replace(".png", "-masklabel.png"))
    (folder / "crops.json").write_text('{"a.png": [0, 0.5], "b.png": [1, 0.5]}')
    values = settings({"data": [{"folder": str(folder), "trigger": "zorp"}], "dataset": {"resolution": 128, "flip": True, "max_aspect": 1}})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(values))

    mirrored = set()
    for step in (1, 2, 3):
        out = tmp_path / f"{step}.png"
        assert program.main(["batch", str(run), "--step", str(step), "--out", str(out), "--device", "cpu"]) == 0
        said = capsys.readouterr().out
        sheet = np.asarray(Image.open(out)).astype(float)
        assert sheet.shape == (128, 2 * 128 + batch.GAP, 3)
        rows = [line for line in said.splitlines() if "masked" in line]
        assert len(rows) == 2 and said.splitlines()[-1] == str(out)
        for k, line in enumerate(rows):
            picture = sheet[:, k * (128 + batch.GAP) :][:, :128]
            wanted = RED if "a.png" in line else BLUE
            top, bottom = picture[16:48, 16:112].mean((0, 1)), picture[80:112, 16:112].mean((0, 1))
            assert np.abs(top - wanted).max() < 60, (line, top)
            assert np.abs(bottom - batch.LEFT * top).max() < 20, (line, bottom)
            mirrored.add("mirrored" in line)
    assert mirrored == {True, False}
    assert program.main(["batch", str(run), "--step", "3", "--out", str(out), "--device", "cpu"]) == 0  # nothing is written over
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "3-2.png")
    assert program.main(["batch", str(run), "--step", "99", "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 1
    assert "this run has steps 1 to" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_a_mirrored_image_has_its_mask_mirrored(configure, settings, one_thread, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64), (200, 200, 200)).save(folder / "a.png")
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(folder / "a-masklabel.png")
    changes = {"data": [{"folder": str(folder), "trigger": "zorp"}], "dataset.flip": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings(changes)))
    laid = plan.make(configure(changes), 128, "sd1")
    for flip in (False, True):
        step = 1 + next(n for n, rows in enumerate(laid.steps) if rows[0].flip == flip)
        (row,) = batch.batch(path, step, tmp_path / "out.png", "cpu")
        grey = np.asarray(Image.open(tmp_path / "out.png").convert("L")).astype(float)
        left, right = grey[:, 8:24].mean(), grey[:, 40:56].mean()
        assert row["mirrored"] == flip and (right > 2 * left if flip else left > 2 * right)


def test_the_latents_are_those_that_the_run_has_kept(train, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_ATELIER_CACHE", str(tmp_path / "cache"))
    run = train({"train.visits": 1}).root
    monkeypatch.setattr("trainer.families.common.Common.encode", None)  # nothing is encoded anew
    rows = batch.batch(run, 1, tmp_path / "out.png", "cpu")
    assert rows and Image.open(tmp_path / "out.png").width > 64
