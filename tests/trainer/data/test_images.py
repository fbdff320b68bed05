import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms, features

from trainer.data.images import crop, open_rgb

BLUE = "#0000ff"


def saved(path: Path, image: PIL.Image.Image, **options) -> np.ndarray:
    """`image` written to `path` and read back by open_rgb on blue, as (height, width, 3)."""
    image.save(path, **options)
    rgb = open_rgb(path, BLUE)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int)


def test_plain_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert (saved(tmp_path / "a.png", PIL.Image.fromarray(pixels)) == pixels).all()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)), ("P", (10, 200, 30), (10, 200, 30))],
)
def test_grey_one_bit_and_palette(tmp_path, mode, colour, expected):
    image = PIL.Image.new("RGB", (8, 8), colour).quantize(4) if mode == "P" else PIL.Image.new(mode, (8, 8), colour)
    assert image.mode == mode
    assert (saved(tmp_path / "a.png", image) == expected).all()


def test_alpha_is_laid_on_the_background(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128)]
    assert saved(tmp_path / "a.png", PIL.Image.fromarray(pixels))[0].tolist() == [[255, 0, 0], [0, 0, 255], [128, 0, 127]]


def test_the_background_is_white_unless_told(tmp_path):
    PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_grey_with_alpha(tmp_path):
    image = PIL.Image.new("LA", (3, 1))
    image.putdata([(90, 255), (90, 0), (200, 255)])
    assert saved(tmp_path / "a.png", image)[0].tolist() == [[90, 90, 90], [0, 0, 255], [200, 200, 200]]


def test_palette_with_transparency(tmp_path):
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9])
    image.putdata([0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved(tmp_path / "one.png", image, transparency=1)[0].tolist() == [[255, 0, 0], [0, 0, 255], [9, 9, 9]]
        graded = saved(tmp_path / "graded.png", image, transparency=bytes([0, 255, 128]))[0].tolist()
    assert graded == [[0, 0, 255], [0, 255, 0], [5, 5, 132]]


def test_a_transparent_colour_of_an_rgb_image(tmp_path):
    image = PIL.Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (200, 0, 0))
    assert saved(tmp_path / "a.png", image, transparency=(1, 2, 3))[0].tolist() == [[0, 0, 255], [200, 0, 0]]


def test_sixteen_bits_keep_their_gradient(tmp_path):
    values = np.linspace(0, 65535, 512).astype(np.uint16)
    grey = saved(tmp_path / "a.png", PIL.Image.fromarray(values[None].repeat(4, 0)))[0]
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.mode == "I;16"
    assert (grey == np.rint(values / 257)[:, None]).all()
    assert grey[0, 0] == 0 and grey[-1, 0] == 255 and len(np.unique(grey)) == 256


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 257, 65535], np.int32), [0, 1, 255]),
        (np.array([0, 1, 255], np.int32), [0, 0, 1]),
        (np.array([-5, 0, 2**31 - 1], np.int32), [0, 0, 255]),
        (np.array([0, 0.2, 1], np.float32), [0, 51, 255]),
        (np.array([0, 51, 255], np.float32), [0, 51, 255]),
        (np.array([0, 25700, 60000], np.float32), [0, 100, 233]),
        (np.array([0, 50000, 100000], np.float32), [0, 128, 255]),
        (np.array([-1, np.nan, 0], np.float32), [0, 0, 0]),
    ],
)
def test_wide_integers_and_floats_are_scaled_by_their_range(tmp_path, values, expected):
    assert saved(tmp_path / "a.tif", PIL.Image.fromarray(values[None]))[0, :, 0].tolist() == expected


def test_cmyk_jpeg(tmp_path):
    PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    with PIL.Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
    assert np.asarray(open_rgb(tmp_path / "a.jpg"))[8, 8] == pytest.approx((255, 0, 0), abs=6)


needs_lcms = pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow is built without littlecms")


