"""Advice on images and captions: every rule is set off by real pictures, and by none of a good set."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from app import advice, datasets, pictures
from app.advice import About, Other
from app.paths import ROOT, Home

THINGS = ["on a beach", "in a red car", "reading a book", "under a tree", "beside a lamp", "at night", "in the snow", "with a hat", "from behind", "asleep"]  # fmt: skip


def photo(seed: int, size: tuple[int, int] = (640, 640), like: Image.Image | None = None, subject: bool = True) -> Image.Image:
    """Blotches of colour as a background (or `like`), and in the middle a hundred discs and lines."""
    rng = np.random.default_rng(seed)
    dots = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    image = like.copy() if like else dots.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for _ in range(100 if subject else 0):
        x, y, r = rng.integers(width // 6, width * 5 // 6), rng.integers(height // 6, height * 5 // 6), rng.integers(6, width // 9)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(map(int, rng.integers(0, 256, 3))), outline="black")
        draw.line((x, y, int(x) + 60, int(y) + 40), fill="white", width=2)
    return image


def good(n: int = 10) -> dict[str, Image.Image]:
    return {f"{k:02}": photo(k) for k in range(n)}


def captions(n: int = 10) -> dict[str, str]:
    return {f"{k:02}": f"zorp, a creature {THINGS[k]}" for k in range(n)}


ABOUT = About(trigger="zorp", class_word="creature")


@pytest.fixture
def advised(tmp_path) -> Callable[..., dict[str, dict]]:
    """advised(pictures, captions, about, **how): {kind: advice} of a data set of these, with the images' names instead of ids."""
    home = Home(tmp_path / "home")
    home.create()

    def make(images: dict[str, Image.Image] | None = None, texts: dict[str, str] | None = None, about: About = ABOUT, **how) -> dict:
        images = good() if images is None else images
        data = datasets.create(home)
        files = []
        for name, image in images.items():
            out = io.BytesIO()
            image.save(out, "PNG")
            files.append((f"{name}.png", io.BytesIO(out.getvalue())))
        texts = captions() if texts is None else texts
        added, problems = data.add_files([*files, *((f"{n}.txt", io.BytesIO(t.encode())) for n, t in texts.items() if n in images)])
        assert added == len(images), problems
        items = data.items(**how)
        names = {i["id"]: i["name"].removesuffix(".png") for i in items}
        found = advice.advise(items, data.looks(), about)
        for said in found:
            said["images"] = [names[i] for i in said["images"]]
            if said["remedy"] and "ids" in said["remedy"]:
                said["remedy"]["ids"] = [names[i] for i in said["remedy"]["ids"]]
        assert len({a["text"] for a in found}) == len(found)
        return {a["kind"]: a for a in found}

    return make


def test_a_good_set_is_left_in_peace(advised):
    assert advised() == {}
    assert advised({}) == {}


def test_the_example_is_left_in_peace(tmp_path):
    home = Home(tmp_path)
    home.create()
    data = datasets.create(home)
    data.add_folder(ROOT / "assets/demo/data/zorp/train")
    assert advice.advise(data.items(resolution=128), data.looks(), About(trigger="zorp", class_word="creature")) == []


def test_few_and_many(advised):
    assert "Only 7 images" in advised(good(7))["few"]["text"]
    assert "few" not in advised(good(8))
    assert advice.number(101, "character")[0] == "many" and advice.number(101, "style") is None
    assert advice.number(301, "style")[0] == "many" and advice.number(0, "style") is None


def test_removed_images_do_not_count(tmp_path, advised):
    items = [{"id": str(k), "removed": k > 2, "has_caption": True, "caption": f"zorp {k}", "badges": [], "tokens": 3} for k in range(12)]
    assert [a["kind"] for a in advice.advise(items, {}, ABOUT)] == ["few"]


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_copies_are_found_whatever_was_done_to_them(advised, quality):
    images = good()
    jpeg = io.BytesIO()
    images["03"].resize((420, 420)).save(jpeg, "JPEG", quality=quality)
    images["copy"] = Image.open(jpeg)
    images["dim"] = images["03"].point(lambda v: round(v * 0.94))
    found = advised(images, captions() | {"copy": "zorp, it waits", "dim": "zorp, it stands"})
    assert list(found) == ["duplicate"] and sorted(found["duplicate"]["images"]) == ["03", "copy", "dim"]
    remedy = found["duplicate"]["remedy"]
    assert remedy["do"] == "remove" and "copy" in remedy["ids"] and len(remedy["ids"]) == 2  # of two of the same size either may stay


def test_small_blurred_long_and_cut_off(advised):
    images = good() | {"00": photo(0, (300, 300)), "01": photo(1).filter(ImageFilter.GaussianBlur(6)), "02": photo(2, (2400, 520))}
    images["03"] = photo(3).filter(ImageFilter.GaussianBlur(6))
    found = advised(images, resolution=512)
    assert list(found) == ["small", "blurred", "long"]
    assert (
        found["small"]["text"].startswith("00.png: It has 300 x 300 pixels") and found["small"]["remedy"]["place"] == "dataset.resolution"
    )
    assert found["blurred"]["text"].startswith("2 of 10 images look blurred") and found["blurred"]["images"] == ["01", "03"]
    assert found["long"]["images"] == ["02"]
    assert advised(good() | {"00": photo(0, (1400, 900))}, bucket_step=256)["crop"]["images"] == ["00"]


