import hashlib
import json
import os
import struct
import time
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from PIL import features

from trainer.config import DataConfig
from trainer.data import scan as scan_module
from trainer.data.scan import SUFFIXES, DataError, inspect, scan


def write(path: Path, size: tuple[int, int] = (40, 30), caption: str | None = None, **options) -> Path:
    """A noisy image at `path`, and `caption` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_header(path: Path, width: int, height: int) -> None:
    """A 1-bit PNG whose header promises width x height, and whose pixels end at once."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


def scan_folder(folder: Path, **options):
    return scan([DataConfig(folder=folder, **options)])


def captions(folder: Path, **options) -> dict[str, str]:
    return {image.path.name: image.caption for image in scan_folder(folder, **options).images}


def problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        scan_folder(folder)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_an_image_is_described(tmp_path):
    path = write(tmp_path / "a.png", (40, 30), "a hat")
    result = scan_folder(tmp_path)
    (image,) = result.images
    assert (image.path, image.width, image.height, image.caption, image.source, image.has_caption) == (path, 40, 30, "a hat", 0, True)
    assert image.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert result.warnings == ()


def test_every_suffix_is_read_in_either_case_and_whatever_the_content(tmp_path):
    for suffix in SUFFIXES:
        write(tmp_path / f"a{suffix}")
        write(tmp_path / f"b{suffix.upper()}")
    write(tmp_path / "webp called.jpg", format="WEBP")
    assert (".avif" in SUFFIXES) == features.check("avif")
    assert len(scan_folder(tmp_path, trigger="x").images) == 2 * len(SUFFIXES) + 1


def test_nested_folders_are_read_in_order_and_hidden_ones_and_masks_left_out(tmp_path):
    for name in ("b/2.png", "b/1.png", "a/z/0.png", "c.png", "a.png", ".hidden.png", ".trash/x.png", "a-masklabel.png", "B.png"):
        write(tmp_path / name)
    found = [image.path.relative_to(tmp_path).as_posix() for image in scan_folder(tmp_path, trigger="x").images]
    assert found == ["B.png", "a/z/0.png", "a.png", "b/1.png", "b/2.png", "c.png"]


def test_a_hidden_folder_may_be_named_itself(tmp_path):
    write(tmp_path / ".data" / "a.png")
    assert len(scan_folder(tmp_path / ".data", trigger="x").images) == 1


def test_linked_folders_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere" / "a.png")
    write(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "data")
    assert [i.path.name for i in scan_folder(tmp_path / "data", trigger="x").images] == ["b.png", "a.png"]


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "photos" / "a.png")
    assert scan_folder(Path("~/photos"), trigger="x").images[0].path == tmp_path / "photos" / "a.png"


def test_exif_rotation_swaps_width_and_height(tmp_path):
    exif = PIL.Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        write(tmp_path / f"{orientation}.jpg", (40, 30), exif=exif)
        write(tmp_path / f"{orientation}.png", (40, 30), exif=exif)
    for image in scan_folder(tmp_path, trigger="x").images:
        assert (image.width, image.height) == ((30, 40) if int(image.path.stem) >= 5 else (40, 30))


def test_kind_picks_folders_and_source_still_counts_them_all(tmp_path):
    for name in ("one", "two", "three"):
        write(tmp_path / name / f"{name}.png", caption="x")
    data = [DataConfig(folder=tmp_path / n, kind=k) for n, k in (("one", "train"), ("two", "validation"), ("three", "train"))]
    assert [(i.path.stem, i.source) for i in scan(data).images] == [("one", 0), ("two", 1), ("three", 2)]
    assert [(i.path.stem, i.source) for i in scan(data, kind="train").images] == [("one", 0), ("three", 2)]
    assert [(i.path.stem, i.source) for i in scan(data, kind="validation").images] == [("two", 1)]


@pytest.mark.parametrize("name", ['it\'s "mine".png', "two  spaces .png", "Zoë & 猫 (1).png", "a.b.c.png", "100% #1;$(x).png"])
def test_odd_names_simply_work(tmp_path, name):
    path = write(tmp_path / "Ünï côdé 'dir'" / name)
    path.with_suffix(".txt").write_text("a hat", encoding="utf-8")
    (image,) = scan_folder(tmp_path).images
    assert (image.path, image.caption) == (path, "a hat")


# Captions


def test_where_a_caption_is_looked_for(tmp_path):
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.png")
    for name in ("a.txt", "a.caption", "b.caption", "c.png.txt", "c.txt", "d.TXT"):
        (tmp_path / name).write_text(f"from {name}")
    expected = {"a.png": "from a.txt", "b.png": "from b.caption", "c.png": "from c.png.txt", "d.png": "from d.TXT"}
    assert captions(tmp_path) == expected