def linear_profile(grey: bool = False) -> bytes:
    """sRGB with tone curves of gamma 1, so that the values of an image mean something else; or a grey profile of that curve."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(raw[128:132], "big")):
        entry = 132 + 12 * i
        if raw[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = int.from_bytes(raw[entry + 4 : entry + 8], "big")
            raw[offset : offset + 12] = b"curv" + bytes(8)  # no points: the identity
            raw[entry + 8 : entry + 12] = (12).to_bytes(4, "big")
            if grey and raw[entry : entry + 4] == b"rTRC":
                raw[16:20], raw[entry : entry + 4] = b"GRAY", b"kTRC"
    return bytes(raw)


@needs_lcms
@pytest.mark.parametrize(
    ("mode", "grey"), [("RGB", False), ("RGBA", False), ("P", False), ("L", False), ("LA", False), ("L", True), ("LA", True)]
)
def test_an_embedded_profile_is_applied(tmp_path, mode, grey):
    image = PIL.Image.new("RGB", (4, 4), (55, 55, 55)).convert(mode)
    value = image.convert("RGB").getpixel((0, 0))[0] / 255
    expected = 255 * (1.055 * value ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert saved(tmp_path / "a.png", image, icc_profile=linear_profile(grey))[0, 0] == pytest.approx([expected] * 3, abs=2)


@needs_lcms
def test_transparency_outlives_a_profile(tmp_path):
    image = PIL.Image.new("RGBA", (2, 1), (55, 55, 55, 0))
    assert saved(tmp_path / "a.png", image, icc_profile=linear_profile())[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("profile", [b"no profile" * 30, None], ids=["damaged", "other channels"])
def test_a_profile_that_does_not_fit_is_left_aside(tmp_path, profile):
    if profile is None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = PIL.Image.new("RGB", (4, 4), (55, 66, 77))
    assert saved(tmp_path / "a.png", image, icc_profile=profile)[0, 0].tolist() == [55, 66, 77]


CORNERS = PIL.Image.fromarray(np.kron([[10, 80, 80], [80, 80, 200]], np.ones((16, 16))).astype(np.uint8)).convert("RGB")  # 48 x 32


@pytest.mark.parametrize(
    ("orientation", "size", "dark", "bright"),
    [
        (1, (48, 32), (0, 0), (47, 31)),
        (2, (48, 32), (47, 0), (0, 31)),
        (3, (48, 32), (47, 31), (0, 0)),
        (4, (48, 32), (0, 31), (47, 0)),
        (5, (32, 48), (0, 0), (31, 47)),
        (6, (32, 48), (31, 0), (0, 47)),
        (7, (32, 48), (31, 47), (0, 0)),
        (8, (32, 48), (0, 47), (31, 0)),
        (99, (48, 32), (0, 0), (47, 31)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_puts_each_corner_where_it_belongs(tmp_path, suffix, orientation, size, dark, bright):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    CORNERS.save(tmp_path / f"a.{suffix}", exif=exif)
    image = open_rgb(tmp_path / f"a.{suffix}")
    assert image.size == size
    assert image.getpixel(dark) == pytest.approx((10, 10, 10), abs=8)
    assert image.getpixel(bright) == pytest.approx((200, 200, 200), abs=8)


def test_a_damaged_exif_block_leaves_the_image_as_it_is(tmp_path):
    CORNERS.save(tmp_path / "a.png", exif=b"Exif\0\0MMs*\0\0\0\x08 no TIFF")
    assert open_rgb(tmp_path / "a.png").size == (48, 32)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF")
def test_avif(tmp_path):
    assert saved(tmp_path / "a.avif", PIL.Image.new("RGB", (32, 32), (200, 30, 30)))[16, 16] == pytest.approx((200, 30, 30), abs=6)


def test_other_formats_are_not_even_tried(tmp_path):
    """An EPS is a program that Pillow would give to Ghostscript."""
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "a.png", format="EPS")
    with pytest.raises(PIL.UnidentifiedImageError):
        open_rgb(tmp_path / "a.png")


def test_crop_takes_the_box_at_the_size():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = (250, 120, 10)
    piece = crop(PIL.Image.fromarray(pixels), (20, 10, 40, 30), (8, 8))
    assert piece.size == (8, 8) and piece.mode == "RGB"
    inside = np.asarray(piece).astype(int)
    assert inside[2:-2, 2:-2].reshape(-1, 3).tolist() == pytest.approx(np.full((16, 3), (250, 120, 10)), abs=3)
    assert inside[0, 0, 0] < 230  # the filter sees the black beyond the box's corner


def test_crop_honours_fractions_of_a_pixel():
    ramp = PIL.Image.fromarray(np.arange(0, 200, 2, dtype=np.uint8)[None].repeat(50, 0)).convert("RGB")  # value 2x at column x
    whole = np.asarray(crop(ramp, (10, 0, 60, 50), (50, 50))).astype(int)
    half = np.asarray(crop(ramp, (10.5, 0, 60.5, 50), (50, 50))).astype(int)
    assert (half - whole)[:, 5:-5] == pytest.approx(1)


def test_crop_enlarges_and_shrinks_to_the_exact_size():
    for size in ((512, 320), (8, 16), (1, 1)):
        assert crop(CORNERS, (0.25, 0, 47.75, 32), size).size == size


def test_crop_outside_the_image_is_refused():
    with pytest.raises(ValueError, match="box"):
        crop(CORNERS, (0, 0, 49, 32), (8, 8))


def test_importing_the_data_modules_loads_no_torch():
    code = "import sys, trainer.data.scan, trainer.data.buckets, trainer.data.captions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_a_large_jpeg_may_come_smaller_and_looks_the_same(tmp_path):
    PIL.Image.linear_gradient("L").resize((1600, 800)).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    whole, part = open_rgb(tmp_path / "a.jpg"), open_rgb(tmp_path / "a.jpg", least=150)
    assert whole.size == (1600, 800) and part.size == (400, 200)
    assert np.abs(np.asarray(whole.resize((400, 200)), int) - np.asarray(part, int)).max() < 6
    assert open_rgb(tmp_path / "a.jpg", least=900).size == (1600, 800)
