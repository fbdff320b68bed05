"""Data sets as things: versions, the list, copies, the trash, zips out and in, and what other programs make."""

import io
import json
import zipfile

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app import caption_lists, datasets, draft, exchange, pictures, preflight
from app.errors import Problem
from app.paths import Home
from tests.app.test_api_images import picture
from trainer.config.load import validate
from trainer.data.scan import scan


def make(home: Home, n: int = 3, name: str = "Cats") -> datasets.Dataset:
    """n pictures with captions; the first has a mask and a crop of its own."""
    data = datasets.create(home, name)
    files = [(f"{k}.png", io.BytesIO(picture(k, (80, 60)))) for k in range(n)]
    files += [(f"{k}.txt", io.BytesIO(f"mycat, scene {k}".encode())) for k in range(n)]
    data.add_files(files)
    cover = io.BytesIO()
    Image.fromarray(np.eye(60, 80, dtype=np.uint8) * 255).save(cover, "PNG")
    data.set_mask(data.image_id("0.png"), cover.getvalue())
    data.set_focus({data.image_id("0.png"): (0.5, 0.25)})
    exchange.describe(data, notes="two\nlines", trigger="mycat", class_word="cat")
    return data


def exported(data: datasets.Dataset) -> bytes:
    return b"".join(exchange.export(data))


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def texts(data: datasets.Dataset) -> dict[str, str]:
    return data.texts()


# ---- versions


def test_a_version_changes_with_everything_that_is_trained_and_with_nothing_else(home):
    data = make(home)
    first = exchange.version(data.images, home.cache)
    assert len(first) == 12 and exchange.version(data.images, home.cache) == first
    seen = [first]
    id = data.image_id("1.png")
    for change in (
        lambda: data.set_caption(id, "mycat, another scene"),
        lambda: data.set_focus({id: (0.1, 0.1)}),
        lambda: data.set_mask(data.image_id("0.png"), None),
        lambda: data.remove([id]),
    ):
        change()
        seen.append(exchange.version(data.images, home.cache))
    assert len(set(seen)) == 5
    for _ in range(4):
        data.undo()
    assert exchange.version(data.images, home.cache) == first
    exchange.describe(data, name="Other", notes="changed")
    assert exchange.version(data.images, home.cache) == first
    assert exchange.version(datasets.create(home).images, home.cache) == ""


# ---- out and in


def test_a_zip_comes_back_as_it_was(home, tmp_path):
    data = make(home)
    raw = exported(data)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(
            ["dataset.json", "crops.json", "0.png", "0.txt", "0-masklabel.png", "1.png", "1.txt", "2.png", "2.txt"]
        )
        assert json.loads(archive.read("crops.json")) == {"0.png": [0.5, 0.25]}
        archive.extractall(tmp_path / "out")
    unpacked = scan(validate({"data": [{"folder": str(tmp_path / "out")}]}).data)  # as it is, it can be trained on
    assert len(unpacked.images) == 3 and unpacked.images[0].mask and unpacked.images[0].focus == (0.5, 0.25)
    (new,), problems = exchange.bring_files(home, [("cats.zip", io.BytesIO(raw))])
    assert problems == [] and new.id != data.id and new.undo_label() == ""
    assert exchange.version(new.images, home.cache) == exchange.version(data.images, home.cache)
    facts = new.read()
    assert [facts[k] for k in exchange.FIELDS] == ["Cats", "two\nlines", "mycat", "cat"]
    (again,), _ = exchange.bring_folder(home, str(tmp_path / "out"))
    assert again.read()["trigger"] == "mycat" and again.masked() == 1


def test_a_zip_is_written_in_pieces(home):
    data = datasets.create(home, "Large")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8))
    out = io.BytesIO()
    noise.save(out, "PNG", compress_level=0)
    data.add_files([("a.png", io.BytesIO(out.getvalue()))])
    pieces = list(exchange.export(data))
    assert len(pieces) > 3 and max(map(len, pieces)) < 2 * 2**20
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
        assert archive.read("a.png") == out.getvalue()


