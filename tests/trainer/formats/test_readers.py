"""What each tool makes of a file, case by case as its own loader was seen to do."""

import pytest

from trainer.formats import kohya, layouts, ldm_names, readers

STD = kohya.ENDINGS
ALL = list(readers.READERS)
Q = "transformer_blocks.0.attn1.to_q"


def keys(stems, endings=STD):
    return [f"{s}.{e}" for s in stems for e in endings]


def stems(family, part="unet", only=lambda p: True):
    return [kohya.stem(family, part, p) for p in layouts.layers(family)[part] if only(p)]


def judge(family, names, alphas=None):
    return readers.judge(family, sorted(names), layouts.layers(family), alphas)


def whole(verdict):
    return [tool for tool in ALL if tool in verdict.vouched]


def attention(p):
    return ".attn1." in p or ".attn2." in p


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_standard_files_are_read_whole_by_all(family, convolutions):
    edges = ("conv_in", "conv_out", "time_embedding", "add_embedding")
    unet = stems(family, only=lambda p: not p.startswith(edges) and (convolutions or "attentions" in p))
    parts = [p for p in layouts.layers(family) if p != "unet"]
    text = [s for part in parts for s in stems(family, part, lambda p: p != "text_projection")]
    verdict = judge(family, keys([*unet, *text]))
    assert whole(verdict) == ALL and verdict.sentences() == []


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_edges_are_unread_by_sd_scripts_alone(family):
    verdict = judge(family, keys(stems(family)))
    edges = [p for p in layouts.layers(family)["unet"] if p.startswith(("conv_in", "conv_out", "time_embedding", "add_embedding"))]
    assert whole(verdict) == [t for t in ALL if t != "sd-scripts"]
    assert sorted(verdict.unread["sd-scripts"]) == sorted(keys(kohya.stem(family, "unet", p) for p in edges))


def test_sdxl_with_diffusers_block_names():
    paths = [p for p in layouts.layers("sdxl")["unet"] if not p.startswith(("conv_in", "conv_out", "time_emb"))]
    verdict = judge("sdxl", keys(kohya.plain_stem("sdxl", "unet", p) for p in paths))
    assert whole(verdict) == ["ComfyUI", "Forge", "SD.Next", "InvokeAI"]
    unread = {tool: {k.partition(".")[0] for k in left} for tool, left in verdict.unread.items()}
    sizes = {"lora_unet_add_embedding_linear_1", "lora_unet_add_embedding_linear_2"}
    assert unread["AUTOMATIC1111"] == sizes | {"lora_unet_up_blocks_0_upsamplers_0_conv"}
    assert unread["diffusers"] == sizes
    assert len(unread["sd-scripts"]) == len(unread["LyCORIS"]) == len(paths)


def test_sdxl_with_both_block_names():
    names = keys([kohya.stem("sdxl", "unet", p) for p in layouts.layers("sdxl")["unet"] if "up_blocks" not in p and attention(p)])
    names += keys([kohya.plain_stem("sdxl", "unet", p) for p in layouts.layers("sdxl")["unet"] if "up_blocks" in p and attention(p)])
    verdict = judge("sdxl", names)
    assert {"ComfyUI", "Forge", "SD.Next"} <= set(whole(verdict))
    assert sorted(verdict.unread["InvokeAI"]) == sorted(names)
    assert {k for k in names if "input_blocks" in k or "middle" in k} == set(verdict.unread["diffusers"])
    assert {k for k in names if "up_blocks" in k} == set(verdict.unread["LyCORIS"])


def test_sd1_with_ldm_block_names():
    unet = [f"lora_unet_{ldm_names.to_ldm(p, False).replace('.', '_')}" for p in layouts.layers("sd1")["unet"] if attention(p)]
    assert whole(judge("sd1", keys(unet))) == ["ComfyUI", "Forge", "diffusers"]


def test_text_prefixes():
    layer = "text_model_encoder_layers_0_mlp_fc1"
    unet = stems("sd1", only=attention)
    assert whole(judge("sd1", keys([*unet, f"lora_te1_{layer}"]))) == ["ComfyUI", "Forge", "AUTOMATIC1111", "diffusers"]
    assert whole(judge("sd2", keys([*stems("sd2", only=attention), f"lora_te1_{layer}"]))) == ["ComfyUI", "Forge", "diffusers"]
    assert whole(judge("sdxl", keys([*stems("sdxl", only=attention), f"lora_te_{layer}"]))) == ["ComfyUI", "Forge", "diffusers"]
    assert "SD.Next" in whole(judge("sd1", keys([*unet, "lora_te_encoder_layers_0_mlp_fc1"])))


def test_forge_refuses_above_twelve_keys_that_do_not_fit():
    unet = stems("sd1", only=attention)
    few = judge("sd1", [*keys(unet), *keys([f"lora_unet_x{i}" for i in range(4)])])
    assert len(few.unread["Forge"]) == 12
    many = judge("sd1", [*keys(unet), *keys([f"lora_unet_x{i}" for i in range(5)])])
    assert len(many.unread["Forge"]) == len(unet) * 3 + 15