def test_a_caption_belongs_to_the_image_of_its_own_folder(tmp_path):
    write(tmp_path / "a.png", caption="outer")
    write(tmp_path / "in" / "a.png", caption="inner")
    assert [i.caption for i in scan_folder(tmp_path).images] == ["outer", "inner"]


def test_accents_composed_and_decomposed_are_the_same_name(tmp_path):
    write(tmp_path / unicodedata.normalize("NFD", "é.png"))
    (tmp_path / unicodedata.normalize("NFC", "é.txt")).write_text("a hat")
    assert list(captions(tmp_path).values()) == ["a hat"]


def test_space_is_collapsed_and_a_byte_order_mark_taken_off(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  a  hat,\r\n\ton a\xc2\xa0cat \n")
    assert captions(tmp_path) == {"a.png": "a hat, on a cat"}
    assert scan_folder(tmp_path).warnings == ()


@pytest.mark.parametrize(
    ("raw", "text"),
    [("Zoë “café”".encode("cp1252"), "Zoë “café”"), ("Zoë".encode("utf-16"), "Zoë"), (b"a\x81\xe9", "a\ufffdé")],
)
def test_a_caption_that_is_not_utf8_is_read_with_a_warning(tmp_path, raw, text):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png", caption="Zoë in UTF-8")
    (tmp_path / "a.txt").write_bytes(raw)
    assert captions(tmp_path) == {"a.png": text, "b.png": "Zoë in UTF-8"}
    (warning,) = scan_folder(tmp_path).warnings
    assert "a.txt" in warning and "Save" in warning and "UTF-8" in warning and "b.txt" not in warning


@pytest.mark.parametrize(
    ("text", "options", "expected", "has_caption"),
    [
        ("a hat", {"trigger": "ohwx", "class_word": "woman"}, "ohwx, a hat", True),
        ("a hat on OHWX", {"trigger": "ohwx"}, "a hat on OHWX", True),
        ("ohwxes", {"trigger": "ohwx"}, "ohwx, ohwxes", True),
        ("a hat", {"class_word": "woman"}, "a hat", True),
        (None, {"trigger": "ohwx", "class_word": "woman"}, "ohwx woman", False),
        (None, {"class_word": "woman"}, "woman", False),
        (" \n", {"trigger": " ohwx ", "class_word": "woman"}, "ohwx woman", False),
        ("", {"trigger": "ohwx"}, "ohwx", False),
    ],
)
def test_trigger_and_class_word(tmp_path, text, options, expected, has_caption):
    write(tmp_path / "a.png", caption=text)
    (image,) = scan_folder(tmp_path, **options).images
    assert (image.caption, image.has_caption) == (expected, has_caption)
    assert scan_folder(tmp_path, **options).warnings == ()


def test_empty_captions_are_one_warning_a_folder_with_their_count(tmp_path):
    for i in range(7):
        write(tmp_path / "one" / f"{i}.png")
    write(tmp_path / "one" / "7.png", caption="")
    write(tmp_path / "one" / "8.png", caption="a hat")
    write(tmp_path / "two" / "x.png")
    result = scan([DataConfig(folder=tmp_path / "one"), DataConfig(folder=tmp_path / "two")])
    assert [i.caption for i in result.images].count("") == 9
    assert not any(i.has_caption for i in result.images if not i.caption)
    one, two = result.warnings
    assert "data.1.folder" in one and "8 of 9 images" in one and "and 3 more" in one and "trigger" in one
    assert "data.2.folder" in two and "x.png" in two


def test_images_that_share_a_caption_are_named(tmp_path):
    write(tmp_path / "a.png", caption="a hat")
    write(tmp_path / "a.jpg")
    write(tmp_path / "b.png", caption="fine")
    (warning,) = scan_folder(tmp_path).warnings
    assert "a.jpg, a.png share the caption in a.txt" in warning and "a.png.txt" in warning
    assert captions(tmp_path) == {"a.jpg": "a hat", "a.png": "a hat", "b.png": "fine"}
    (tmp_path / "a.jpg.txt").write_text("its own")
    assert scan_folder(tmp_path).warnings == ()


def test_other_kinds_of_images_are_one_warning(tmp_path):
    write(tmp_path / "a.png", caption="x")
    for name in ("b.gif", "c.HEIC", "d.tiff", "notes.md", "video.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (warning,) = scan_folder(tmp_path).warnings
    assert all(word in warning for word in ("3 files", "b.gif", "c.HEIC", "d.tiff", "Convert"))
    assert "notes" not in warning and "video" not in warning


# Problems


def test_everything_wrong_in_all_folders_is_said_at_once(tmp_path):
    good = write(tmp_path / "one" / "good.png")
    (tmp_path / "one" / "text.png").write_text("I am a caption")
    (tmp_path / "one" / "empty.jpg").touch()
    (tmp_path / "one" / "half.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "one" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    write_header(tmp_path / "one" / "huge.png", 30_000, 30_000)
    write(tmp_path / "one" / "tiny.png", (15, 200))
    (tmp_path / "three").mkdir()
    folders = [tmp_path / "one", tmp_path / "missing", tmp_path / "three", good]
    with pytest.raises(DataError) as caught:
        scan([DataConfig(folder=f) for f in folders])
    expected = [
        ("data.2.folder", str(tmp_path / "missing"), "does not exist", "give the path"),
        ("data.3.folder", str(tmp_path / "three"), "no image", *SUFFIXES, "Put some there"),
        ("data.4.folder", str(good), "is a file", "give the folder"),
        ("empty.jpg", "0 bytes", "copy it again"),
        ("gone.png", "link to nothing", "remove it"),
        ("half.png", "damaged or cut off", "copy it again"),
        ("huge.png", "900,000,000 pixels", "200,000,000", "Make it smaller"),
        ("text.png", "holds no image", "PNG, JPEG", "save it as .png"),
        ("tiny.png", "15 x 200", "at least 16", "larger version"),
    ]
    assert len(caught.value.problems) == len(expected)
    for problem, words in zip(caught.value.problems, expected, strict=True):
        assert all(word in problem for word in words), problem


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_an_image_that_was_cut_off_is_found_by_decoding_it(tmp_path, suffix, kept):
    path = write(tmp_path / f"a{suffix}", (300, 200))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept)])
    (problem,) = problems(tmp_path)
    assert path.name in problem