def test_folders_of_kohya_become_sets_of_their_own(home, tmp_path):
    files = {}
    for folder, n in (("img/10_zorp creature", 3), ("img/20_owla", 2), ("reg/1_creature", 2)):
        for k in range(n):
            files[f"lora/{folder}/{k}.png"] = picture(len(files))
            files[f"lora/{folder}/{k}.caption"] = f"scene {len(files)}".encode()
    made, problems = exchange.bring_files(home, [("lora.zip", io.BytesIO(zipped(files)))])
    assert problems == []
    facts = [d.read() for d in made]
    assert [(f["name"], f["trigger"], f["class_word"], f["repeats"], f["class_images"]) for f in facts] == [
        ("zorp creature", "zorp", "creature", 10, False), ("owla", "owla", "", 20, False), ("creature", "", "creature", 1, True),
    ]  # fmt: skip
    assert [d.count() for d in made] == [3, 2, 2] and [len(texts(d)) for d in made] == [3, 2, 2]
    assert len(list(home.datasets.iterdir())) == 3
    single = tmp_path / "5_fox animal"
    single.mkdir()
    (single / "a.png").write_bytes(picture(50))
    (fox,), _ = exchange.bring_folder(home, str(single))
    assert (fox.read()["trigger"], fox.read()["class_word"], fox.read()["repeats"]) == ("fox", "animal", 5)
    assert fox.read()["files"]["a.png"]["origin"] == str(single / "a.png")  # used in place


def test_an_import_can_be_cancelled_while_its_pictures_are_looked_at(home, monkeypatch):
    look, told = pictures.inspect, []

    def slow(path, cache):
        told.append(datasets.looking(home))
        if len(told) == 4:
            datasets.stop_looking(home)
        return look(path, cache)

    monkeypatch.setattr(pictures, "inspect", slow)
    raw = zipped({f"{k}.png": picture(k) for k in range(20)})
    with pytest.raises(Problem, match="Cancelled; nothing was added"):
        exchange.bring_files(home, [("cats.zip", io.BytesIO(raw))])
    assert told[0]["total"] == 20 and len(told) < 20
    assert exchange.every(home, "") == [] and not list(home.datasets.iterdir()) and datasets.looking(home) is None


