"""A file is written whole and checked, or not at all."""

import base64
import errno
import hashlib
import io
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file

from trainer.adapters import Delta
from trainer.formats import export as module
from trainer.formats import kohya, readers
from trainer.formats.export import ExportError, export
from trainer.formats.factors import relative_error
from trainer.formats.metadata import Facts, read_header

LAYERS = {
    "unet": {
        "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 12),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": (8, 32),
        "mid_block.resnets.0.conv1": (8, 8, 3, 3),
    },
    "text_1": {f"encoder.layers.{i}.self_attn.{n}": (12, 12) for i in (0, 1) for n in readers.TEXT_ATTENTION},
}
FACTS = Facts(base="tiny", rank=2, alpha=2.0, trigger_words=("ohwx", "cat"), description="A cat.")
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def deltas(up=1.0, only=lambda path: True):
    torch.manual_seed(0)
    return [
        Delta(part, path, "lora", {"down": torch.randn(2, *s[1:]) / 8, "up": torch.randn(s[0], 2, *(1 for _ in s[2:])) * up}, 1.0)
        for part, shapes in LAYERS.items()
        for path, s in shapes.items()
        if only(path)
    ]


def save(folder, some, **changes):
    options = {"family": "sd1", "naming": "kohya", "dtype": "fp16", "facts": FACTS, "layers": LAYERS} | changes
    return export(folder / "cat.safetensors", some, **options)