def test_a_cut_off_progressive_jpeg_is_found(tmp_path):
    path = write(tmp_path / "a.jpg", (300, 200), progressive=True)
    path.write_bytes(path.read_bytes()[:-200])
    assert "cut off" in problems(tmp_path)[0]


@pytest.mark.parametrize(("width", "height", "said"), [(30_000, 30_000, "900,000,000"), (20_000, 15_000, "20000 x 15000 = 300,000,000")])
def test_a_huge_image_is_refused_by_its_header(tmp_path, width, height, said):
    """Its pixels are cut off, which would be the problem if anything had looked at them."""
    write_header(tmp_path / "a.png", width, height)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        (problem,) = problems(tmp_path)
    assert time.perf_counter() - start < 1
    assert f"{said} pixels" in problem and "200,000,000" in problem and "cut off" not in problem


def test_a_huge_image_is_refused_where_warnings_are_errors(tmp_path):
    write_header(tmp_path / "a.png", 20_000, 15_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "300,000,000 pixels" in problems(tmp_path)[0]


def test_a_large_image_below_the_limit_passes_without_a_warning(tmp_path):
    PIL.Image.new("1", (10_000, 9_500)).save(tmp_path / "a.png")  # Pillow's own limit is 89 million pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan_folder(tmp_path, trigger="x").images[0].width == 10_000


@pytest.mark.parametrize("size", [(16, 16), (16, 4000)])
def test_the_smallest_image_passes(tmp_path, size):
    write(tmp_path / "a.png", size)
    assert len(scan_folder(tmp_path, trigger="x").images) == 1


def test_a_folder_of_other_kinds_only_says_so(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    (problem,) = problems(tmp_path)
    assert "no image" in problem and "a.heic" in problem and "Convert" in problem


def test_a_folder_of_masks_only_has_no_image(tmp_path):
    write(tmp_path / "a-masklabel.png")
    assert "no image" in problems(tmp_path)[0]


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Tests may run as root, who may read everything: so the refusal itself is played."""
    for name in ("a.png", "b.png", "locked/c.png"):
        write(tmp_path / name, caption="x")
    really_open, really_scandir = Path.open, os.scandir

    def refuse(path: str | Path) -> None:
        if Path(path).name in ("b.png", "a.txt", "locked"):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: refuse(self) or really_open(self, *a, **k))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or really_scandir(path))
    locked, caption, image = problems(tmp_path)
    for problem, name in ((locked, "locked"), (caption, "a.txt"), (image, "b.png")):
        assert str(tmp_path / name) in problem and "Permission denied" in problem


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_hang_the_scan(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert "is no file" in problems(tmp_path)[0]


def test_no_folders_no_images():
    assert scan([]).images == ()


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", (40, 30), "x")
    first = scan_folder(tmp_path).images
    opened = []
    real = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda file, *a, **k: opened.append(file) or real(file, *a, **k))
    assert scan_folder(tmp_path).images == first and opened == []
    path.rename(tmp_path / "b.png")
    assert scan_folder(tmp_path, trigger="x").images[0].digest == first[0].digest and opened == []
    write(tmp_path / "b.png", (50, 30))
    assert scan_folder(tmp_path, trigger="x").images[0].width == 50 and len(opened) == 1
    (tmp_path / "b.png").write_bytes(b"damaged")
    assert len(problems(tmp_path)) == 1 and len(problems(tmp_path)) == 1


def test_a_mask_belongs_to_its_image_and_must_have_its_shape(tmp_path):
    write(tmp_path / "a.png", (40, 30), "a")
    write(tmp_path / "b.jpg", (40, 30), "b")
    PIL.Image.new("L", (80, 60), 255).save(tmp_path / "a-MaskLabel.png")
    one, other = scan_folder(tmp_path).images
    assert one.mask == tmp_path / "a-MaskLabel.png" and len(one.mask_digest) == 64
    assert other.mask is None and other.mask_digest == ""
    PIL.Image.new("L", (30, 40), 255).save(tmp_path / "b-masklabel.png")
    with pytest.raises(DataError, match=r"b-masklabel.png has 30 x 40 pixels, of another shape than b.jpg \(40 x 30\). Make it"):
        scan_folder(tmp_path)


def test_crops_say_what_stays_in_sight(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "in" / "b.png")
    (tmp_path / "crops.json").write_text('{"in/b.png": [0, 1], "gone.png": [0.1, 0.2]}')
    assert [i.focus for i in scan_folder(tmp_path).images] == [(0.5, 0.5), (0.0, 1.0)]
    for wrong in ('{"a.png": [0.5]}', '{"a.png": [0.5, 2]}', "[]", "{", '{"a.png": "x"}'):
        (tmp_path / "crops.json").write_text(wrong)
        with pytest.raises(DataError, match=r"crops.json must be like"):
            scan_folder(tmp_path)


def test_several_captions_stand_one_a_line(tmp_path):
    write(tmp_path / "a.png", caption="one  cat\n\n ohwx sits\r\n")
    assert captions(tmp_path, trigger="ohwx") == {"a.png": "ohwx, one cat ohwx sits"[6:]}
    assert captions(tmp_path, trigger="ohwx", several_captions=True) == {"a.png": "ohwx, one cat\nohwx sits"}


# ---- one decoding for two


class Looking:
    """Eyes that keep what they see; `known` are the sides of images by their digests."""

    least = 100

    def __init__(self, known: dict[str, tuple[int, int]] | None = None) -> None:
        self.known, self.seen = known or {}, []

    def knows(self, digest):
        return self.known.get(digest)

    def see(self, digest, image, size):
        self.seen.append((digest, image.size, size))


def test_who_looks_at_an_image_sees_the_one_decoding(tmp_path, monkeypatch):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    dots = PIL.Image.effect_noise((1600, 1200), 50).convert("RGB")
    dots.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20_000])
    decodings = []
    load = PIL.ImageFile.ImageFile.load
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda image: decodings.append(1) or load(image))
    eyes = Looking()
    digest, width, height = inspect(tmp_path / "a.jpg", eyes)
    assert (width, height) == (1200, 1600) and eyes.seen == [(digest, (200, 150), (1200, 1600))]  # not upright, at an eighth: still 100
    assert inspect(tmp_path / "a.jpg", eyes) == (digest, 1200, 1600) and len(decodings) == len(eyes.seen) == 1
    assert "damaged or cut off" in inspect(tmp_path / "b.jpg", eyes) and len(eyes.seen) == 1
    scan_module.forget()
    decodings.clear()
    assert inspect(tmp_path / "a.jpg", Looking({digest: (1200, 1600)})) == (digest, 1200, 1600) and decodings == []


def test_what_the_app_has_seen_to_decode_is_not_decoded_again(tmp_path, monkeypatch):
    write(tmp_path / "a.png", (40, 30), "a hat")
    write(tmp_path / "longer.png", (30, 40), "a coat")
    data = [DataConfig(folder=tmp_path)]
    plain = scan(data)
    known = tmp_path / "known.json"
    known.write_text(json.dumps({plain.images[0].digest: [40, 30]}))
    scan_module.forget()
    decoded = []
    load = PIL.ImageFile.ImageFile.load
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    assert scan(data, eyes=scan_module.Known(known)) == plain and set(decoded) == {(30, 40)}
    for text in ("", "{", "[1]", '{"x": 3}', '{"x": ["a", 2]}'):
        known.write_text(text)
        assert scan_module.Known(known).sizes == {}
    assert scan_module.Known(tmp_path / "none.json").sizes == {}
