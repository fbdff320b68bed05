"""inspect and convert on files of every kind: exported, foreign, damaged, and such as are no LoRA at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.adapters import Delta
from trainer.formats import FormatError, kohya, layouts, readers
from trainer.formats.export import export
from trainer.formats.factors import relative_error
from trainer.formats.metadata import Facts, read_header, tensor_hash
from trainer.tools.convert import convert
from trainer.tools.inspect import format_text, inspect, read_lora

KEYS = ["family", "adapter", "rank", "alpha", "layers", "parameters", "effect", "finite", "metadata", "unread", "problems"]
BASE = layouts.layers("sd1")
PATHS = {
    "unet": [p for p in BASE["unet"] if p.startswith("mid_block.attentions")],
    "text_1": [p for p in BASE["text_1"] if ".0." in p],
}
FACTS = Facts(base="dream", rank=4, alpha=2.0, trigger_words=("ohwx", "cat"), title="My cat", steps=30)
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
K2 = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def deltas(paths=PATHS, base=BASE, rank=4):
    torch.manual_seed(0)
    return [
        Delta(part, p, "lora", {"down": torch.randn(rank, *s[1:]) / 8, "up": torch.randn(s[0], rank, *(1 for _ in s[2:]))}, 0.5)
        for part, some in paths.items()
        for p in some
        for s in [base[part][p]]
    ]


def write(path, naming, some=None):
    options = {"family": "sd1", "dtype": "fp16", "facts": FACTS, "layers": BASE, "naming": naming}
    return export(path, some or deltas(), **options).path


@pytest.fixture(params=["kohya", "peft", "comfy"])
def lora(request, tmp_path):
    return write(tmp_path / f"{request.param}.safetensors", request.param), request.param


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.safetensors", "kohya")


def changed(path, change, metadata=None):
    """The file with `change` made to its tensors."""
    state = load_file(path)
    new = change(state)
    state = new if isinstance(new, dict) else state
    entries = {k: v for k, v in read_header(path)[0].items() if "hash" not in k}
    save_file(state, path, entries if metadata is None else metadata)
    return inspect(path)


def test_inspect_says_what_is_in_a_lora(lora):
    path, naming = lora
    found = inspect(path)
    assert list(found) == KEYS and json.loads(json.dumps(found)) == found
    assert (found["family"], found["adapter"], found["rank"], found["effect"], found["finite"]) == ("sd1", "lora", 4, True, True)
    assert found["alpha"] == (4 if naming == "peft" else 2)  # PEFT files have the scale in lora_B
    assert {part: {b: v["layers"] for b, v in blocks.items()} for part, blocks in found["layers"].items()} == {
        "unet": {"mid_block": 12},
        "text_1": {"encoder.layers.0": 6},
    }
    wholes = [0.5 * d.tensors["up"].flatten(1) @ d.tensors["down"].flatten(1) for d in deltas() if d.part == "unet"]
    assert found["layers"]["unet"]["mid_block"]["norm"] == pytest.approx(sum(float(w.norm()) ** 2 for w in wholes) ** 0.5, rel=1e-3)
    assert found["parameters"] == sum(t.numel() for t in load_file(path).values())
    assert found["metadata"] == read_header(path)[0] and found["metadata"]["modelspec.title"] == "My cat"
    whole = [tool for tool, keys in found["unread"].items() if not keys]
    assert whole == {"kohya": list(readers.READERS), "peft": ["diffusers"], "comfy": ["ComfyUI"]}[naming]
    assert (found["problems"] == []) == (naming == "kohya")
    text = format_text(found, path.name)
    for said in (
        path.name,
        "kind: lora for Stable Diffusion 1.x",
        "rank: 4",
        "effect: yes",
        "unet: 12 layers\n  mid_block: 12 layers, norm ",
        "trigger words: ohwx, cat",
        "title: My cat",
    ):
        assert said in text


def test_inspect_by_the_command_line(good, capsys):
    assert main(["inspect", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(good)
    assert main(["inspect", str(good)]) == 0
    assert capsys.readouterr().out == format_text(inspect(good), good.name) + "\n"
    assert main(["inspect", str(good.with_name("none.safetensors"))]) == 1
    assert "does not exist" in capsys.readouterr().out


def rename(state, old, new):
    return {k.replace(old, new): t for k, t in state.items()}


def without(state, *ends):
    return {k: t for k, t in state.items() if not k.endswith(ends)}


@pytest.mark.parametrize(
    ("change", "expected", "said"),
    [
        (lambda s: s[f"{Q}.lora_up.weight"][0, 0].fill_(float("nan")), {"finite": False}, "1 tensors hold values that are not"),
        (lambda s: {k: t * (0 if "up" in k else 1) for k, t in s.items()}, {"effect": False}, "changes nothing at all"),
        (lambda s: {k: t * (0 if "alpha" in k else 1) for k, t in s.items()}, {"effect": False}, "alpha of 0"),
        (lambda s: without(s, ".alpha"), {"alpha": 4}, "no alpha, the first is lora_te_text"),
        (lambda s: s | {f"{Q}.alpha": torch.tensor(1.0)}, {"alpha": [1, 2]}, "unet has alphas 1, 2; diffusers"),
        (lambda s: without(s, "k_proj.alpha", "k_proj.lora_up.weight", "k_proj.lora_down.weight"), {"effect": True}, None),
        (lambda s: without(s, f"{Q}.lora_up.weight"), {"effect": True}, f"{Q} has no lora_up.weight"),
        (lambda s: rename(s, Q, "lora_unet_what"), {"family": "sd1"}, "would leave 3 keys unread, the first is lora_unet_what"),
        (lambda s: s | {f"{Q}.lora_down.weight": torch.ones(4, 640)}, {"family": "sd1"}, "1 layers have other sizes than the base's"),
        (lambda s: s | {f"{Q}.lora_down.weight": torch.ones(3, 1280)}, {"family": "sd1"}, "do not fit. The file is damaged"),
        (lambda s: s | {f"{Q}.lora_down.weight": torch.ones(0, 1280), f"{Q}.lora_up.weight": torch.ones(1280, 0)}, {}, "do not fit"),
        (lambda s: s | {f"{Q}.alpha": torch.ones(2)}, {}, "must be one number"),
        (lambda s: s | {f"{Q}.alpha": torch.tensor(float("nan"))}, {"finite": False, "alpha": 2}, "not numbers, the first is"),
        (lambda s: s | {f"lora_unet_{n}.lora_up.weight": torch.ones(2, 2) for n in ("x", "down_blocks_0")}, {}, "would leave"),
        (lambda s: s | {f"{Q}.weird": torch.ones(2)}, {}, "InvokeAI refuses the file for"),
    ],
)
def test_damage_is_told(good, change, expected, said):
    found = changed(good, change)
    assert list(found) == KEYS and expected.items() <= found.items()
    assert said is None or any(said in text for text in found["problems"]), found["problems"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert format_text(found)


def test_metadata_that_hide_a_file_are_told(good):
    entries = {k: v for k, v in read_header(good)[0].items() if "hash" not in k}
    mistaken = changed(good, lambda s: None, entries | {"ss_base_model_version": "sdxl_base_v1-0"})
    assert any("AUTOMATIC1111, Forge take it for Stable Diffusion XL" in text for text in mistaken["problems"])
    assert not changed(good, lambda s: None, {})["problems"]


def test_a_changed_file_is_told(good):
    entries = read_header(good)[0]
    found = changed(good, lambda s: s[f"{Q}.lora_up.weight"].mul_(2), entries)
    assert any("sshs_model_hash" in text for text in found["problems"])


def kind(endings, **more):
    return {f"{K2}.{e}": torch.ones(*s) for e, s in endings.items()} | {f"{K2}.alpha": torch.tensor(2.0)} | more


FOREIGN = {
    "loha": (kind({"hada_w1_a": (1280, 2), "hada_w1_b": (2, 768), "hada_w2_a": (1280, 2), "hada_w2_b": (2, 768)}), "loha", 2, True),
    "loha zero": (
        kind({"hada_w1_a": (1280, 2), "hada_w1_b": (2, 768), "hada_w2_b": (2, 768)}, **{f"{K2}.hada_w2_a": torch.zeros(1280, 2)}),
        *("loha", 2, False),
    ),
    "lokr": (kind({"lokr_w1": (8, 8), "lokr_w2_a": (160, 4), "lokr_w2_b": (4, 96)}), "lokr", 4, True),
    "dora": (kind({"lora_down.weight": (2, 768), "lora_up.weight": (1280, 2), "dora_scale": (1280, 1)}), "dora", 2, True),
    "oft": (kind({"oft_blocks": (4, 8, 8)}), "oft", None, True),
    "boft": (kind({"oft_blocks": (2, 4, 8, 8)}), "boft", None, True),
    "glora": (kind({"a1.weight": (2, 768), "a2.weight": (768, 2), "b1.weight": (2, 768), "b2.weight": (1280, 2)}), "glora", None, None),
    "full": ({f"{K2}.diff": torch.ones(1280, 768)}, "full", None, True),
    "tucker": (
        {
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 1280, 1, 1),
            "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(2, 2, 3, 3),
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(1280, 2, 1, 1),
            "lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(2.0),
        },
        *("locon", 2, True),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_are_named(tmp_path, name):
    state, adapter, rank, effect = FOREIGN[name]
    path = tmp_path / "other.safetensors"
    save_file(state, path, {"ss_base_model_version": "sd_v1"})
    found = inspect(path)
    assert (found["family"], found["adapter"], found["rank"], found["effect"]) == ("sd1", adapter, rank, effect)
    assert found["finite"] is True and found["unread"]["ComfyUI"] == []
    assert adapter == "locon" or any(f"of the kind {adapter}" in text for text in found["problems"])
    assert format_text(found).startswith(f"kind: {adapter} for Stable Diffusion 1.x")
    with pytest.raises(FormatError, match="plain"):
        read_lora(path)


def test_what_is_no_lora_is_named(tmp_path):
    def said(path):
        found = inspect(path)
        assert list(found) == KEYS and found["adapter"] is None and len(found["problems"]) == 1
        assert format_text(found, path.name).endswith(found["problems"][0])
        return found["problems"][0]

    save_file({"decoder.conv_in.weight": torch.zeros(4)}, tmp_path / "vae.safetensors")
    assert "a VAE" in said(tmp_path / "vae.safetensors") and "It is not a LoRA" in said(tmp_path / "vae.safetensors")
    save_file({"model.diffusion_model.double_blocks.0.a": torch.zeros(4)}, tmp_path / "flux.safetensors")
    assert "a model of Flux" in said(tmp_path / "flux.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04 and more of it")
    assert "a pickle" in said(tmp_path / "a.ckpt")
    (tmp_path / "text.safetensors").write_text("<!DOCTYPE html>")
    assert "not a .safetensors file" in said(tmp_path / "text.safetensors")
    save_file({}, tmp_path / "nothing.safetensors")
    assert "no model that is known here (0 tensors)" in said(tmp_path / "nothing.safetensors")
    assert "does not exist" in said(tmp_path / "none.safetensors")
    assert "no diffusers model" in said(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert "a diffusers folder of Stable Diffusion XL, not a LoRA" in said(tmp_path)


def test_a_lora_for_another_base_is_named(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(2, 8)}, path)
    found = inspect(path)
    assert (found["family"], found["adapter"]) == ("flux", "lora") and "not judged here" in found["problems"][-1] + found["problems"][0]
    with pytest.raises(FormatError, match="Read here: LoRAs of sd1, sd2, sdxl, sd3"):
        read_lora(path)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3.5_medium"])
def test_a_whole_published_model_s_lora_is_read_by_all(tmp_path, family):
    """A LoRA of rank 1 on every attention layer: names, sizes and family as in the published models."""
    base, own = layouts.layers(family), family[:3] if family.startswith("sd3") else family
    paths = {part: [p for p in some if "attn" in p and "norm" not in p] for part, some in base.items()}
    facts = Facts(base="x", rank=1, alpha=1.0, prediction="flow" if own == "sd3" else "epsilon")
    done = export(tmp_path / "x.safetensors", deltas(paths, base, 1), family=own, naming="kohya", dtype="bf16", facts=facts, layers=base)
    found = inspect(done.path)
    assert (found["family"], found["adapter"], found["rank"]) == (own, "lora", 1)
    whole = {tool for tool, keys in found["unread"].items() if not keys}
    assert whole == ({"ComfyUI", "Forge", "sd-scripts"} if own == "sd3" else set(readers.READERS))
    assert own == "sd3" or found["problems"] == []
    assert not any("other sizes" in text or "hide it" in text for text in found["problems"])
    version = read_header(done.path)[0]["ss_base_model_version"]
    assert version == {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3.5_medium": "sd3.5_medium"}[family]


# convert


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy"])
def test_convert_there_and_back(lora, tmp_path, to):
    path, naming = lora
    own = {"peft": "diffusers"}.get(naming, naming)
    if to == own:
        with pytest.raises(FormatError, match=f"has {to} naming already"):
            convert(path, tmp_path / "x.safetensors", to)
        return
    assert convert(path, tmp_path / "there.safetensors", to) == []
    assert convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", own) == []
    live = {(d.part, d.path): d for d in deltas()}
    for file, expected in (("there", {"diffusers": "peft"}.get(to, to)), ("back", naming)):
        found, layers = read_lora(tmp_path / f"{file}.safetensors")
        assert found == expected and {(d.part, d.path) for d in layers} == live.keys()
        assert max(relative_error(d, live[d.part, d.path]) for d in layers) < 2e-3
        metadata, tensors = read_header(tmp_path / f"{file}.safetensors")
        before, _ = read_header(path)
        same = [k for k in before if "hash" not in k]
        assert {k: metadata[k] for k in same} == {k: before[k] for k in same}
        assert metadata["sshs_model_hash"] == tensor_hash(tmp_path / f"{file}.safetensors")
        assert {dtype for dtype, _ in tensors.values()} == {"F16"}


def test_convert_by_the_command_line(good, tmp_path, capsys):
    assert main(["convert", str(good), "--to", "diffusers"]) == 0
    made = tmp_path / "good_diffusers.safetensors"
    assert capsys.readouterr().out == f"Saved {made}, read back and checked.\n"
    assert main(["convert", str(made), "--to", "comfy", "--out", str(tmp_path / "c.safetensors")]) == 0
    assert read_lora(tmp_path / "c.safetensors")[0] == "comfy"
    assert main(["convert", str(good), "--to", "diffusers"]) == 1
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_convert_mends_what_the_tools_would_refuse(good, tmp_path):
    """Per-layer alphas, diffusers' own prefix: the same naming, but in the form that all tools take."""
    for name, change in {
        "alphas": lambda s: s | {f"{Q}.alpha": torch.tensor(1.0)},
        "prefix": lambda s: rename(s, "lora_te_", "lora_te1_"),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(good.read_bytes())
        assert changed(path, change)["problems"]
        before = {(d.part, d.path): d for d in read_lora(path)[1]}
        convert(path, tmp_path / f"{name}_new.safetensors", "kohya")
        found = inspect(tmp_path / f"{name}_new.safetensors")
        assert found["problems"] == [] and not any(found["unread"].values()), name
        after = {(d.part, d.path): d for d in read_lora(tmp_path / f"{name}_new.safetensors")[1]}
        assert all(relative_error(after[key], before[key]) < 2e-3 for key in before)


def test_sdxl_with_diffusers_block_names_gets_ldm_names(tmp_path):
    base = layouts.layers("sdxl")
    some = deltas({"unet": [p for p in base["unet"] if p.startswith("up_blocks.1.attentions.0")]}, base)
    state = {}
    for d in some:
        name = kohya.plain_stem("sdxl", "unet", d.path)
        state |= {
            f"{name}.lora_down.weight": d.tensors["down"],
            f"{name}.lora_up.weight": d.tensors["up"],
            f"{name}.alpha": torch.tensor(2.0),
        }
    save_file(state, tmp_path / "d.safetensors")
    assert inspect(tmp_path / "d.safetensors")["unread"]["LyCORIS"]
    assert convert(tmp_path / "d.safetensors", tmp_path / "l.safetensors", "kohya") == []
    assert all(k.startswith("lora_unet_output_blocks_3_1_") for k in load_file(tmp_path / "l.safetensors"))
    assert not any(inspect(tmp_path / "l.safetensors")["unread"].values())
    live = {d.path: d for d in some}
    assert all(relative_error(d, live[d.path]) < 1e-5 for d in read_lora(tmp_path / "l.safetensors")[1])


def test_convert_completes_what_readers_would_refuse(tmp_path):
    prefix = "text_encoder.text_model.encoder.layers.0.self_attn."
    save_file(
        {f"{prefix}{n}.lora_{m}.weight": torch.ones(*s) for n in ("q_proj", "v_proj") for m, s in {"A": (2, 768), "B": (768, 2)}.items()},
        tmp_path / "q.safetensors",
    )
    (note,) = convert(tmp_path / "q.safetensors", tmp_path / "all.safetensors", "kohya")
    assert "2 layers of zeros" in note
    assert inspect(tmp_path / "all.safetensors")["layers"]["text_1"]["encoder.layers.0"]["layers"] == 4
    assert read_header(tmp_path / "all.safetensors")[0]["ss_base_model_version"] == "sd_v1"


def test_convert_refuses(lora, tmp_path):
    path, _ = lora
    before = path.read_bytes()
    with pytest.raises(FormatError, match="exists already and is not overwritten"):
        convert(path, path, "peft")
    with pytest.raises(FormatError, match="must be one of kohya, diffusers, comfy"):
        convert(path, tmp_path / "x.safetensors", "a1111")
    with pytest.raises(FormatError, match="is no folder"):
        convert(path, tmp_path / "none" / "x.safetensors", "kohya")
    save_file(FOREIGN["loha"][0], tmp_path / "loha.safetensors")
    with pytest.raises(FormatError, match="plain LoRA"):
        convert(tmp_path / "loha.safetensors", tmp_path / "x.safetensors", "diffusers")
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, tmp_path / "vae.safetensors")
    with pytest.raises(FormatError, match="Needed here: a LoRA"):
        convert(tmp_path / "vae.safetensors", tmp_path / "x.safetensors", "kohya")
    assert path.read_bytes() == before and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("said", ["{", "[1]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": [1]}'])
def test_a_peft_file_whose_scale_cannot_be_known_is_not_read(tmp_path, said):
    path = write(tmp_path / "peft.safetensors", "peft")
    save_file(load_file(path), path, {"lora_adapter_metadata": said})
    with pytest.raises(FormatError, match="scale of its layers is unknown"):
        read_lora(path)
    assert "scale of its layers is unknown" in inspect(path)["problems"][0]