@pytest.mark.parametrize("box", [(0, 80, 640, 560), (60, 0, 580, 640)], ids=["letterbox", "pillarbox"])
def test_bars_are_told_from_a_plain_background(advised, box):
    def framed(k: int, colour: str) -> Image.Image:
        image = Image.new("RGB", (640, 640), colour)
        image.paste(photo(k).crop(box), box[:2])
        return image

    images = good() | {"00": framed(0, "black"), "01": framed(1, "#f4f4f2")}
    images["02"] = photo(2, like=Image.new("RGB", (640, 640), "white"))  # a subject before white
    images["03"] = Image.new("RGB", (640, 640), "black")
    found = advised(images)
    assert found["bars"]["images"] == ["00", "01"] and "Cut them off" in found["bars"]["text"]
    assert 0.15 < pictures.bars(images["00"].resize((320, 320))) < 0.3


def test_the_same_background(advised):
    wall = photo(99, subject=False)
    images = {f"{k:02}": photo(k, like=wall) for k in range(10)}
    found = advised(images)
    assert found["background"]["text"].startswith("All 10 images have nearly the same background") and "pose" not in found
    assert "background" not in advised(images, about=replace(ABOUT, purpose="style"))
    assert "background" not in advised(images, {n: f"{t}, green background" for n, t in captions().items()})


def test_the_same_pose(advised):
    def posed(k: int) -> Image.Image:
        image, draw = (made := photo(k, subject=False)), ImageDraw.Draw(made)
        colours = np.random.default_rng(k).integers(0, 100, (3, 3))
        for n, (x, y, r) in enumerate([(320, 160, 110), (320, 420, 190), (200, 400, 90)]):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(map(int, colours[n])))
        light = Image.linear_gradient("L").rotate(90).resize(image.size)
        return Image.blend(image, Image.merge("RGB", (light,) * 3), 0.6)

    found = advised({f"{k:02}": posed(k) for k in range(10)})
    assert len(found["pose"]["images"]) >= 8 and "the same pose" in found["pose"]["text"]


def test_what_a_captioner_can_hardly_tell_apart(advised):
    alike = frozenset(f"{k:02}.png" for k in range(8))
    found = advised(about=replace(ABOUT, alike=alike))
    assert list(found) == ["variety"] and found["variety"]["images"] == sorted(name[:2] for name in alike)
    assert "8 of 10 images are nearly the same to the model that captioned them" in found["variety"]["text"]
    assert advised(about=replace(ABOUT, alike=frozenset(sorted(alike)[:7]))) == {}


def test_missing_captions(advised):
    some = {n: t for n, t in captions().items() if n > "03"}
    found = advised(texts=some)
    assert list(found) == ["missing"] and found["missing"]["images"] == ["00", "01", "02", "03"]
    assert "4 of 10 images have no caption and will be called “zorp creature”" in found["missing"]["text"]
    assert "no trigger or class word" in advised(texts=some, about=About())["missing"]["text"]
    assert "None of the 10 images has a caption" in advised(texts={})["missing"]["text"]


def test_the_trigger_in_some_captions_only(advised):
    texts = captions() | {"00": "a creature sits", "01": "a zorpian creature"}
    found = advised(texts=texts)
    assert list(found) == ["trigger"] and found["trigger"]["images"] == ["00", "01"] and found["trigger"]["remedy"]["do"] == "trigger_first"
    assert "“zorp” stands in 8 of 10 captions" in found["trigger"]["text"]
    assert advised(texts={n: f"a creature {THINGS[int(n)]}" for n in captions()}) == {}  # in none: training puts it before all


def test_the_trigger_of_another_set(advised):
    others = (Other("Owls", "owla", ("owla, a bird", "owla and zorp in a tree")), Other("Class", "", ("a creature", "a zorp")))
    found = advised(texts=captions() | {"04": "zorp and owla play"}, about=replace(ABOUT, others=others[:1]))
    assert list(found) == ["other_trigger"]
    said = advised(about=replace(ABOUT, others=others[1:]))["other_trigger"]
    assert "1 caption of Class says “zorp”" in said["text"] and said["images"] == []


def test_identical_captions(advised):
    found = advised(texts=captions() | dict.fromkeys(["00", "01", "02"], "zorp, a creature"))
    assert list(found) == ["identical"] and found["identical"]["images"] == ["00", "01", "02"]
    assert advised(texts=captions() | dict.fromkeys(["00", "01"], "zorp, a creature")) == {}


def test_tags_and_sentences(advised):
    tags = {n: f"zorp, solo, {THINGS[int(n)]}, smile, green eyes" for n in captions()}
    sentences = {n: f"zorp, a picture of a small green creature that sits {THINGS[int(n)]}" for n in captions()}
    assert "trained on tags" in advised(texts=sentences, about=replace(ABOUT, style="tags"))["style"]["text"]
    assert "trained on sentences" in advised(texts=tags, about=replace(ABOUT, style="sentences"))["style"]["text"]
    for texts, style in ((tags, "tags"), (sentences, "sentences"), (tags, ""), (sentences, "")):
        assert advised(texts=texts, about=replace(ABOUT, style=style)) == {}


def test_captions_that_are_cut_off(advised):
    long = captions() | {"05": "zorp, " + "very " * 100 + "green"}
    assert "more than 75 tokens (most: 10" in advised(texts=long, about=replace(ABOUT, windows=1))["tokens"]["text"]
    assert advised(texts=long) == {}


def test_the_most_important_comes_first(advised):
    images = good(6) | {"copy": good(1)["00"].resize((500, 500)), "02": photo(2, (300, 300))}
    assert list(advised(images, {"00": "zorp, a creature"})) == ["few", "duplicate", "small", "missing"]
