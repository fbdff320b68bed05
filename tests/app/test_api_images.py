"""The routes of images and captions, over HTTP."""

import io
import json
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app import datasets, draft, settings
from app.paths import Home
from trainer import events


def picture(seed: int = 0, size: tuple[int, int] = (300, 200), format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def add(client: TestClient, files: dict[str, bytes]) -> dict:
    answer = client.post("/api/images", files=[("files", (name, content)) for name, content in files.items()])
    assert answer.status_code == 200, answer.text
    return answer.json()


def named(answer: dict) -> dict[str, dict]:
    return {i["name"]: i for i in answer["images"]}


def current(home: Home) -> datasets.Dataset:
    return datasets.open(home, draft.load(home)["dataset"])


def test_an_empty_data_set(client, home):
    answer = client.get("/api/images").json()
    assert answer == {"images": [], "tags": [], "undo": "", "folder": str(current(home).images)}


def test_upload_edit_remove_undo(client, home):
    answer = add(client, {"cats/a.png": picture(1), "cats/b.jpg": picture(2, format="JPEG"), "cats/a.txt": b"cat, red", "x.pdf": b"%PDF"})
    assert answer["added"] == 2 and len(answer["problems"]) == 1 and answer["undo"] == "Add 2 images"
    a = named(answer)["a.png"]
    assert (a["caption"], a["tokens"], answer["tags"]) == ("cat, red", 3, [["cat", 1], ["red", 1]])
    text = '"ohwx", <b>猫</b> & 🐱\'s'
    changed = client.patch(f"/api/images/{a['id']}", json={"caption": text}).json()
    assert changed["caption"] == text and changed["id"] == a["id"]
    assert (current(home).images / "a.txt").read_text(encoding="utf-8") == f"{text}\n"
    removed = client.patch(f"/api/images/{a['id']}", json={"removed": True}).json()
    assert removed["removed"] is True and removed["crop"] is None
    assert client.get("/api/draft").json()["images"] == 1
    undone = client.post("/api/draft/undo").json()
    assert undone["undone"] == "Remove a.png" and named(undone)["a.png"]["caption"] == text
    assert named(client.post("/api/draft/undo").json())["a.png"]["caption"] == "cat, red"
    assert [i["removed"] for i in client.post("/api/draft/undo").json()["images"]] == [True, True]
    assert client.post("/api/draft/undo").json()["undone"] == ""


def test_a_zip_and_a_folder(client, tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../1.png", picture(1))
        archive.writestr("../../1.txt", "zipped")
    assert named(add(client, {"c.zip": out.getvalue()}))["1.png"]["caption"] == "zipped"
    assert not list(tmp_path.glob("*.png"))
    (tmp_path / "my cats").mkdir()
    (tmp_path / "my cats/2.png").write_bytes(picture(2))
    answer = client.post("/api/images/folder", json={"path": f'"{tmp_path / "my cats"}" '}).json()
    assert answer["added"] == 1 and named(answer)["2.png"]["linked"] and not named(answer)["1.png"]["linked"]
    refused = client.post("/api/images/folder", json={"path": "nowhere"})
    assert refused.status_code == 400 and "whole path" in refused.json()["errors"]["path"]
    id = named(answer)["2.png"]["id"]
    client.patch(f"/api/images/{id}", json={"caption": "mine"})
    assert client.post("/api/images/write-back").json()["written"] == 1
    assert (tmp_path / "my cats/2.txt").read_text(encoding="utf-8") == "mine\n"


def test_bulk_edits_use_the_draft_s_trigger(client, home):
    add(client, {"a.png": picture(1), "a.txt": b"a cat", "b.png": picture(2), "b.txt": b"a dog"})
    refused = client.post("/api/images/captions", json={"action": "trigger_first"})
    assert refused.status_code == 400 and "trigger" in refused.json()["errors"]
    draft.update(home, trigger="ohwx")
    answer = client.post("/api/images/captions", json={"action": "trigger_first"}).json()
    assert answer["changed"] == 2 and [i["caption"] for i in answer["images"]] == ["ohwx, a cat", "ohwx, a dog"]
    ids = [answer["images"][0]["id"]]
    answer = client.post("/api/images/captions", json={"action": "replace", "find": "ohwx", "text": "<b>", "ids": ids}).json()
    assert [i["caption"] for i in answer["images"]] == ["<b>, a cat", "ohwx, a dog"]
    assert client.post("/api/images/captions", json={"action": "replace", "find": "x", "ids": ["../../etc"]}).status_code == 404
    assert client.post("/api/images/captions", json={"action": "replace", "fnd": "x"}).status_code == 400


def test_pictures_are_found_by_id_alone_and_kept_by_content(client, home):
    image = named(add(client, {"a.png": picture(1, (900, 600))}))["a.png"]
    thumb = client.get(image["thumb"])
    assert thumb.headers["content-type"] == "image/webp" and "immutable" in thumb.headers["cache-control"]
    assert Image.open(io.BytesIO(thumb.content)).size == (320, 213)
    assert Image.open(io.BytesIO(client.get(image["full"]).content)).size == (900, 600)
    tag = thumb.headers["etag"]
    assert client.get(image["thumb"], headers={"if-none-match": tag}).status_code == 304
    plain = client.get(f"/api/images/{image['id']}/thumb")
    assert plain.headers["cache-control"] == "no-cache" and plain.headers["etag"] == tag
    (home.root / "secret.png").write_bytes(picture(9))
    for id in ("..%2F..%2F..%2Fsecret.png", "secret.png", "a.png", "%00", "..", "..%5Csecret.png"):
        assert client.get(f"/api/images/{id}/thumb").status_code == 404


def test_an_old_tab_cannot_write_into_a_new_data_set(client):
    old = named(add(client, {"a.png": picture(1)}))["a.png"]
    client.post("/api/draft/new")
    new = named(add(client, {"a.png": picture(2)}))["a.png"]
    assert client.patch(f"/api/images/{old['id']}", json={"caption": "from the old tab"}).status_code == 404
    assert client.get("/api/images").json()["images"][0]["caption"] == ""
    assert new["thumb"] != old["thumb"]


def test_undo_brings_the_data_set_before_back(client):
    add(client, {"a.png": picture(1)})
    client.post("/api/draft/new")
    answer = client.get("/api/images").json()
    assert answer["images"] == [] and answer["undo"] == "Start a new training"
    undone = client.post("/api/draft/undo").json()
    assert undone["undone"] == "Start a new training" and list(named(undone)) == ["a.png"] and undone["undo"] == "Add 1 image"
    client.post("/api/draft/example")
    assert len(client.get("/api/images").json()["images"]) == 14
    assert not any(i["badges"] for i in client.get("/api/images").json()["images"])  # placed at the toy's own resolution
    assert list(named(client.post("/api/draft/undo").json())) == ["a.png"]


def test_pictures_are_placed_by_the_draft_s_settings(client, home):
    add(client, {"a.png": picture(1, (900, 600))})
    draft.update(home, changes={"dataset.resolution": 256, "dataset.bucket_step": 32})
    assert max(client.get("/api/images").json()["images"][0]["bucket"]) <= 320
    draft.update(home, changes={"dataset.resolution": "many"})
    assert client.get("/api/images").json()["images"][0]["bucket"][0] >= 512


@pytest.mark.parametrize("megabytes", [60, 65])
def test_how_large_a_file_may_be(client, megabytes):
    raw = picture(1)
    answer = client.post("/api/images", files=[("files", ("large.png", raw + bytes(megabytes * 2**20 - len(raw))))])
    if megabytes == 60:
        assert answer.status_code == 200 and answer.json()["added"] == 1
    else:
        assert answer.status_code == 413 and "large.png has 68 MB" in answer.json()["error"]


def test_what_is_no_upload(client):
    for send in ({"json": {}}, {"data": {"files": "text"}}, {}):
        answer = client.post("/api/images", **send)
        assert answer.status_code == 400 and "called files" in answer.json()["error"]


def test_two_tabs_at_once(client):
    answer = add(client, {f"{k}.png": picture(k) for k in range(6)})
    ids, failed = [i["id"] for i in answer["images"]], []

    def tab(id: str) -> None:
        for k in range(5):
            got = client.patch(f"/api/images/{id}", json={"caption": f"{id} {k}"})
            listed = client.get("/api/images")
            if got.status_code != 200 or listed.status_code != 200 or len(listed.json()["images"]) != 6:
                failed.append((got.text, listed.text))

    tabs = [threading.Thread(target=tab, args=(id,)) for id in ids]
    for each in tabs:
        each.start()
    for each in tabs:
        each.join(60)
    assert not failed
    assert [i["caption"] for i in client.get("/api/images").json()["images"]] == [f"{id} 4" for id in ids]


# ---- captioning


def test_which_captioner_suits(client, home):
    found = client.get("/api/captioners").json()
    about = {"there": False, "usable": True, "note": "", "built_in": False, "prompt": None, "own_prompt": ""}
    blip = {"source": "Salesforce/blip-image-captioning-large", "size_mb": 1880, "title": "BLIP large", "licence": "BSD-3-Clause"}
    assert found["sentences"] == blip | about and found["suits"] == "sentences"
    wd = {"source": "SmilingWolf/wd-vit-tagger-v3", "size_mb": 379, "title": "WD tagger, ViT", "licence": "Apache-2.0"}
    assert found["tags"] == wd | about
    draft.update(home, model="/models/ponyDiffusionV6XL.safetensors")
    assert client.get("/api/captioners").json()["suits"] == "tags"
    settings.save(home, {"captioners": {"/models/ponyDiffusionV6XL.safetensors": "sentences"}})
    assert client.get("/api/captioners").json()["suits"] == "sentences"
    settings.save(home, {"sentences": str(home.root)})
    assert client.get("/api/captioners").json()["sentences"]["there"] is True
    for source, said in (("some/one", "not known"), ("a/b/c", "neither")):
        settings.save(home, {"sentences": source})
        about = client.get("/api/captioners").json()["sentences"]
        assert said in about["note"] and about["usable"] == (source == "some/one")
    add(client, {"a.png": picture(1)})
    refused = client.post("/api/images/caption", json={"style": "sentences"})
    assert refused.status_code == 409 and "a/b/c is neither a folder" in refused.json()["error"]
    assert client.get("/api/images").json()["undo"] == "Add 1 image"


def test_the_example_has_a_captioner_of_its_own_and_nothing_else_has(client, home, runner):
    hub = client.get("/api/captioners").json()["sentences"]
    settings.save(home, {"sentences": "some/other"})  # it hangs on no setting
    client.post("/api/draft/example")
    own = client.get("/api/captioners").json()["sentences"]
    assert own["source"] == str(draft.EXAMPLE_CAPTIONER) and own["there"] is True and own["built_in"] is True
    assert client.post("/api/images/caption", json={"style": "sentences", "which": "all"}).status_code == 200
    words = list(runner.jobs.list()[0].words)
    assert words[words.index("--source") + 1] == str(draft.EXAMPLE_CAPTIONER)
    client.post("/api/images/caption/cancel")
    settings.save(home, {"sentences": hub["source"]})

    mine = add(client, {"mine.png": picture(1)})["images"]  # a picture that it doesn't know
    assert client.get("/api/captioners").json()["sentences"] == hub
    client.patch(f"/api/images/{next(i['id'] for i in mine if i['name'] == 'mine.png')}", json={"removed": True})
    assert client.get("/api/captioners").json()["sentences"]["built_in"] is True
    client.patch("/api/draft", json={"model": "/models/a.safetensors"})
    assert client.get("/api/captioners").json()["sentences"] == hub
    client.post("/api/draft/new")
    assert client.get("/api/captioners").json()["sentences"] == hub


def test_what_is_offered_says_why_how_large_and_under_which_licence(client, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home.root.parent / "hub"))
    known = client.get("/api/captioners").json()["known"]
    assert len(known["sentences"]) >= 4 and len(known["tags"]) >= 2
    for offer in known["sentences"] + known["tags"]:
        assert offer["why"].endswith(".") and offer["licence"] and offer["there"] is False
        assert offer["size_mb"] is None or offer["size_mb"] > 100
    snapshot = home.root.parent / "hub" / "models--SmilingWolf--wd-vit-tagger-v3" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.onnx").write_bytes(b"")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    found = client.get("/api/captioners").json()
    assert found["tags"]["there"] is True and found["known"]["tags"][0]["there"] is True


def test_a_captioner_that_takes_a_prompt_is_told_what_suits_the_purpose(client, home, runner):
    add(client, {"a.png": picture(1)})
    settings.save(home, {"sentences": "Qwen/Qwen3-VL-2B-Instruct"})
    client.patch("/api/draft", json={"purpose": "object", "class_word": "chair", "name": "Zorp"})
    about = client.get("/api/captioners").json()["sentences"]
    assert "call it just “chair”" in about["prompt"] and about["own_prompt"] == ""
    settings.save(home, {"prompts": {"object": "Say where the {subject} is.", "style": "Say all."}})
    assert client.get("/api/captioners").json()["sentences"]["own_prompt"] == "Say where the {subject} is."
    client.post("/api/images/caption", json={"style": "sentences"})
    words = runner.jobs.list()[0].words
    assert {"--purpose=object", "--class-word=chair", "--trigger=zorp", "--set=prompt=Say where the {subject} is."} <= {*words}
    client.post("/api/images/caption/cancel")
    settings.save(home, {"sentences": "Salesforce/blip-image-captioning-large"})  # which would refuse a prompt
    client.post("/api/images/caption", json={"style": "sentences"})
    assert not [w for w in runner.jobs.list()[0].words if w.startswith("--set")]


def test_a_captioning_is_queued_watched_cancelled_and_undone(client, home, runner):
    assert client.post("/api/images/caption", json={"style": "sentences"}).status_code == 409
    add(client, {"a.png": picture(1), "a.txt": b"mine", "b.png": picture(2)})
    draft.update(home, model="/models/a.safetensors", trigger="-zorp")
    settings.save(home, {"sentences": "some/captioner"})
    job = client.post("/api/images/caption", json={"style": "sentences", "which": "missing"}).json()["caption_job"]
    assert (job["style"], job["state"], job["done"]) == ("sentences", "waiting", 0)
    assert settings.load(home).captioners == {"/models/a.safetensors": "sentences"}
    (queued,) = runner.jobs.list()
    assert queued.folder.parent == home.jobs and queued.folder.name == job["id"]
    data = current(home)
    words = ["caption", str(data.images), "--captioner", "auto", "--source", "some/captioner", "--purpose=character", "--trigger=-zorp"]
    assert list(queued.words) == [*words, "--run-dir", str(queued.folder), "--only-missing"]
    assert client.post("/api/images/caption", json={"style": "sentences"}).status_code == 409
    assert client.post("/api/draft/undo").status_code == 409  # while it writes
    # What the captioner does, in its own process:
    runner.unqueue(queued.folder)
    write = events.Writer(queued.folder / "events.jsonl")
    write("started", name="blip", total=1, device="CPU", dtype="fp32", reasons=[])
    (data.images / "b.txt").write_text("a picture of noise\n", encoding="utf-8")
    write("captioned", done=1, total=1, file="b.png", text="a picture of noise", seconds=1)
    write("finished", done=1, total=1, skipped=0, seconds=3)
    write.close()
    job = client.get("/api/draft").json()["caption_job"]
    assert (job["state"], job["done"], job["total"]) == ("finished", 1, 1)
    assert named(client.get("/api/images").json())["b.png"]["caption"] == "a picture of noise"
    assert "already" in client.post("/api/images/caption", json={"style": "sentences", "which": "missing"}).json()["error"]
    undone = client.post("/api/draft/undo").json()
    assert undone["undone"] == "Caption 1 image" and [i["caption"] for i in undone["images"]] == ["mine", ""]
    client.post("/api/images/caption", json={"style": "sentences", "which": "all"})
    assert "--only-missing" not in runner.jobs.list()[0].words
    view = client.post("/api/images/caption/cancel").json()
    assert runner.jobs.list() == [] and view["caption_job"] is None
    assert client.get("/api/images").json()["undo"] != "Caption 2 images"
    assert client.post("/api/images/caption/cancel").status_code == 200


def test_tags_are_added_to_all_or_written_anew_for_one_and_undone(client, home, runner):
    images = named(add(client, {"a.png": picture(1), "a.txt": b"mine", "b b.png": picture(2)}))
    settings.save(home, {"tag_probability": 0.5, "blocked_tags": "watermark, simple background"})
    draft.update(home, changes={"dataset.prompt_weights": True})
    client.post("/api/images/caption", json={"style": "tags", "which": "add"})
    words = list(runner.jobs.list()[0].words)
    assert words[2:6] == ["--captioner", "wd", "--source", "SmilingWolf/wd-vit-tagger-v3"] and words[-1] == "--add"
    assert {"--set=general=0.5", "--set=blocked=watermark, simple background", "--set=escape=true"} <= {*words}
    (current(home).images / "a.txt").write_text("mine, red\n")
    runner.unqueue(runner.jobs.list()[0].folder)
    assert client.post("/api/draft/undo").json()["undone"] == "Caption 2 images"
    assert named(client.get("/api/images").json())["a.png"]["caption"] == "mine"

    client.post("/api/images/caption", json={"style": "tags", "ids": [images["b b.png"]["id"]]})
    words = list(runner.jobs.list()[0].words)
    assert words[-1] == "--only=b b.png" and not {"--only-missing", "--add"} & {*words}
    assert client.get("/api/images").json()["undo"] == "Caption b b.png"
    client.post("/api/images/caption/cancel")
    assert client.post("/api/images/caption", json={"style": "tags", "ids": ["gone"]}).status_code == 404
    assert client.post("/api/images/caption", json={"style": "tags", "ids": []}).status_code == 400
    assert client.get("/api/images").json()["undo"] == "Add 2 images"


def test_several_tags_are_left_out_in_one_step(client):
    add(client, {"a.png": picture(1), "a.txt": b"zorp, Red, small, hat", "b.png": picture(2), "b.txt": b"zorp, red, cat"})
    answer = client.post("/api/images/captions", json={"action": "remove_tag", "find": "red, hat"}).json()
    assert [i["caption"] for i in answer["images"]] == ["zorp, small", "zorp, cat"] and answer["changed"] == 2
    assert [i["caption"] for i in client.post("/api/draft/undo").json()["images"]] == ["zorp, Red, small, hat", "zorp, red, cat"]


def test_the_routes_live_through_a_deleted_folder(client, home):
    import shutil

    add(client, {"a.png": picture(1)})
    shutil.rmtree(current(home).root)
    assert client.get("/api/images").json()["images"] == []
    assert add(client, {"a.png": picture(1)})["added"] == 1
    kept = json.loads((current(home).root / "dataset.json").read_text(encoding="utf-8"))
    assert list(kept["files"]) == ["a.png"]
