"""inspect and convert on files that the exporter wrote."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.adapters import Delta
from trainer.formats import FormatError, self_check
from trainer.formats.export import export
from trainer.formats.metadata import Facts, read_header, tensor_hash
from trainer.tools.convert import convert
from trainer.tools.inspect import format_text, inspect, read_lora

LAYERS = {
    "unet": {
        "mid_block.attentions.0.proj_in": (8, 8, 1, 1),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (8, 768),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (64, 8),
    },
    "text_1": {f"encoder.layers.0.self_attn.{n}": (12, 12) for n in self_check.TEXT_ATTENTION},
}
FACTS = Facts(base="dream", rank=4, alpha=2.0, trigger_words=("ohwx", "cat"), title="My cat", steps=30)


def deltas():
    torch.manual_seed(0)
    ranks = {"unet": 4, "text_1": 2}
    return [
        Delta(
            part, p, "lora", {"down": torch.randn(ranks[part], *s[1:]) / 8, "up": torch.randn(s[0], ranks[part], *(1 for _ in s[2:]))}, 0.5
        )
        for part, shapes in LAYERS.items()
        for p, s in shapes.items()
    ]


@pytest.fixture(params=["kohya", "peft"])
def lora(request, tmp_path):
    options = {"family": "sd1", "dtype": "fp16", "facts": FACTS, "layers": LAYERS, "naming": request.param}
    return export(tmp_path / f"{request.param}.safetensors", deltas(), **options).path, request.param


def test_inspect_says_what_is_in_a_lora(lora):
    path, naming = lora
    report = inspect(path)
    assert json.loads(json.dumps(report)) is not None
    alphas = {"kohya": (2.0, 1.0), "peft": (4.0, 2.0)}[naming]  # PEFT files have the scale in lora_B
    assert report["parts"] == {
        "unet": {"modules": 3, "ranks": [4], "alphas": [alphas[0]]},
        "text_1": {"modules": 4, "ranks": [2], "alphas": [alphas[1]]},
    }
    assert (report["kind"], report["family"], report["naming"], report["empty"]) == ("lora", "sd1", naming, False)
    assert report["trigger_words"] == ["ohwx", "cat"]
    assert report["metadata"]["title"] == "My cat" and report["metadata"]["steps"] == "30"
    assert report["hash_matches"] is True and report["bytes"] == path.stat().st_size
    text = format_text(report)
    for said in (
        "a LoRA for Stable Diffusion 1.x",
        f"naming: {naming}",
        "unet: 3 layers, rank 4",
        "trigger words: ohwx, cat",
        "as the file says",
    ):
        assert said in text


def test_inspect_tells_a_changed_file(lora):
    path, _ = lora
    state = load_file(path)
    metadata, _ = read_header(path)
    next(t for k, t in state.items() if "proj_in" in k and "alpha" not in k).mul_(2)
    save_file(state, path, metadata)
    assert inspect(path)["hash_matches"] is False
    assert "NOT what the file says" in format_text(inspect(path))


def test_inspect_other_things(tmp_path):
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, tmp_path / "vae.safetensors")
    report = inspect(tmp_path / "vae.safetensors")
    assert report["kind"] == "vae" and "a VAE" in format_text(report)
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(4)}, tmp_path / "loha.safetensors")
    assert "plain LoRA" in format_text(inspect(tmp_path / "loha.safetensors"))
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04 and more of it")
    with pytest.raises(FormatError, match="a pickle"):
        inspect(tmp_path / "a.ckpt")


def test_convert_there_and_back(lora, tmp_path):
    path, naming = lora
    other = "peft" if naming == "kohya" else "kohya"
    assert convert(path, tmp_path / "there.safetensors", other) == []
    assert convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", naming) == []
    for file, expected in (("there", other), ("back", naming)):
        found, layers = read_lora(tmp_path / f"{file}.safetensors")
        live = {(d.part, d.path): d for d in deltas()}
        assert found == expected
        assert {(d.part, d.path) for d in layers} == live.keys()
        assert max(self_check.relative_error(d, live[d.part, d.path]) for d in layers) < 2e-3
        metadata, tensors = read_header(tmp_path / f"{file}.safetensors")
        before, _ = read_header(path)
        same = [k for k in before if "hash" not in k]
        assert {k: metadata[k] for k in same} == {k: before[k] for k in same}
        assert metadata["sshs_model_hash"] == tensor_hash(tmp_path / f"{file}.safetensors")
        assert {dtype for dtype, _ in tensors.values()} == {"F16"}


def test_convert_completes_what_readers_would_refuse(tmp_path):
    prefix = "text_encoder.text_model.encoder.layers.0.self_attn."
    save_file(
        {f"{prefix}{n}.lora_{m}.weight": torch.ones(*s) for n in ("q_proj", "v_proj") for m, s in {"A": (2, 768), "B": (768, 2)}.items()},
        tmp_path / "q.safetensors",
    )
    (note,) = convert(tmp_path / "q.safetensors", tmp_path / "all.safetensors", "kohya")
    assert "2 layers of zeros" in note
    assert inspect(tmp_path / "all.safetensors")["parts"]["text_1"]["modules"] == 4
    assert read_header(tmp_path / "all.safetensors")[0]["ss_base_model_version"] == "sd_v1"


def test_convert_refuses(lora, tmp_path):
    path, naming = lora
    before = path.read_bytes()
    with pytest.raises(FormatError, match="exists already and is not overwritten"):
        convert(path, path, "peft")
    with pytest.raises(FormatError, match=f"has {naming} naming already"):
        convert(path, tmp_path / "x.safetensors", naming)
    with pytest.raises(FormatError, match="must be one of kohya, peft"):
        convert(path, tmp_path / "x.safetensors", "a1111")
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4)}, tmp_path / "xl.safetensors")
    with pytest.raises(FormatError, match=r"Stable Diffusion XL\. Read here: LoRAs of sd1"):
        convert(tmp_path / "xl.safetensors", tmp_path / "x.safetensors", "peft")
    assert path.read_bytes() == before and not (tmp_path / "x.safetensors").exists()