LISTS = {
    "metadata.jsonl": b'{"file_name": "a.png", "text": "one"}\n\n{"file_name": "sub/b.png", "text": "two, three"}\n',
    "metadata.csv": b'file_name,text\na.png,one\nsub/b.png,"two, three"\n',
    "captions.tsv": b"image\tcaption\na.png\tone\nsub/b.png\ttwo, three\n",
    "list.csv": b'a.png,one\nsub/b.png,"two, three"\n',
    "meta_cap.json": b'{"a": {"caption": "one"}, "sub/b": {"caption": "two", "tags": "three"}}',
    "plain.json": b'{"a.png": "one", "sub/b.png": "two, three"}',
    "rows.json": b'[{"image": "a.png", "caption": ["one", "or this"]}, {"image": "sub\\\\b.png", "caption": "two, three"}]',
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_captions(home, tmp_path, name):
    files = {"a.png": picture(1), "sub/b.png": picture(2), name: LISTS[name]}
    (new,), problems = exchange.bring_files(home, [("x.zip", io.BytesIO(zipped({f"top/{k}": v for k, v in files.items()})))])
    assert problems == [] and texts(new) == {"a.png": "one", "b.png": "two, three"}
    for path, raw in files.items():  # the same on the disk, as a Hugging Face image folder lies there
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(raw)
    (new,), problems = exchange.bring_folder(home, str(tmp_path))
    assert problems == [] and texts(new) == {"a.png": "one", "b.png": "two, three"}


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe{", b"[1, 2]", b'{"a": 1', b"[" * 5000, b'"text"', b"null", b'{"name": "x", "width": 3}'])
def test_what_is_no_list_of_captions(raw):
    for suffix in caption_lists.SUFFIXES:
        assert not caption_lists.read(f"x{suffix}", raw) or suffix in (".csv", ".tsv")
    assert caption_lists.read("dataset.json", b'{"name": "x"}') is None and caption_lists.read("a.txt", b"a,b") is None


@pytest.mark.parametrize("files", [{}, {"a.txt": b"alone"}, {"x.pdf": b"%PDF"}], ids=str)
def test_an_import_without_images_leaves_nothing_behind(home, client, files):
    draft.load(home)
    before = sorted(home.datasets.iterdir())
    answer = client.post("/api/datasets/import", files=[("files", ("x.zip", zipped(files)))])
    assert answer.status_code == 400 and "no image" in answer.json()["error"]
    assert sorted(home.datasets.iterdir()) == before


def test_a_zip_that_means_harm_is_told(home, client):
    evil = zipped({"../../evil.png": picture(1), "/abs/dataset.json": b'{"name": 5, "trigger": "x"}'})
    (new,), _ = exchange.bring_files(home, [("x.zip", io.BytesIO(evil))])
    assert new.names() == ["evil.png"] and new.read()["name"] == "x" and new.read()["trigger"] == "x"
    assert client.post("/api/datasets/import", files=[("files", ("x.zip", b"no zip"))]).status_code == 400


# ---- the routes


def test_the_list_names_copies_and_the_trash(client: TestClient, home):
    cats = make(home)
    opened = client.post(f"/api/datasets/{cats.id}/open").json()["draft"]
    assert (opened["dataset"], opened["name"], opened["trigger"], opened["class_word"]) == (cats.id, "Cats", "mycat", "cat")
    changed = client.patch(f"/api/datasets/{cats.id}", json={"name": " My  cats ", "notes": "a\nb "}).json()
    (row,) = [s for s in changed["datasets"] if s["id"] == cats.id]
    assert (row["name"], row["notes"], row["images"], row["current"]) == ("My cats", "a\nb", 3, True)
    assert client.patch(f"/api/datasets/{cats.id}", json={"notes": "x" * 5000}).status_code == 400
    (copy,) = client.post(f"/api/datasets/{cats.id}/duplicate").json()["added"]
    detail = client.get(f"/api/datasets/{copy}").json()
    assert detail["name"] == "My cats (copy)" and detail["version"] == client.get(f"/api/datasets/{cats.id}").json()["version"]
    datasets.open(home, copy).set_caption(datasets.open(home, copy).image_id("0.png"), "changed")
    assert cats.caption_of(cats.image_id("0.png")) == "mycat, scene 0"
    assert client.get(f"/api/datasets/{copy}/thumb").headers["content-type"] == "image/webp"
    after = client.post(f"/api/datasets/{copy}/trash").json()
    assert copy not in [s["id"] for s in after["datasets"]] and (home.trash / copy / "images/0.png").is_file()
    assert client.get(f"/api/datasets/{copy}").status_code == 404
    back = client.post(f"/api/datasets/{copy}/restore").json()
    assert copy in [s["id"] for s in back["datasets"]]
    assert client.post(f"/api/datasets/{copy}/restore").status_code == 404
    client.post(f"/api/datasets/{cats.id}/trash")  # the one that is open
    assert client.get("/api/images").json()["images"] == [] and (home.trash / cats.id).is_dir()
    assert client.get("/api/datasets/../x").status_code in (404, 405)


def test_a_data_set_is_found_again_under_what_it_was_trained_as(client, home):
    client.post("/api/images", files=[("files", ("a.png", picture(1)))])
    client.patch("/api/draft", json={"name": "Fox", "trigger": "foxu", "class_word": "fox"})
    old = draft.load(home)["dataset"]
    client.post("/api/draft/new")
    (row,) = [s for s in client.get("/api/datasets").json()["datasets"] if s["id"] == old]
    assert (row["name"], row["trigger"], row["class_word"], row["current"]) == ("Fox", "foxu", "fox", False)
    client.patch("/api/draft", json={"name": "Kept"})
    now = client.post(f"/api/datasets/{old}/open").json()["draft"]
    assert (now["name"], now["trigger"]) == ("Kept", "foxu")  # a name of its own stays


def test_export_and_import_over_http(client, home):
    cats = make(home)
    answer = client.get(f"/api/datasets/{cats.id}/export")
    assert answer.headers["content-type"] == "application/zip" and "Cats.zip" in answer.headers["content-disposition"]
    brought = client.post("/api/datasets/import", files=[("files", ("cats.zip", answer.content))]).json()
    assert brought["problems"] == [] and draft.load(home)["dataset"] == brought["added"][0] != cats.id
    assert len(client.get("/api/images").json()["images"]) == 3
    assert client.post("/api/datasets/import-folder", json={"path": "/none/there"}).status_code == 400


def test_sets_of_kohya_are_trained_together(client, home, tmp_path):
    for folder, n in (("10_zorp creature", 2), ("30_owla bird", 2), ("reg/1_creature", 3)):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(n):
            (tmp_path / folder / f"{k}.png").write_bytes(picture(10 * len(folder) + k))
    assert len(client.post("/api/datasets/import-folder", json={"path": str(tmp_path)}).json()["added"]) == 3
    now = client.patch("/api/draft", json={"changes": {"train.visits": 100}}).json()["draft"]
    assert (now["trigger"], now["class_word"]) == ("zorp", "creature")
    assert [(s["kind"], s["visits"], s["trigger"], s["class_word"]) for s in now["sets"]] == [
        ("train", 300, "owla", "bird"), ("prior", 10, "", "creature"),
    ]  # fmt: skip
    assert preflight.make(home)["images"] == 7
