"""Crops and masks: what the routes write into a data set, what goes along where, what undo takes back, and what a step will see."""

import io
import json
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from starlette.testclient import TestClient

from app import datasets, draft, masks, subject
from app.context import Context
from app.paths import Home
from app.runner import Runner
from trainer.config import DataConfig
from trainer.data.scan import scan


def picture(seed: int = 0, size: tuple[int, int] = (300, 100), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def half(size: tuple[int, int] = (300, 100)) -> bytes:
    """A mask whose left half counts."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return png(mask)


def add(client: TestClient, **files: bytes) -> dict:
    answer = client.post("/api/images", files=[("files", (name, content)) for name, content in files.items()])
    assert answer.status_code == 200, answer.text
    return answer.json()


def one(answer: dict, name: str) -> dict:
    return next(i for i in answer["images"] if i["name"] == name)


def trained(folder) -> dict[str, tuple]:
    """(focus, whether there is a mask) of each image, as the trainer reads the folder."""
    return {i.path.name: (i.focus, i.mask is not None) for i in scan([DataConfig(folder=folder)]).images}


def data_of(home: Home) -> datasets.Dataset:
    return datasets.open(home, draft.load(home)["dataset"])


def test_a_crop_is_moved_undone_and_goes_into_the_snapshot(client, home, tmp_path):
    image = one(add(client, **{"a.png": png(picture())}), "a.png")
    left, _, width, _ = image["crop"]
    assert image["focus"] == [0.5, 0.5] and left == pytest.approx((1 - width) / 2, abs=0.01) and width < 0.9
    moved = one(client.put(f"/api/images/{image['id']}/focus", json={"focus": [0, 0.5]}).json(), "a.png")
    assert moved["crop"][0] == 0 and moved["crop"][2] == width and moved["bucket"] == image["bucket"]
    data = data_of(home)
    assert json.loads((data.images / "crops.json").read_text()) == {"a.png": [0, 0.5]}
    data.snapshot(tmp_path / "run")
    assert trained(tmp_path / "run") == {"a.png": ((0, 0.5), False)}
    client.patch(f"/api/images/{image['id']}", json={"removed": True})
    client.patch(f"/api/images/{image['id']}", json={"removed": False})
    assert one(client.get("/api/images").json(), "a.png")["focus"] == [0, 0.5]
    for _ in range(2):
        client.post("/api/draft/undo")
    undone = client.post("/api/draft/undo").json()
    assert undone["undone"] == "Move the crop of a.png" and one(undone, "a.png")["crop"] == image["crop"]
    assert client.put(f"/api/images/{image['id']}/focus", json={"focus": [1.5, 0]}).status_code == 400
    assert client.put("/api/images/nobody/focus", json={"focus": None}).status_code == 404


def test_a_damaged_file_of_crops_is_kept_before_it_is_written(client, home):
    image = one(add(client, **{"a.png": png(picture())}), "a.png")
    data = data_of(home)
    (data.images / "crops.json").write_text("[my own notes")
    assert one(client.get("/api/images").json(), "a.png")["focus"] == [0.5, 0.5]
    client.put(f"/api/images/{image['id']}/focus", json={"focus": [0.1, 0.5]})
    assert trained(data.images)["a.png"][0] == (0.1, 0.5)
    assert [p.read_text() for p in data.backup.glob("*crops.json")] == ["[my own notes"]


def test_the_subject_is_found_and_a_mask_says_it_better(client, home):
    rng = np.random.default_rng(3)
    ground = Image.fromarray((120 + 6 * rng.standard_normal((200, 600, 3))).clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(ground).ellipse((60, 60, 130, 140), fill=(250, 60, 20))
    answer = add(client, **{"a.png": png(ground), "plain.png": png(Image.new("RGB", (600, 200), "grey")), "b.png": png(ground.rotate(180))})
    found = client.post("/api/images/focus", json={"how": "subject"}).json()
    assert found["changed"] >= 2
    for name, middle in (("a.png", 95 / 600), ("b.png", 505 / 600)):
        left, _, width, _ = one(found, name)["crop"]
        assert left <= middle <= left + width, name
    assert one(found, "plain.png")["focus"][0] == pytest.approx(0.5, abs=0.02)
    id = one(answer, "a.png")["id"]
    right = Image.new("L", (600, 200))
    right.paste(255, (500, 0, 600, 200))
    client.put(f"/api/images/{id}/mask", content=png(right))
    again = client.post("/api/images/focus", json={"how": "subject", "ids": [id]}).json()
    assert (
        one(found, "a.png")["crop"][0] < 0.05
        and one(again, "a.png")["crop"][0] == pytest.approx(0.2)
        and one(again, "b.png") == one(found, "b.png")
    )
    centred = client.post("/api/images/focus", json={"how": "centre"}).json()
    assert {tuple(i["focus"]) for i in centred["images"]} == {(0.5, 0.5)}


def portrait() -> Image.Image:
    """A face on the right, and on the left a heap of bright discs that stand out more."""
    image = Image.new("RGB", (640, 320), (90, 120, 160))
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(0)
    for _ in range(60):
        x, y, r = int(rng.integers(30, 170)), int(rng.integers(60, 260)), int(rng.integers(6, 24))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(map(int, rng.integers(0, 256, 3))), outline="white")
    x, y, w, h = 460, 80, 120, 150
    draw.ellipse((x, y, x + w, y + h), fill=(224, 180, 150))
    draw.chord((x, y - 10, x + w, y + 0.45 * h), 180, 360, fill=(60, 40, 30))
    for eye in (x + 0.3 * w, x + 0.7 * w):
        draw.rectangle((eye - 16, y + 0.36 * h, eye + 16, y + 0.4 * h), fill=(70, 45, 35))
        draw.ellipse((eye - 12, y + 0.42 * h, eye + 12, y + 0.5 * h), fill=(120, 90, 80))
        draw.ellipse((eye - 6, y + 0.43 * h, eye + 6, y + 0.49 * h), fill=(30, 20, 20))
    draw.polygon([(x + 0.5 * w, y + 0.45 * h), (x + 0.43 * w, y + 0.66 * h), (x + 0.57 * w, y + 0.66 * h)], fill=(205, 160, 130))
    draw.ellipse((x + 0.32 * w, y + 0.74 * h, x + 0.68 * w, y + 0.82 * h), fill=(150, 60, 60))
    return image.filter(ImageFilter.GaussianBlur(2))


def test_the_subject_of_a_character_is_its_face(client, monkeypatch):
    image = one(add(client, **{"a.png": png(portrait())}), "a.png")

    def across() -> float:
        return one(client.post("/api/images/focus", json={"how": "subject", "ids": [image["id"]]}).json(), "a.png")["focus"][0]

    client.patch("/api/draft", json={"purpose": "style"})
    assert across() < 0.4
    client.patch("/api/draft", json={"purpose": "character"})
    assert across() > 0.7
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    assert across() < 0.4


def test_the_point_of_a_piece_lies_where_the_piece_can_be(tmp_path):
    picture(size=(64, 64)).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 8, 64))
    mask.save(tmp_path / "m.png")
    x, y = subject.point(tmp_path / "a.png", (0.5, 1.0), tmp_path / "m.png")
    assert x == 0.25 and y == pytest.approx(0.5)


def test_a_mask_is_painted_over_with_a_backup_and_undone(client, home, tmp_path):
    image = one(add(client, **{"a.png": png(picture(size=(3000, 1000)))}), "a.png")
    assert image["mask"] is None and client.get(f"/api/images/{image['id']}/mask").status_code == 404
    masked = client.put(f"/api/images/{image['id']}/mask", content=half((1500, 500))).json()
    shown = client.get(one(masked, "a.png")["mask"])
    mask = Image.open(io.BytesIO(shown.content))
    assert mask.mode == "L" and mask.size == (1024, 341) and (mask.getpixel((9, 9)), mask.getpixel((1000, 9))) == (255, 0)
    data = data_of(home)
    first = (data.images / "a-masklabel.png").read_bytes()
    client.put(f"/api/images/{image['id']}/mask", content=png(Image.new("L", (300, 100), 255)))
    assert [p.read_bytes() for p in (data.backup / "masks").iterdir()] == [first]
    data.snapshot(tmp_path / "run")
    assert trained(tmp_path / "run") == {"a.png": ((0.5, 0.5), True)}
    client.patch(f"/api/images/{image['id']}", json={"removed": True})
    assert (data.removed / "a-masklabel.png").exists() and not (data.images / "a-masklabel.png").exists()
    client.post("/api/draft/undo")
    assert client.post("/api/draft/undo").json()["undone"] == "Mask a.png"
    assert (data.images / "a-masklabel.png").read_bytes() == first
    client.delete(f"/api/images/{image['id']}/mask")
    assert trained(data.images)["a.png"][1] is False
    client.post("/api/draft/undo")
    assert (data.images / "a-masklabel.png").read_bytes() == first
    client.put(f"/api/images/{image['id']}/mask", content=png(Image.new("L", (300, 100))))  # nothing counts: as none
    assert one(client.get("/api/images").json(), "a.png")["mask"] is None
    refused = client.put(f"/api/images/{image['id']}/mask", content=half((100, 100)))
    assert refused.status_code == 400 and "another shape" in refused.json()["error"]
    assert client.put(f"/api/images/{image['id']}/mask", content=b"no picture").status_code == 400


def test_masks_and_crops_come_in_with_their_images_and_after_them(client, home, tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("cats/a.png", png(picture(1)))
        archive.writestr("cats/a-masklabel.png", half())
        archive.writestr("cats/crops.json", '{"a.png": [0.9, 0.5], "else.png": [0, 0]}')
    files = {"z.zip": out.getvalue(), "b.png": png(picture(2)), "who-masklabel.png": half(), "b-masklabel.png": half((100, 100))}
    answer = add(client, **files)
    data = data_of(home)
    assert answer["added"] == 2 and trained(data.images) == {"a.png": ((0.9, 0.5), True), "b.png": ((0.5, 0.5), False)}
    who, shape = sorted(answer["problems"], reverse=True)
    assert who.startswith("who-masklabel.png is the mask of no image here") and "another shape than b.png" in shape
    late = add(client, **{"b-MASKLABEL.png": half(), "crops.json": b'{"b.png": "left"}'})
    assert late["undo"] == "Add 1 mask" and trained(data.images)["b.png"][1] and late["problems"][0].startswith("crops.json was left out")
    assert one(late, "b.png")["mask"] and len(late["images"]) == 2
    client.post("/api/draft/undo")
    assert not trained(data.images)["b.png"][1]

    run = tmp_path / "run"
    data.snapshot(run)
    other = datasets.create(home)
    other.add_folder(run)
    assert trained(other.images) == trained(data.images)


def test_transparency_becomes_a_mask(client, home):
    clear = picture(1).convert("RGBA")
    clear.putalpha(Image.open(io.BytesIO(half())))
    answer = add(client, **{"a.png": png(clear), "b.png": png(picture(2)), "c.png": png(picture(3).convert("RGBA"))})
    assert {i["name"]: i["transparent"] for i in answer["images"]} == {"a.png": True, "b.png": False, "c.png": False}
    done = client.post("/api/images/masks/alpha", json={}).json()
    assert done["changed"] == 1 and (data_of(home).images / "a-masklabel.png").read_bytes() == half()
    assert client.post("/api/images/masks/alpha", json={}).json()["changed"] == 0


def test_masks_by_words_are_a_job_that_is_taken_back_whole(client, home, runner):
    assert client.post("/api/images/masks/words", json={"prompt": "cat"}).status_code == 409
    first = one(add(client, **{"a.png": png(picture(1)), "b.png": png(picture(2))}), "a.png")
    client.put(f"/api/images/{first['id']}/mask", content=half())
    assert client.post("/api/images/masks/words", json={"prompt": " "}).status_code == 400
    answer = client.post("/api/images/masks/words", json={"prompt": "the  cat"}).json()
    assert answer["job"]["state"] == "waiting" and answer["source"] == "CIDAS/clipseg-rd64-refined" and answer["size_mb"] == 600
    (job,) = runner.jobs.list()
    assert (
        job.kind == "mask"
        and list(job.words[:4]) == ["mask", str(data_of(home).images), "--prompt=the cat", "--source"]
        and "--only-missing" in job.words
    )
    refused = client.post("/api/draft/undo")
    assert refused.status_code == 409 and "Cancel" in refused.json()["error"]
    assert client.post("/api/images/masks/words", json={"prompt": "cat"}).status_code == 409
    assert client.post("/api/images/masks/words/cancel").json()["job"] is None
    assert client.get("/api/images").json()["undo"] == "Mask a.png" and not runner.jobs.list()
    data = data_of(home)
    data.checkpoint_masks(f"{masks.BY_WORDS}cat")  # as the job begins; the trainer then writes
    (data.images / "b-masklabel.png").write_bytes(half())
    (data.images / "a-masklabel.png").write_bytes(png(Image.new("L", (300, 100), 9)))
    client.post("/api/draft/undo")
    assert (data.images / "a-masklabel.png").read_bytes() == half() and not (data.images / "b-masklabel.png").exists()


def test_what_a_step_sees_is_what_the_plan_trains(client, home, tmp_path):
    assert client.get("/api/draft/seen?step=1").status_code == 409
    client.post("/api/draft/example")
    image = client.get("/api/images").json()["images"][0]
    client.put(f"/api/images/{image['id']}/mask", content=half((image["width"], image["height"])))
    from app.api.runs import _from_draft  # what Start would train on
    from trainer import plan
    from trainer.config.load import validate

    run = _from_draft(Context(home, Runner(home)))
    config = validate(json.loads((run.folder / "config.json").read_text()))
    laid = plan.make(config, 128, "sd1")
    for step in (1, 17, len(laid.steps)):
        told = client.get(f"/api/draft/seen?step={step}").json()
        assert told["total"] == len(laid.steps)
        wanted = plan.seen(laid, config, step)
        keys = ("caption", "mirrored", "crop", "bucket", "masked")
        assert [[r[k] for k in keys] + [r["file"]] for r in told["rows"]] == [[r[k] for k in keys] + [r["file"].name] for r in wanted]
        assert all(r["full"].startswith("/api/images/") and bool(r["mask"]) == r["masked"] for r in told["rows"])
    refused = client.get("/api/draft/seen?step=0")
    assert refused.status_code == 409 and "steps 1 to" in refused.json()["error"]


def test_a_runs_batch_is_decoded_when_the_device_is_free(client, home, runner):
    client.post("/api/draft/example")
    from app.api.runs import _from_draft

    id = _from_draft(Context(home, runner)).id
    assert client.get(f"/api/runs/{id}/batch").json() == {"state": "none", "text": "", "step": None, "rows": [], "picture": None}
    assert client.get(f"/api/runs/{id}/batch/picture").status_code == 404
    assert client.post(f"/api/runs/{id}/batch", json={"step": 0}).status_code in (400, 422)
    asked = client.post(f"/api/runs/{id}/batch", json={"step": 2}).json()
    assert asked["state"] == "waiting" and client.post(f"/api/runs/{id}/batch", json={"step": 3}).status_code == 409
    (job,) = runner.jobs.list()
    assert (job.kind, job.words[0], job.words[2]) == ("batch", "batch", "--step=2")
    deadline = time.monotonic() + 60
    while (now := client.get(f"/api/runs/{id}/batch").json())["state"] in ("waiting", "starting", "running"):
        assert time.monotonic() < deadline, now
        runner.tick()
        time.sleep(0.2)
    assert (now["state"], now["step"]) == ("finished", 2), now
    told = client.get("/api/draft/seen?step=2").json()["rows"]
    assert [(r["file"], r["caption"], r["mirrored"]) for r in now["rows"]] == [(r["file"], r["caption"], r["mirrored"]) for r in told]
    shown = Image.open(io.BytesIO(client.get(now["picture"]).content))
    assert shown.height >= 128 and shown.width >= 128
    assert client.post("/api/runs/nobody/batch", json={"step": 2}).status_code == 404