def test_incomplete_text_attention():
    """q and v alone: diffusers refuses; A1111 drops them in OpenCLIP encoders (SD2, SDXL's second) and reads them in CLIP-L."""
    for family, part, lost in (("sd1", "text_1", False), ("sd2", "text_1", True), ("sdxl", "text_1", False), ("sdxl", "text_2", True)):
        text = keys(stems(family, part, lambda p: p.endswith(("q_proj", "v_proj"))))
        verdict = judge(family, [*keys(stems(family, only=attention)), *text])
        assert set(verdict.unread["AUTOMATIC1111"]) == (set(text) if lost else set()), (family, part)
        assert len(verdict.unread["diffusers"]) > len(text)
        assert "SD.Next" in whole(verdict)


def test_sdxl_text_alone_is_not_importable_in_invokeai():
    text = [*stems("sdxl", "text_1"), *stems("sdxl", "text_2", lambda p: p != "text_projection")]
    verdict = judge("sdxl", keys(text))
    assert whole(verdict) == [t for t in ALL if t != "InvokeAI"]


def test_text_projection():
    verdict = judge(
        "sdxl", keys([*stems("sdxl", only=attention), "lora_te2_text_projection", "lora_te2_text_model_encoder_layers_0_mlp_fc1"])
    )
    assert [t for t in ALL if t not in whole(verdict)] == ["AUTOMATIC1111", "diffusers", "sd-scripts"]


def test_alphas():
    unet = stems("sd1", only=attention)
    same = dict.fromkeys(unet, 4.0)
    assert whole(judge("sd1", keys(unet), same)) == ALL
    differ = judge("sd1", keys(unet), same | {unet[0]: 2.0})
    assert whole(differ) == [t for t in ALL if t != "diffusers"] and "unet has alphas 2, 4" in differ.sentences()[0]
    without = judge("sd1", keys(unet, STD[:2]), dict.fromkeys(unet))
    assert whole(without) == [t for t in ALL if t != "LyCORIS"]
    zero = judge("sd1", keys(unet), dict.fromkeys(unet, 0.0))
    assert [t for t in ALL if t not in whole(zero)] == ["sd-scripts", "LyCORIS"]


OTHER_KINDS = {  # endings: the tools that take such a file whole and right
    ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"): (
        "ComfyUI",
        "Forge",
        "AUTOMATIC1111",
        "SD.Next",
        "InvokeAI",
        "LyCORIS",
    ),
    (*readers.HADA[:4], "alpha"): ("ComfyUI", "Forge", "AUTOMATIC1111", "SD.Next", "InvokeAI"),
    ("lokr_w1", "lokr_w2", "alpha"): ("ComfyUI", "Forge", "AUTOMATIC1111", "SD.Next", "InvokeAI", "LyCORIS"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"): ("ComfyUI", "Forge", "AUTOMATIC1111", "SD.Next"),
    (*STD, "dora_scale"): ("SD.Next", "LyCORIS"),
    ("diff",): ("ComfyUI", "Forge", "AUTOMATIC1111", "SD.Next", "InvokeAI", "LyCORIS"),
    ("diff", "diff_b"): ("ComfyUI", "Forge", "AUTOMATIC1111", "InvokeAI", "LyCORIS"),
    ("oft_blocks", "alpha"): ("ComfyUI", "AUTOMATIC1111", "SD.Next", "LyCORIS"),
}


@pytest.mark.parametrize("endings", OTHER_KINDS, ids=lambda e: e[0])
def test_other_kinds_of_adapters(endings):
    verdict = judge("sd1", keys(stems("sd1", only=attention), endings))
    assert whole(verdict) == list(OTHER_KINDS[endings])


def test_peft_names():
    paths = [p for p in layouts.layers("sd1")["unet"] if "attentions" in p]
    names = [f"unet.{p}.lora_{x}.weight" for p in paths for x in "AB"]
    verdict = judge("sd1", names)
    assert whole(verdict) == ["diffusers"]
    assert {k for k in names if attention(k)} == set(verdict.unread["ComfyUI"])
    assert len(verdict.unread["Forge"]) == len(names)


def test_sd3_namings():
    base = layouts.layers("sd3.5_medium")
    text = [kohya.stem("sd3", "text_1", p) for p in base["text_1"] if "mlp" in p]
    original = keys([*{kohya.stem("sd3", "unet", p) for p in base["unet"]}, *text])
    found = readers.judge("sd3", original, base)
    assert found.vouched == ("ComfyUI", "Forge", "sd-scripts") and len(found.unread["diffusers"]) == len(original)
    peft = [f"transformer.{p}.lora_{x}.weight" for p in base["unet"] for x in "AB"]
    assert readers.judge("sd3", peft, base).vouched == ("ComfyUI", "diffusers")
    underscores = keys([f"lora_transformer_{p.replace('.', '_')}" for p in base["unet"]])
    assert readers.judge("sd3", underscores, base).vouched == ("ComfyUI", "SD.Next")
    with_alpha = [*peft, "transformer.proj_out.alpha"]
    assert len(readers.judge("sd3", with_alpha, base).unread["diffusers"]) == len(with_alpha)
