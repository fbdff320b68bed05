"""Data sets on disk: what comes in and how, what stays out, captions, undo."""

import io
import json
import os
import struct
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import caption_texts, datasets, intake, pictures
from app.errors import Problem
from app.paths import ROOT, Home
from trainer.config import DataConfig
from trainer.data.scan import scan


def picture(seed: int = 0, size: tuple[int, int] = (96, 64), format: str = "PNG", **options) -> bytes:
    """A noisy picture, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def packed(members: dict[str, bytes], **options) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, **options)
    return out.getvalue()


def add(data: datasets.Dataset, files: dict[str, bytes]) -> tuple[int, list[str]]:
    return data.add_files([(name, io.BytesIO(content)) for name, content in files.items()])


def captions(data: datasets.Dataset) -> dict[str, str]:
    """The captions of the active images, as the trainer reads them from the folder."""
    return {i.path.name: i.caption for i in scan([DataConfig(folder=data.images)]).images}


def ids(data: datasets.Dataset, *names: str) -> list[str]:
    known = {i["name"]: i["id"] for i in data.items()}
    return [known[n] for n in names]


def active(data: datasets.Dataset) -> list[str]:
    return [i["name"] for i in data.items() if not i["removed"]]


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def data(home) -> datasets.Dataset:
    return datasets.create(home)


# ---- coming in


def test_images_come_in_with_their_captions_and_are_described(data):
    assert add(data, {"b.png": picture(1, (600, 400)), "a.jpg": picture(2, format="JPEG"), "a.txt": b"a  cat,\nred"}) == (2, [])
    a, b = data.items()
    assert (a["name"], a["caption"], a["has_caption"], a["width"], a["height"]) == ("a.jpg", "a cat, red", True, 96, 64)
    assert (b["name"], b["caption"], b["has_caption"], b["removed"], b["linked"]) == ("b.png", "", False, False, False)
    assert b["bucket"] == [640, 384] and b["upscale"] == pytest.approx(640 / 600, abs=0.001)
    assert b["crop"] == pytest.approx([0, 0.05, 1, 0.9])
    assert captions(data) == {"a.jpg": "a cat, red", "b.png": ""}
    assert (data.images / "b.png").read_bytes() == picture(1, (600, 400))


def test_two_images_of_a_name_keep_their_own_captions(data):
    files = {f"{d}/{n}": c for d, s in (("a", 1), ("b", 2)) for n, c in (("1.png", picture(s)), ("1.txt", f"of {d}".encode()))}
    assert add(data, files) == (2, [])
    assert sorted(captions(data).items()) == [("1 (2).png", "of b"), ("1.png", "of a")]


def test_images_that_share_a_stem_do_not_share_a_caption(data):
    add(data, {"a.png": picture(1), "a.txt": b"the first"})
    assert add(data, {"a.jpg": picture(2, format="JPEG")}) == (1, [])
    assert captions(data) == {"a.png": "the first", "a.jpg": ""}
    data.set_caption(*ids(data, "a.jpg"), "the second")
    assert captions(data) == {"a.png": "the first", "a.jpg": "the second"}
    data.remove(ids(data, "a.png"))
    data.restore([i["id"] for i in data.items() if i["removed"]])
    assert captions(data) == {"a.png": "the first", "a.jpg": "the second"}
    add(data, {"a.png.jpg": picture(3, format="JPEG")})
    assert captions(data)["a.png"] == "the first" and len(captions(data)) == 3


@pytest.mark.parametrize("name", ["cat.txt", "cat.png.txt", "cat.caption", "texts/cat.txt", "CAT.TXT"])
def test_a_caption_may_come_before_or_after_its_image(data, name):
    added, problems = add(data, {name: b"early"})
    assert added == 0 and len(problems) == 1 and "kept for an image of that name" in problems[0]
    assert add(data, {"pics/cat.png": picture()}) == (1, [])
    assert captions(data) == {"cat.png": "early"}
    assert add(data, {name: b"late"}) == (0, [])
    assert captions(data) == {"cat.png": "late"}
    assert data.undo() == "Add 1 caption"
    assert captions(data) == {"cat.png": "early"}


def test_a_caption_that_could_belong_to_several_images_is_named(data):
    add(data, {"a/1.png": picture(1), "b/1.png": picture(2)})
    added, problems = add(data, {"1.txt": b"whose?"})
    assert added == 0 and "could belong to 1 (2).png, 1.png" in problems[0]
    assert set(captions(data).values()) == {""}


def test_what_is_no_image_is_named_and_system_files_are_not(data):
    files = {
        "notes.pdf": b"%PDF", "cat.heic": b"x", "torn.png": picture()[:500], "text.png": b"hello", "empty.jpg": b"", "tiny.png": picture(1, (8, 8)),
        "cats/.DS_Store": b"x", "Thumbs.db": b"x", "__MACOSX/._cat.png": b"x", "desktop.ini": b"x", "cat-masklabel.png": picture(),
        "good.jfif": picture(3, format="JPEG"),
    }  # fmt: skip
    added, problems = add(data, files)
    assert added == 1 and active(data) == ["good.jpg"]
    assert len(problems) == 7
    for name, said in {
        "notes.pdf": "is no image", "cat.heic": "Convert it to .png", "torn.png": "damaged or cut off", "text.png": "holds no image", "empty.jpg": "0 bytes",
        "tiny.png": "8 x 8", "cat-masklabel.png": "mask",
    }.items():  # fmt: skip
        assert [said in p for p in problems if p.startswith(name)] == [True]


def test_the_same_file_again_is_not_added_twice_and_a_removed_one_comes_back(data):
    add(data, {"cat.png": picture(1), "cat.txt": b"mine"})
    added, problems = add(data, {"again/cat.png": picture(1)})
    assert added == 0 and "already" in problems[0]
    data.remove(ids(data, "cat.png"))
    assert active(data) == []
    assert add(data, {"cat.png": picture(1)}) == (1, [])
    assert captions(data) == {"cat.png": "mine"}


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/evil.png", "C:\\Windows\\evil.png", "..\\evil.png", "a/../../evil.png"])
def test_names_never_lead_out_of_the_data_set(data, home, name):
    outside = {p for p in home.root.parent.rglob("*") if not p.is_relative_to(data.root)}
    assert add(data, {name: picture(1)}) == (1, [])
    data.set_caption(*ids(data, "evil.png"), "x")
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    added, problems = add(data, {"x.zip": packed({name.replace("evil", "zipped"): picture(2), link: b"/etc/passwd"})})
    assert added == 1 and ["link.png in x.zip is a link" in p for p in problems] == [True]
    assert active(data) == ["evil.png", "zipped.png"]
    after = {p for p in home.root.parent.rglob("*") if not p.is_relative_to(data.root)}
    assert not [p for p in after - outside if home.cache not in p.parents and p != home.cache]


@pytest.mark.parametrize("name", ['q"uo<te>s?.png', "con.png", "ü🐱猫.png", "a" * 300 + ".png", "dots. .png", "%22x%22.png", "a\nb.png"])
def test_odd_names_become_files_of_any_system(data, name):
    assert add(data, {name: picture(), f"{name[:-4]}.txt": b"text"}) == (1, [])
    (image,) = data.items()
    assert image["caption"] == "text"
    assert not set(image["name"]) & set('<>:"/\\|?*\n') and len(image["name"].encode()) < 230 and image["name"] != "con.png"


def test_a_zip_of_images_and_captions(data):
    content = packed(
        {"cats/1.png": picture(1), "cats/1.txt": b"one", "cats/sub/1.png": picture(2), "cats/sub/1.txt": b"two", "cats/.DS_Store": b"x"}
    )
    assert add(data, {"cats.zip": content}) == (2, [])
    assert captions(data) == {"1.png": "one", "1 (2).png": "two"}


def test_zips_that_are_bombs_or_nested_or_damaged_are_refused(data):
    bomb = packed({"big.bmp": bytes(40 * intake.MB)}, compress_type=zipfile.ZIP_DEFLATED)
    large = packed({"large.png": bytes(65 * intake.MB), "good.png": picture(1)})
    nested = packed({"inner.zip": packed({"a.png": picture(2)})})
    lying = bytearray(packed({"lie.txt": b"x" * 5000}, compress_type=zipfile.ZIP_DEFLATED))
    place = lying.rfind(b"PK\x01\x02")
    lying[place + 24 : place + 28] = struct.pack("<I", 100)  # the stated size: at most so much is ever unpacked
    files = {
        "bomb.zip": bomb,
        "large.zip": large,
        "nested.zip": nested,
        "cut.zip": large[:-30],
        "lying.zip": bytes(lying),
        "no.zip": b"no zip",
    }
    added, problems = add(data, files)
    assert added == 1 and active(data) == ["good.png"]
    said = "\n".join(problems)
    for text in ("big.bmp in bomb.zip unpacks to", "large.png has 68 MB", "inner.zip is a zip inside a zip", "cut.zip is no zip", "lie.txt in lying.zip", "no.zip is no zip"):  # fmt: skip
        assert text in said
    added, problems = add(data, {"many.zip": packed({f"{k}.txt": b"" for k in range(intake.MEMBERS + 1)})})
    assert added == 0 and "many.zip holds 5001 files" in problems[0]


def test_the_limits_hold_over_all_zips_together(data):
    stage = intake.Stage(data.root, [], room=100, files=3)
    assert intake.take("a.zip", io.BytesIO(packed({"1.txt": b"x" * 60})), 0, stage)
    assert intake.take("b.zip", io.BytesIO(packed({"2.txt": b"x" * 60})), 0, stage) == []
    assert "holds 1 files" in stage.problems[0]


def test_an_encrypted_zip_is_named(data):
    raw = bytearray(packed({"a.png": picture()}))
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.find(sign) + place] |= 1
    added, problems = add(data, {"locked.zip": bytes(raw)})
    assert added == 0 and "without a password" in problems[0]


def large_png(size: int) -> bytes:
    """A good PNG of that many bytes: a chunk of data that is no image stands before its end."""
    import zlib

    raw = picture()
    body = os.urandom(1024) * ((size - len(raw) - 12) // 1024 + 1)
    body = b"raNd" + body[: size - len(raw) - 12]
    return raw[:-12] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + raw[-12:]


def test_sixty_megabytes_are_taken_and_sixty_five_are_not(data, monkeypatch):
    assert add(data, {"large.png": large_png(60 * intake.MB)}) == (1, [])
    with pytest.raises(Problem) as caught:
        add(data, {"larger.png": bytes(65 * intake.MB)})
    assert caught.value.status == 413 and "larger.png has 68 MB" in caught.value.text
    added, problems = add(data, {"larger.png": bytes(65 * intake.MB), "small.png": picture(2)})
    assert added == 1 and problems == [caught.value.text]
    monkeypatch.setattr(intake, "TOTAL_LIMIT", 1000)
    with pytest.raises(Problem, match="at most 2 GB"):
        add(data, {"small.png": picture(3)})
    assert not list((data.root / "incoming").iterdir())


def test_a_full_disk_is_a_sentence_and_leaves_nothing(data, monkeypatch):
    monkeypatch.setattr(intake, "SPARE", 2**60)
    with pytest.raises(Problem, match="MB free") as caught:
        add(data, {"a.png": picture()})
    assert caught.value.status == 409 and active(data) == []


# ---- folders in place


@pytest.fixture
def cats(tmp_path) -> Path:
    folder = tmp_path / "my cats"
    (folder / "sub").mkdir(parents=True)
    (folder / "1.png").write_bytes(picture(1))
    (folder / "1.txt").write_text("one", encoding="utf-8")
    (folder / "sub/1.png").write_bytes(picture(2))
    (folder / "sub/1.caption").write_text("two", encoding="utf-8")
    (folder / "README.txt").write_text("not a caption", encoding="utf-8")
    (folder / "raw.tiff").write_bytes(b"x")
    return folder


PASTED = ["{}", '"{}"', "'{}'  ", "  {}/ ", "file://{}", "“{}”"]


@pytest.mark.parametrize("form", PASTED)
def test_a_folder_is_used_in_place_however_it_was_pasted(data, cats, form):
    path = str(cats).replace(" ", "%20") if form.startswith("file") else str(cats)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in cats.rglob("*") if p.is_file()}
    added, problems = data.add_folder(form.format(path))
    assert added == 2 and len(problems) == 1 and problems[0].startswith("raw.tiff")
    assert captions(data) == {"1.png": "one", "1 (2).png": "two"}
    assert all(i["linked"] for i in data.items())
    assert (data.images / "1.png").samefile(cats / "1.png")
    data.edit_captions("clear")
    data.remove(ids(data, "1.png"))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in cats.rglob("*") if p.is_file()} == before


def test_a_folder_on_another_disk_is_copied(data, cats, monkeypatch):
    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert data.add_folder(str(cats))[0] == 2
    assert not (data.images / "1.png").samefile(cats / "1.png")
    assert (data.images / "1.png").read_bytes() == picture(1)


@pytest.mark.parametrize(
    ("path", "said"), [("", "is empty"), ("no/such", "whole path"), ("{}/no", "does not exist"), ("{}/my cats/1.png", "is a file"), ("{}/bare", "has no image")]
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_a_sentence(data, cats, tmp_path, path, said):
    (tmp_path / "bare").mkdir()
    with pytest.raises(Problem, match=said) as caught:
        data.add_folder(path.format(tmp_path))
    assert caught.value.errors.keys() == {"path"}


def test_captions_are_written_back_beside_the_originals_with_a_backup(data, cats):
    (cats / "2.png").write_bytes(picture(5))
    (cats / "2.jpg").write_bytes(picture(6, format="JPEG"))
    data.add_folder(str(cats))
    add(data, {"own.png": picture(7), "own.txt": b"a copy"})
    for image in data.items():
        if image["name"] != "1 (2).png":
            data.set_caption(image["id"], f"new {image['name']}")
    done = data.write_back()
    assert (done["written"], done["unchanged"], done["problems"]) == (3, 1, [])
    assert (cats / "1.txt").read_text(encoding="utf-8") == "new 1.png\n"
    assert (cats / "2.png.txt").read_text(encoding="utf-8") == "new 2.png\n"
    assert (cats / "2.jpg.txt").read_text(encoding="utf-8") == "new 2.jpg\n"
    assert not (cats / "own.txt").exists() and (cats / "README.txt").read_text(encoding="utf-8") == "not a caption"
    kept = [p.read_text(encoding="utf-8") for p in Path(done["backup"]).iterdir() if p.name != "index.txt"]
    assert kept == ["one"]
    assert data.write_back()["written"] == 0
    (cats / "1.png").unlink()
    assert "not there any more" in data.write_back()["problems"][0]


def test_there_is_nothing_to_write_back_to_copies_or_the_example(data):
    add(data, {"own.png": picture(7)})
    data.add_folder(ROOT / "assets/demo/data/zorp/train")
    assert not any(i["linked"] for i in data.items())
    with pytest.raises(Problem, match="used in place"):
        data.write_back()


# ---- captions


@pytest.mark.parametrize(
    "text", ["\"quoted\" 'text'", "<b>bold</b> & <script>alert(1)</script>", "猫 🐱 👩‍👩‍👧", "a, b\\n, {x}", "\u202e rtl", "50 %", ""]
)
def test_any_caption_survives(data, text):
    add(data, {"a.png": picture()})
    (id,) = ids(data, "a.png")
    data.set_caption(id, text)
    assert datasets.open(data.home, data.id).caption_of(id) == " ".join(text.split())
    assert captions(data) == {"a.png": " ".join(text.split())}


def test_captions_are_one_line_that_a_file_can_hold(data):
    add(data, {"a.png": picture()})
    (id,) = ids(data, "a.png")
    data.set_caption(id, "  two\r\nlines\0 \ud83d")
    assert captions(data) == {"a.png": "two lines ?"}
    with pytest.raises(Problem, match="letters"):
        data.set_caption(id, "x" * 30_000)
    with pytest.raises(Problem, match="no image") as caught:
        data.set_caption("../../x", "x")
    assert caught.value.status == 404


EDITS = [
    ("trigger_first", {"trigger": "ohwx"}, ["ohwx, a cat on a mat", "ohwx, cat, red", "ohwx, Cat", "", "a photo of ohwx"]),
    ("replace", {"find": "cat", "text": "dog"}, ["a dog on a mat", "dog, ohwx, red", "ohwx, Cat", "", "a photo of ohwx"]),
    ("replace", {"find": "red", "text": ""}, ["a cat on a mat", "cat, ohwx", "ohwx, Cat", "", "a photo of ohwx"]),
    (
        "prepend",
        {"text": "photo,"},
        ["photo, a cat on a mat", "photo, cat, ohwx, red", "photo, ohwx, Cat", "photo,", "photo, a photo of ohwx"],
    ),
    ("append", {"text": "blue"}, ["a cat on a mat, blue", "cat, ohwx, red, blue", "ohwx, Cat, blue", "blue", "a photo of ohwx, blue"]),
    ("remove_tag", {"find": "cat"}, ["a cat on a mat", "ohwx, red", "ohwx", "", "a photo of ohwx"]),
    ("clear", {}, ["", "", "", "", ""]),
]
START = ["a cat on a mat", "cat, ohwx, red", "ohwx, Cat", "", "a photo of ohwx"]


@pytest.mark.parametrize(("action", "options", "expected"), EDITS)
def test_bulk_edits_and_their_undo(data, action, options, expected):
    files = {f"{k}.png": picture(k) for k in range(5)} | {f"{k}.txt": t.encode() for k, t in enumerate(START) if t}
    add(data, files)
    changed = data.edit_captions(action, **options)
    assert list(captions(data).values()) == expected
    assert changed == sum(a != b for a, b in zip(START, expected, strict=True))
    assert str(changed) in data.undo_label()
    assert data.undo() and list(captions(data).values()) == START
    assert data.edit_captions(action, **options, ids=ids(data, "1.png")) == (START[1] != expected[1])
    assert list(captions(data).values()) == [START[0], expected[1], *START[2:]]


def test_a_bulk_edit_that_lacks_something_says_what(data):
    add(data, {"a.png": picture()})
    for action, field in (
        ("trigger_first", "trigger"),
        ("replace", "find"),
        ("remove_tag", "find"),
        ("prepend", "text"),
        ("append", "text"),
    ):
        with pytest.raises(Problem) as caught:
            data.edit_captions(action)
        assert caught.value.errors.keys() == {field}
    with pytest.raises(Problem, match="must be one of"):
        data.edit_captions("shout")
    assert data.undo_label() == "Add 1 image"


def test_tags_are_counted_once_a_caption(data):
    add(data, {f"{k}.png": picture(k) for k in range(3)})
    for id, text in zip(ids(data, "0.png", "1.png", "2.png"), ["cat, red, cat", "Cat, blue", "a long sentence about one cat"], strict=True):
        data.set_caption(id, text)
    assert data.tags() == [["cat", 2], ["blue", 1], ["red", 1]]


def test_tokens_are_those_of_clip(data):
    # The counts that transformers' CLIPTokenizer gives, without its start and end.
    assert caption_texts.tokens("a photo of a cat") == 5
    assert caption_texts.tokens("ohwx, a cat's 123 🐱!") == len_by_transformers("ohwx, a cat's 123 🐱!")
    assert caption_texts.tokens("") == 0


def len_by_transformers(text: str) -> int:
    import subprocess
    import sys

    code = (
        "import sys; from transformers import CLIPTokenizer as T; "
        f"print(len(T.from_pretrained({str(caption_texts.TOKENIZER)!r})({text!r}).input_ids) - 2)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])


# ---- undo


def test_each_change_is_taken_back_in_turn_also_by_another_object(data):
    add(data, {"a.png": picture(1), "b.png": picture(2), "a.txt": b"one"})
    data.set_caption(*ids(data, "a.png"), "two")
    data.remove(ids(data, "a.png", "b.png"))
    assert active(data) == []
    data.restore(ids(data, "a.png"))
    add(data, {"c.png": picture(3)})
    again = datasets.open(data.home, data.id)
    assert again.undo() == "Add 1 image" and active(data) == ["a.png"]
    assert again.undo() == "Restore a.png" and active(data) == []
    assert again.undo() == "Remove 2 images" and captions(data) == {"a.png": "two", "b.png": ""}
    assert again.undo() == "Edit the caption of a.png" and captions(data)["a.png"] == "one"
    assert again.undo() == "Add 2 images" and active(data) == []
    assert again.undo() == "" and len(data.items()) == 3


def test_a_captioning_is_taken_back_as_one(data):
    add(data, {"a.png": picture(1), "b.png": picture(2), "a.txt": b"mine"})
    data.checkpoint("Caption 2 images")
    for name in ("a", "b"):  # as the captioner does, past the data set
        (data.images / f"{name}.txt").write_text("a robot's words\n", encoding="utf-8")
    assert {i["caption"] for i in data.items()} == {"a robot's words"}
    assert data.undo() == "Caption 2 images"
    assert captions(data) == {"a.png": "mine", "b.png": ""}
    assert not (data.images / "b.txt").exists()


def test_fifty_changes_can_be_taken_back(data):
    add(data, {"a.png": picture()})
    (id,) = ids(data, "a.png")
    for k in range(60):
        data.set_caption(id, f"{k}")
    for k in range(58, 8, -1):
        data.undo()
        assert data.caption_of(id) == f"{k}"


# ---- several at once


def test_two_threads_at_once_lose_nothing(data):
    add(data, {f"{k}.png": picture(k, (32, 32)) for k in range(4)})
    known = ids(data, "0.png", "1.png", "2.png", "3.png")
    failed = []

    def work(call):
        try:
            for k in range(8):
                call(k)
        except Exception as error:
            failed.append(error)

    threads = [
        threading.Thread(target=work, args=(lambda k: data.set_caption(known[0], f"one {k}"),)),
        threading.Thread(target=work, args=(lambda k: datasets.open(data.home, data.id).set_caption(known[1], f"two {k}"),)),
        threading.Thread(target=work, args=(lambda k: (data.remove([known[2]]), data.restore([known[2]])),)),
        threading.Thread(target=work, args=(lambda k: add(data, {f"new {k}.png": picture(100 + k, (32, 32))}),)),
        threading.Thread(target=work, args=(lambda k: data.items(),)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert captions(data)["0.png"] == "one 7" and captions(data)["1.png"] == "two 7"
    assert len(active(data)) == 12
    history = json.loads((data.root / "history.json").read_text(encoding="utf-8"))
    assert len(history) == 1 + 8 + 8 + 16 + 8


def test_known_images_are_listed_at_once(data):
    add(data, {f"{k}.jpg": picture(k, (1200, 900), "JPEG") for k in range(20)} | {f"{k}.txt": b"a cat, red, blue" for k in range(20)})
    data.items()
    begin = time.perf_counter()
    for _ in range(5):
        data.items()
    assert (time.perf_counter() - begin) / 5 < 0.1  # 10 to 20 ms on an idle machine


# ---- going out


def test_a_snapshot_is_what_the_trainer_would_read_and_stays(data, tmp_path):
    add(data, {"a.png": picture(1), "b.png": picture(2), "c.png": picture(3), "a.txt": b"one", "b.txt": b"two"})
    data.remove(ids(data, "b.png"))
    assert data.snapshot(tmp_path / "run/data") == 2
    data.set_caption(*ids(data, "a.png"), "changed")
    data.remove(ids(data, "c.png"))
    found = scan([DataConfig(folder=tmp_path / "run/data")]).images
    assert [(i.path.name, i.caption) for i in found] == [("a.png", "one"), ("c.png", "")]
    assert (tmp_path / "run/data/a.png").samefile(data.images / "a.png")


def test_a_data_set_that_is_not_there(home):
    for id in ("nothing", "../..", "", "a/b"):
        with pytest.raises(Problem) as caught:
            datasets.open(home, id)
        assert caught.value.status == 404


# ---- many


def test_many_images_come_and_go_without_a_look_at_each_other(data, monkeypatch):
    reads = []
    texts = datasets.Dataset._texts
    monkeypatch.setattr(datasets.Dataset, "_texts", lambda self, folder: reads.append(folder) or texts(self, folder))

    def counted(work) -> int:
        reads.clear()
        work()
        return len(reads)

    def add(first: int, n: int) -> None:
        files = [(f"{k}.png", io.BytesIO(picture(k))) for k in range(first, first + n)]
        data.add_files([*files, *((f"{k}.txt", io.BytesIO(b"zorp, thing")) for k in range(first, first + n))])

    few, many = counted(lambda: add(0, 3)), counted(lambda: add(100, 40))
    assert few == many < 12
    ids = [i["id"] for i in data.items()]
    assert counted(lambda: data.remove(ids[:2])) == counted(lambda: data.remove(ids[2:])) < 6
    assert counted(data.undo) == counted(data.undo) < 6 and data.count() == 43
    assert counted(lambda: data.edit_captions("append", text="more")) < 8
    assert counted(data.undo) < 6 and set(data.texts().values()) == {"zorp, thing"}


def test_what_the_last_captioner_found_alike(data, tmp_path):
    assert data.told_alike() == frozenset()
    data.set_caption_job(tmp_path / "job")
    assert data.told_alike() == frozenset()  # it has not begun
    told = [
        {"type": "captioned"},
        {"type": "variety", "alike": ["a.png"], "of": 9},
        {"type": "variety", "alike": ["b.png", "c.png"], "of": 9},
    ]
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "events.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in told))
    assert data.told_alike() == {"b.png", "c.png"}


def test_what_is_being_looked_at_is_told_and_can_be_ended(data, monkeypatch):
    told, look = [], pictures.inspect

    def slow(path, cache):
        told.append(datasets.looking(data.home))
        if len(told) == 5:
            datasets.stop_looking(data.home)
        return look(path, cache)

    monkeypatch.setattr(pictures, "inspect", slow)
    with pytest.raises(Problem, match="Cancelled; nothing was added") as refused:
        data.add_files([(f"{k}.png", io.BytesIO(picture(k))) for k in range(30)])
    assert refused.value.status == 409 and all(t["total"] == 30 for t in told) and 0 < max(t["done"] for t in told) < 30
    assert data.items() == [] and datasets.looking(data.home) is None and not list((data.root / "incoming").iterdir())
    datasets.stop_looking(data.home)  # of nothing
    assert data.add_files([("a.png", io.BytesIO(picture(1)))])[0] == 1