def test_a_good_export(tmp_path):
    done = save(tmp_path, deltas())
    content = done.path.read_bytes()
    assert (done.bytes, done.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert done.autov2 == done.sha256[:10]
    assert done.modules == {"unet": 4, "text_1": 8} and done.notes == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.json", "cat.safetensors"]
    assert json.loads((tmp_path / "cat.json").read_text())["activation text"] == "ohwx, cat"
    metadata, tensors = read_header(done.path)
    assert metadata["ss_output_name"] == "cat"
    assert {dtype for dtype, _ in tensors.values()} == {"F16"}
    assert struct.unpack("<Q", content[:8])[0] < 1 << 20
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"][1] == (2, 8, 1, 1)
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"][1] == (8, 2, 1, 1)


def test_no_sidecar_without_trigger_words(tmp_path):
    save(tmp_path, deltas(), facts=Facts(base="tiny", rank=2, alpha=2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["cat.safetensors"]


def test_picture_and_sidecars_on_request(tmp_path):
    from PIL import Image

    picture = tmp_path / "preview.png"
    Image.effect_noise((1024, 768), 80).convert("RGB").save(picture)  # noise takes more bytes than any photograph
    folder = tmp_path / "out"
    folder.mkdir()
    done = save(folder, deltas(), picture=picture, thumbnail=True, sidecars=("json", "png"))
    assert sorted(p.name for p in folder.iterdir()) == ["cat.json", "cat.png", "cat.safetensors"]
    assert [p.name for p in done.also] == ["cat.json", "cat.png"]
    with Image.open(folder / "cat.png") as shown, Image.open(picture) as original:
        assert (shown.size, shown.tobytes()) == (original.size, original.tobytes())
    entries, _ = read_header(done.path)
    head, _, data = entries["modelspec.thumbnail"].partition(",")
    assert head == "data:image/jpeg;base64" and len(data) < 1 << 18  # ComfyUI serves headers up to 1 MiB
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.size == (384, 288)
    other = save(folder, deltas(), picture=picture, sidecars=())
    assert other.also == () and "modelspec.thumbnail" not in read_header(other.path)[0]


def test_what_a_tool_leaves_unread_is_told_and_saved(tmp_path):
    """conv_in is read by all but sd-scripts: a run's work is not thrown away for that."""
    some = [*deltas(), Delta("unet", "conv_in", "lora", {"down": torch.randn(2, 4, 3, 3), "up": torch.randn(8, 2, 1, 1)}, 1.0)]
    done = save(tmp_path, some, layers=LAYERS | {"unet": LAYERS["unet"] | {"conv_in": (8, 4, 3, 3)}})
    assert done.notes == ("sd-scripts would leave 3 keys unread, the first is lora_unet_conv_in.alpha.",)
    assert done.vouched == tuple(t for t in readers.READERS if t != "sd-scripts")
    assert sorted(done.unread["sd-scripts"]) == [f"lora_unet_conv_in.{e}" for e in sorted(kohya.ENDINGS)]


def test_what_a_model_on_a_gpu_in_channels_last_gives_is_written_too(tmp_path):
    some = deltas()
    conv = next(d for d in some if d.path.endswith("conv1"))
    conv.tensors["down"] = conv.tensors["down"].to(memory_format=torch.channels_last)
    assert save(tmp_path, some).notes == ()


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_text_attention_is_completed_with_zeros(tmp_path, naming):
    some = deltas(only=lambda p: "layers.1" not in p and not p.endswith(("k_proj", "out_proj")))
    done = save(tmp_path, some, naming=naming)
    assert done.modules == {"unet": 4, "text_1": 4}
    assert "2 layers of zeros" in done.notes[0]
    added = [t for k, t in load_file(done.path).items() if "layers" in k and ("k_proj" in k or "out_proj" in k) and "alpha" not in k]
    assert len(added) == 4 and not any(t.any() for t in added) and all(1 in t.shape for t in added)


@pytest.mark.parametrize("only", ["ff.net", "conv1"])
def test_a_layer_that_shows_the_family_is_added(tmp_path, only):
    done = save(tmp_path, deltas(only=lambda p: only in p))
    assert not load_file(done.path)[f"{K}.lora_up.weight"].any()
    assert done.modules == {"unet": 2}


def test_weights_beyond_fp16_are_saved_as_bf16(tmp_path):
    done = save(tmp_path, deltas(up=1e5))
    assert "bf16 instead of fp16: the largest is" in done.notes[0]
    assert {dtype for dtype, _ in read_header(done.path)[1].values()} == {"BF16"}


@pytest.mark.parametrize("up", [1e-3, 1e-5, 1e-7])
def test_small_changes_keep_their_digits_in_fp16(tmp_path, up):
    """After a few steps `up` lies where fp16 has only steps of 6e-8; the check inside export is strict (2e-3)."""
    done = save(tmp_path, deltas(up=up))
    assert done.notes == ()
    assert {dtype for dtype, _ in read_header(done.path)[1].values()} == {"F16"}


def test_tiny_changes_are_saved_as_bf16(tmp_path):
    assert "too small" in save(tmp_path, deltas(up=1e-11)).notes[0]


def test_an_untrained_lora_is_saved_with_a_note(tmp_path):
    assert "changes nothing yet" in save(tmp_path, deltas(up=0.0)).notes[0]


def test_nothing_trained_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no layer was trained"):
        save(tmp_path, [])


def test_a_diverged_lora_is_not_saved_and_the_old_file_stays(tmp_path):
    save(tmp_path, deltas())
    before = (tmp_path / "cat.safetensors").read_bytes()
    some = deltas()
    some[0].tensors["up"][0] = float("nan")
    with pytest.raises(ExportError, match=r"not finite.*earlier checkpoint"):
        save(tmp_path, some)
    assert (tmp_path / "cat.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.json", "cat.safetensors"]


def test_a_failed_check_leaves_nothing(tmp_path):
    some = deltas()
    some.append(Delta("unet", "no_such.layer", "lora", {"down": torch.ones(1, 4), "up": torch.ones(4, 1)}, 1.0))
    with pytest.raises(ExportError, match=r"No tool would read 3 of its keys.*no\.such\.layer is no layer of a Stable"):
        save(tmp_path, some)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["fsync", "write"])
def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:  # a real file system that takes no byte
        if not module.Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        opened = module.Path.open
        monkeypatch.setattr(module.Path, "open", lambda self, mode="r": opened(module.Path("/dev/full") if "w" in mode else self, mode))
    with pytest.raises(
        ExportError, match=r"The disk is full: cat.safetensors could not be written .* \(\d+ MB free, \d+ MB are needed\)\. Free"
    ):
        save(tmp_path, deltas())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_gets_a_sentence(tmp_path):
    with pytest.raises(ExportError, match="was not saved: No such file"):
        save(tmp_path / "none", deltas())


def test_start_from_a_written_lora(tmp_path):
    """What export writes, from_kohya gives back as the same changes at the same paths."""
    some = deltas()
    back = {(d.part, d.path): d for d in kohya.from_kohya("sd1", load_file(save(tmp_path, some, dtype="fp32").path))}
    assert back.keys() == {(d.part, d.path) for d in some}
    assert max(relative_error(back[d.part, d.path], d) for d in some) < 1e-6
