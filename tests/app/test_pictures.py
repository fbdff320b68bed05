"""Thumbnails, sharpness, near duplicates and badges."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from app import datasets, pictures, run_reader
from app.errors import Problem
from app.paths import ROOT, Home
from trainer.data.buckets import place
from trainer.data.scan import inspect


def scene(seed: int, size: tuple[int, int] = (900, 600)) -> Image.Image:
    """A drawing with edges at many places: discs and lines on a gradient."""
    rng = np.random.default_rng(seed)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, r = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(8, 90)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(map(int, rng.integers(0, 256, 3))), outline="black")
        draw.line((x, y, int(rng.integers(0, size[0])), int(rng.integers(0, size[1]))), fill="white", width=2)
    return image


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def badges(home):
    """badges({name: image or bytes}, **how): {name: {kind: text}} of a data set of these."""

    def make(images: dict, **how) -> dict[str, dict[str, str]]:
        data = datasets.create(home)
        files = []
        for name, image in images.items():
            raw = image
            if isinstance(image, Image.Image):
                out = io.BytesIO()
                image.save(out, {".jpg": "JPEG", ".webp": "WEBP"}.get(Path(name).suffix, "PNG"))
                raw = out.getvalue()
            files.append((name, io.BytesIO(raw)))
        added, problems = data.add_files(files)
        assert added == len(images), problems
        return {i["name"]: {b["kind"]: b["text"] for b in i["badges"]} for i in data.items(**how)}

    return make


def look(path: Path, home: Home) -> pictures.Look:
    return pictures.look(path, inspect(path)[0], home.cache)


# ---- versions


def test_a_thumbnail_is_small_upright_and_kept_by_content(home, tmp_path):
    image = Image.new("RGB", (800, 400), "red")
    image.paste("blue", (0, 0, 400, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right: the blue left half comes on top
    image.save(tmp_path / "a.jpg", exif=exif)
    digest, width, height = inspect(tmp_path / "a.jpg")
    assert (width, height) == (400, 800)
    thumb = pictures.version(tmp_path / "a.jpg", digest, pictures.THUMB, home.cache)
    with Image.open(thumb) as small:
        assert (small.format, small.size) == ("WEBP", (160, 320))
        top, bottom = small.convert("RGB").getpixel((80, 40)), small.convert("RGB").getpixel((80, 280))
    assert top[2] > 200 > 50 > top[0] and bottom[0] > 200 > 50 > bottom[2]
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    assert pictures.version(tmp_path / "b.jpg", digest, pictures.THUMB, home.cache) == thumb


def test_the_large_version_has_at_most_2048_pixels_and_is_never_enlarged(home, tmp_path):
    for size, expected in (((3000, 1500), (2048, 1024)), ((100, 60), (100, 60))):
        Image.new("RGB", size, "green").save(tmp_path / "a.png")
        full = pictures.version(tmp_path / "a.png", inspect(tmp_path / "a.png")[0], pictures.FULL, home.cache)
        with Image.open(full) as image:
            assert image.size == expected


def test_a_file_that_is_gone_is_a_sentence(home, tmp_path):
    with pytest.raises(Problem) as caught:
        pictures.version(tmp_path / "gone.png", "0" * 64, pictures.FULL, home.cache)
    assert caught.value.status == 404


def test_what_was_seen_survives_a_restart_and_a_damaged_cache(home, tmp_path):
    scene(1).save(tmp_path / "a.png")
    first = look(tmp_path / "a.png", home)
    pictures._looks.clear()
    assert look(tmp_path / "a.png", home) == first
    pictures._looks.clear()
    for kept in (home.cache / "pictures").glob("*.json"):
        kept.write_text("{torn", encoding="utf-8")
    assert look(tmp_path / "a.png", home) == first


# ---- the cache


def cached(home, folder: str, name: str, size: int, days: float) -> Path:
    """A file of the cache that was last used so many days ago."""
    path = home.cache / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    at = time.time() - days * 24 * 3600
    os.utime(path, (at, at))
    return path


def test_what_was_not_used_for_long_goes_and_then_the_oldest_until_it_fits(home):
    old = cached(home, "pictures", "old.webp", 10, 100)
    torn, writing = cached(home, "previews", ".x.tmp", 10, 2), cached(home, "previews", ".y.tmp", 10, 0)
    kept = [cached(home, folder, f"{days}.webp", 100, days) for folder, days in (("pictures", 30), ("previews", 20), ("pictures", 10))]
    other = cached(home, ".", "hub.json", 10_000, 500)
    assert pictures.prune(home.cache) == 20
    assert not old.exists() and not torn.exists() and writing.exists() and all(path.exists() for path in kept)
    assert pictures.prune(home.cache, most=250) == 100
    assert [path.exists() for path in kept] == [False, True, True] and other.exists()
    assert pictures.prune(home.cache, most=250) == 0


def test_what_is_shown_again_counts_as_used(home, tmp_path):
    pictures._looks.clear()
    scene(1).save(tmp_path / "a.png")
    digest = inspect(tmp_path / "a.png")[0]
    look(tmp_path / "a.png", home)
    shown = pictures.version(tmp_path / "a.png", digest, pictures.THUMB, home.cache)
    thumb = run_reader.picture(home, tmp_path / "a.png", 64)
    kept = home.cache / "pictures" / f"{digest}.json"
    for path in (shown, thumb, kept):
        os.utime(path, (0, 0))
    pictures._looks.clear()
    look(tmp_path / "a.png", home)
    pictures.version(tmp_path / "a.png", digest, pictures.THUMB, home.cache)
    run_reader.picture(home, tmp_path / "a.png", 64)
    assert pictures.prune(home.cache) == 0 and all(path.exists() for path in (shown, thumb, kept))
    for path in (shown, thumb, kept):
        os.utime(path, (0, 0))
    assert pictures.prune(home.cache) > 0 and not any(path.exists() for path in (shown, thumb, kept))
    assert look(tmp_path / "a.png", home).sharp is not None


# ---- blurred


PHOTOS = sorted((ROOT / "assets/demo/data").glob("*/train/0[1-4].png"))


@pytest.mark.parametrize("image", [scene(1), scene(2, (2400, 1800)), *map(Image.open, PHOTOS)], ids=lambda i: f"{i.size[0]}")
def test_a_blurred_picture_is_told_from_a_sharp_one(image):
    image = image.convert("RGB")
    sharp = pictures.sharpness(image)
    assert sharp > 2 * pictures.BLURRED
    pixel = max(1, min(image.size) / pictures.SHARP_SIDE)
    assert pictures.sharpness(image.filter(ImageFilter.GaussianBlur(4 * pixel))) < pictures.BLURRED < sharp


def test_a_soft_background_is_no_blur():
    image = scene(3).filter(ImageFilter.GaussianBlur(8))
    image.paste(scene(3).crop((300, 100, 600, 500)), (300, 100))
    assert pictures.sharpness(image) > pictures.BLURRED


def test_a_plain_picture_is_neither_sharp_nor_blurred(badges):
    assert pictures.sharpness(Image.new("RGB", (600, 600), "red")) is None
    assert "blurred" not in badges({"a.png": Image.new("RGB", (600, 600), "red")})["a.png"]


def test_the_badge_of_a_blurred_picture(badges):
    found = badges({"a.png": scene(1), "b.png": scene(2).filter(ImageFilter.GaussianBlur(6))})
    assert "blurred" not in found["a.png"] and "blurred" in found["b.png"]


# ---- duplicates


def test_copies_that_were_resized_or_saved_again_are_found_and_others_are_not(badges):
    one, two = scene(1), scene(2)
    smaller = one.resize((600, 400))
    brighter = Image.blend(one, Image.new("RGB", one.size, "white"), 0.06)
    found = badges({"one.png": one, "one.jpg": one, "two.png": two, "smaller.webp": smaller, "brighter.png": brighter})
    for name in ("one.png", "one.jpg", "smaller.webp", "brighter.png"):
        assert "nearly the same picture" in found[name]["duplicate"]
    assert "duplicate" not in found["two.png"]
    assert any(name in found["one.png"]["duplicate"] for name in ("one.jpg", "smaller.webp", "brighter.png"))


def test_plain_pictures_of_other_colours_are_no_duplicates(badges):
    found = badges({"red.png": Image.new("RGB", (600, 600), "#c02020"), "blue.png": Image.new("RGB", (600, 600), "#2020c0")})
    assert not any("duplicate" in b for b in found.values())


def test_the_example_has_nothing_to_complain_of(home):
    data = datasets.create(home)
    data.add_folder(ROOT / "assets/demo/data/zorp/train")
    assert [i["badges"] for i in data.items(resolution=128)] == [[]] * 14


# ---- the others


def test_small_pictures_are_named_with_numbers(badges):
    found = badges({"small.png": scene(1, (200, 200)), "enough.png": scene(2, (400, 400)), "large.png": scene(3, (800, 800))})
    assert "200 x 200 pixels and is enlarged 2.6 times to 512 x 512" in found["small.png"]["small"]
    assert "at least 342 x 342" in found["small.png"]["small"]
    assert "small" not in found["enough.png"] and "small" not in found["large.png"]
    assert "small" not in badges({"small.png": scene(1, (200, 200))}, resolution=192)["small.png"]


def test_what_the_bucket_cuts_is_said_above_a_tenth(badges):
    found = badges({"wide.png": scene(1, (1400, 900)), "square.png": scene(2, (700, 700))}, bucket_step=256)
    assert found["wide.png"].keys() == {"crop"}
    (spot,) = place([(1400, 900)], resolution=512, step=256, max_aspect=3, batch_size=1)
    assert f"{1 - spot.kept:.0%} of it is cut off to fit 512 x 512" in found["wide.png"]["crop"]
    assert not found["square.png"]


def test_odd_files(badges, tmp_path):
    hole = scene(1, (600, 600)).convert("RGBA")
    hole.paste((0, 0, 0, 0), (100, 100, 300, 300))
    opaque = scene(2, (600, 600)).convert("RGBA")
    frames = io.BytesIO()
    scene(3, (600, 600)).save(frames, "WEBP", save_all=True, append_images=[scene(4, (600, 600))], lossless=True)
    found = badges(
        {
            "hole.png": hole, "opaque.png": opaque, "film.webp": frames.getvalue(), "print.jpg": scene(5, (600, 600)).convert("CMYK"),
            "strip.png": scene(6, (2600, 600)),
        }
    )  # fmt: skip
    assert "transparent" in found["hole.png"]["odd"] and not found["opaque.png"]
    assert "animated" in found["film.webp"]["odd"]
    assert "CMYK" in found["print.jpg"]["odd"]
    assert "1 to 4.3" in found["strip.png"]["long"]


def test_a_picture_that_broke_later_is_shown_as_such(home):
    data = datasets.create(home)
    out = io.BytesIO()
    scene(1).save(out, "PNG")
    data.add_files([("a.png", io.BytesIO(out.getvalue())), ("b.png", io.BytesIO(out.getvalue()))])
    (data.images / "a.png").write_bytes(out.getvalue()[:2000])
    a, b = data.items()
    assert "damaged or cut off" in a["badges"][0]["text"] and a["crop"] is None
    assert b["width"] == 900
