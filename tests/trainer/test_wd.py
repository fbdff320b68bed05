"""The WD tagger on a random ONNX model made on the spot, against its arithmetic written out by hand."""

import shutil

import numpy as np
import pytest
from PIL import Image
from small_captioners import TAGS, make_wd

from trainer.captioners import wd
from trainer.captioners.job import caption

NAMES, KINDS = [name for name, _ in TAGS], [str(kind) for _, kind in TAGS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_wd(tmp_path_factory.mktemp("wd") / "model")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(24, 24), (60, 31), (17, 40), (300, 200)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def cubic(x: np.ndarray) -> np.ndarray:
    """The cubic of Pillow's BICUBIC (a = -0.5)."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """(n, n, 3) of bytes at (side, side, 3): cubics as wide as the shrinking, columns first, rounded to bytes after each direction."""
    n = pixels.shape[0]
    scale = max(1, n / side)
    centres = (np.arange(side) + 0.5) * n / side
    weights = cubic((np.arange(n)[None] + 0.5 - centres[:, None]) / scale)
    weights /= weights.sum(1, keepdims=True)
    across = np.clip(np.rint(np.einsum("xw,hwc->hxc", weights, pixels.astype(float))), 0, 255)
    return np.clip(np.rint(np.einsum("yh,hxc->yxc", weights, across)), 0, 255)


@pytest.mark.parametrize("n", range(4))
def test_a_picture_is_prepared_as_the_models_own_code_does_it(n):
    image = pictures()[n]
    rgb = np.asarray(image)
    longest = max(rgb.shape[:2])
    square = np.full((longest, longest, 3), 255, np.uint8)
    top, left = (longest - rgb.shape[0]) // 2, (longest - rgb.shape[1]) // 2
    square[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
    expected = (square if longest == 24 else resized(square, 24))[:, :, ::-1]
    made = wd.prepare(image, 24)
    assert made.shape == (24, 24, 3) and made.dtype == np.float32 and np.ptp(made) > 100
    assert np.abs(made - expected).max() <= (0 if longest == 24 else 1)  # Pillow's weights are whole numbers of 1/2**22
    red = wd.prepare(Image.new("RGB", (24, 24), (255, 0, 0)), 24)
    assert red[0, 0].tolist() == [0, 0, 255]  # BGR


def expected(folder, image: Image.Image, general=0.35, character=0.85) -> list[str]:
    """The tags by numpy alone, the most probable first, characters behind."""
    flat = (wd.prepare(image, 24) / np.float32(255) - np.float32(0.5)).reshape(-1)
    chance = 1 / (1 + np.exp(-flat.astype(np.float64) @ np.load(folder / "weight.npy").astype(np.float64)))
    found = [
        (kind == 4, -p, name)
        for p, (name, kind) in zip(chance, TAGS, strict=True)
        if kind != 9 and p >= (character if kind == 4 else general)
    ]
    return [name for *_, name in sorted(found)]


def test_the_tags_are_those_of_the_model(model):
    notes = []
    write = wd.build(wd.Config(source=str(model), spaces=False, characters_first=False), model, "cpu", "fp32", notes.append)
    texts = write(pictures())
    assert [text.split(", ") for text in texts] == [expected(model, image) for image in pictures()]
    assert len(set(texts)) > 1 and notes == ["Tags are computed on the CPU, as everything here."]
    low = wd.build(wd.Config(spaces=False, characters_first=False, general=0.1, character=0.3), model, "cpu", "fp32", notes.append)
    assert [text.split(", ") for text in low(pictures())] == [expected(model, image, 0.1, 0.3) for image in pictures()]


def test_a_model_of_a_fixed_batch_gives_the_same(model, tmp_path):
    fixed = make_wd(tmp_path / "fixed", batch=3)
    both = [wd.build(wd.Config(), folder, "cpu", "fp32", lambda text: None)(pictures()) for folder in (model, fixed)]
    assert both[0] == both[1] and len(both[1]) == 4


def test_what_is_written_of_the_probabilities():
    row = np.zeros(len(NAMES))
    for name, p in {
        "1girl": 0.99,
        "long_hair": 0.7,
        "^_^": 0.9,
        ">_<": 0.36,
        "smile": 0.34,
        "zorp_(series)": 0.86,
        "explicit": 0.2,
    }.items():
        row[NAMES.index(name)] = p

    def said(**settings: object) -> str:
        return wd.text(wd.Config.model_validate(settings), NAMES, KINDS, row)

    assert said() == "zorp (series), 1girl, ^_^, long hair, >_<"
    assert said(spaces=False) == "zorp_(series), 1girl, ^_^, long_hair, >_<"
    assert said(characters_first=False) == "1girl, ^_^, long hair, >_<, zorp (series)"
    assert said(rating=True).endswith(">_<, explicit")
    assert said(blocked="Long Hair, ^_^") == said(blocked=["long_hair", "^_^"]) == "zorp (series), 1girl, >_<"
    assert said(escape=True).startswith(r"zorp \(series\), 1girl")
    assert said(general=0.95, character=0.9) == "1girl"


@pytest.mark.parametrize(
    "tag", ["^_^", ">_<", "o_o", "0_0", "(o)_(o)", "+_-", "._.", "<|>_<|>", "=_=", "3_3", "6_9", ">_o", "@_@", "u_u", "x_x", "|_|", "||_||"]
)
def test_emoticons_keep_their_underscore(tag):
    assert wd.spaced(tag) == tag


@pytest.mark.parametrize("tag", ["long_hair", "d.va_(overwatch)", "2girls_kiss", "c.c._(code_geass)", "no_u", "69_(act)"])
def test_other_tags_get_spaces(tag):
    assert wd.spaced(tag) == tag.replace("_", " ")


def test_the_processor_is_chosen_with_a_reason():
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers, reason = wd.choose("cuda:1", both)
    assert providers == [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"] and "GPU" in reason
    for device, available, word in (
        ("cuda", both[1:], "has no GPU part"),
        ("cpu", both, "as everything here"),
        ("mps", both, "has no GPU part"),
    ):
        providers, reason = wd.choose(device, available)
        assert providers == ["CPUExecutionProvider"] and word in reason and reason.endswith(".")


def test_what_is_no_tagger_is_refused_with_a_sentence(model, tmp_path, draw_pictures, monkeypatch):
    images = draw_pictures(tmp_path / "images", [(40, 30)])

    def refused(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        change(folder)
        with pytest.raises(ValueError) as error:
            caption(images, tmp_path / f"job-{name}", captioner="wd", settings={"source": str(folder)}, device="cpu")
        assert str(folder) in str(error.value)
        return str(error.value)

    assert "model.onnx is missing" in refused("weights", lambda f: (f / "model.onnx").unlink())
    assert "selected_tags.csv is missing" in refused("tags", lambda f: (f / "selected_tags.csv").unlink())
    assert "model.onnx cannot be read" in refused("torn", lambda f: (f / "model.onnx").write_bytes(b"\x08\x08torn"))
    assert "selected_tags.csv cannot be read" in refused("empty", lambda f: (f / "selected_tags.csv").write_text("a,b\n1,2\n"))
    csv = "\n".join((model / "selected_tags.csv").read_text().splitlines()[:-1])
    assert "knows 14 tags and selected_tags.csv 13" in refused("short", lambda f: (f / "selected_tags.csv").write_text(csv))
    assert (images / "00.txt").read_text() == "zorp, thing 0, red, small"

    monkeypatch.setattr(wd.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="onnxruntime, which is missing"):
        wd.build(wd.Config(), model, "cpu", "fp32", print)
