"""Every family in small: what is exported does in a fresh diffusers pipeline what the live adapter does, and converts there and back."""

import shutil
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from tests.small_models import make_folder, make_single
from trainer import adapters, families
from trainer.config import LoraConfig
from trainer.formats import FormatError, kohya, peft_names, readers, self_check
from trainer.formats.export import ExportError, export
from trainer.formats.factors import relative_error
from trainer.formats.metadata import Facts, read_header, shown_as
from trainer.tools.convert import convert
from trainer.tools.inspect import inspect, read_lora

FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
COMPONENTS = {"unet": "unet", "text_1": "text_encoder", "text_2": "text_encoder_2"}
TARGETS = ("attention", "feed_forward", "projections", "convolutions")
CONFIG = {
    "rank": 4,
    "alpha": 3.0,
    "conv_rank": 2,
    "conv_alpha": 1.0,
    "blocks": {"unet.mid_block": {"rank": 6, "alpha": 2.0}, "unet.transformer_blocks.1": {"rank": 3, "alpha": 5.0}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = make_folder(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


@pytest.fixture(scope="module")
def live(base):
    """live(family): (models with an adapter of mixed ranks and scales on every part, its deltas, the base's layers)."""
    made = {}

    def of(family):
        if family not in made:
            own = families.get(family)
            models = own.load(base(family), torch.float32, torch.device("cpu"))
            layers = kohya.layers(models.parts)
            targets = {part: own.targets(models, part, TARGETS) for part in own.parts}
            blocks = {b: s for b, s in CONFIG["blocks"].items() if any(f"unet.{p}.".startswith(b + ".") for p in targets["unet"])}
            adapter = adapters.build(LoraConfig(targets=TARGETS, **CONFIG | {"blocks": blocks}), models.parts, targets, seed=1)
            generator = torch.Generator().manual_seed(2)
            for part in own.parts:
                for weight in adapter.parameters(part):
                    weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
            assert kohya.layers(models.parts) == layers  # the same with an adapter on it
            made[family] = models, list(adapter.deltas()), layers
        return made[family]

    return of


def save(folder, family, deltas, layers, naming="kohya", dtype="fp16", name="small", **more):
    prediction = {"sd3": "flow", "sd2": "v_prediction"}.get(family, "epsilon")
    facts = Facts(base="small", rank=4, alpha=3.0, prediction=prediction)
    return export(folder / f"{name}.safetensors", deltas, family=family, naming=naming, dtype=dtype, facts=facts, layers=layers, **more)


def outputs(family, modules):
    """What the denoiser and the text encoders make of fixed inputs."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    unet = modules["unet"]
    config = unet.config
    t = torch.tensor([500])
    with torch.no_grad():
        if family == "sd3":
            told = {"encoder_hidden_states": noise(1, 9, config.joint_attention_dim)}
            told |= {"pooled_projections": noise(1, config.pooled_projection_dim), "timestep": t}
            out = {"unet": unet(noise(1, 16, 8, 8), **told).sample}
        else:
            more = {}
            if family == "sdxl":
                size = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                more = {"added_cond_kwargs": {"text_embeds": noise(1, size), "time_ids": torch.full((1, 6), 64.0)}}
            out = {"unet": unet(noise(1, 4, 8, 8), t, noise(1, 9, config.cross_attention_dim), **more).sample}
        for part, module in modules.items():
            if part != "unet":
                out[part] = module(torch.arange(10, 87)[None]).last_hidden_state
    return out


@pytest.mark.parametrize("naming", ["kohya", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_pipeline_predicts_what_the_live_adapter_does(base, live, tmp_path, family, naming):
    models, deltas, layers = live(family)
    done = save(tmp_path, family, deltas, layers, naming)
    file = next((p for p in done.also if p.stem.endswith("_diffusers")), done.path)
    assert (file != done.path) == (family == "sd3" and naming == "kohya")
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(base(family), torch_dtype=torch.float32, **no_t5)
    modules = {part: pipe.components["transformer" if part == "unet" and family == "sd3" else COMPONENTS[part]] for part in models.parts}
    before = outputs(family, modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(file))
    loaded = {
        (part, kohya.canonical(part, path))
        for part, module in modules.items()
        for path, m in module.named_modules()
        if isinstance(m, LoraLayer) and m.lora_A
    }
    assert loaded == {(d.part, kohya.canonical(d.part, d.path)) for d in deltas}  # every key found its layer
    after, wanted = outputs(family, modules), outputs(family, models.parts)
    for part, want in wanted.items():
        moved = (want - before[part]).norm()
        assert moved > 1e-2 * want.norm(), part  # there is something to see
        assert (after[part] - want).norm() < 5e-3 * moved, part


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_vouches_for_every_tool(live, tmp_path, family):
    _, deltas, layers = live(family)
    done = save(tmp_path, family, deltas, layers)
    assert done.notes == ()
    assert sum(done.modules.values()) == len(deltas)
    if family == "sd3":
        assert set(done.vouched) == {"ComfyUI", "Forge", "sd-scripts", "diffusers"}
        assert {t for t, keys in done.unread.items() if keys} == {"AUTOMATIC1111", "SD.Next", "InvokeAI"}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["small.safetensors", "small_diffusers.safetensors"]
        keys = load_file(tmp_path / "small_diffusers.safetensors")
        assert all(k.endswith(peft_names.ENDINGS) for k in keys)  # an alpha would make diffusers refuse it
    else:
        assert done.vouched == tuple(readers.READERS) and not any(done.unread.values())
        assert done.also == ()
        alphas = {}
        for key, t in load_file(done.path).items():
            if key.endswith(".alpha"):
                alphas.setdefault(next(p for p, x in kohya.PREFIXES[family].items() if key.startswith(x)), set()).add(float(t))
        assert alphas.keys() == layers.keys() and all(len(a) == 1 for a in alphas.values())
    if family == "sdxl":
        assert not any("down_blocks" in k or "up_blocks" in k for k in load_file(done.path))


@pytest.mark.parametrize("family", FAMILIES)
def test_start_and_merge_read_what_was_trained(live, tmp_path, family):
    _, deltas, layers = live(family)
    wanted = {(d.part, kohya.canonical(d.part, d.path)): d for d in deltas}
    for naming in ("kohya", "peft", "comfy"):
        path = save(tmp_path, family, deltas, layers, naming, "fp32", naming).path
        kind, found = read_lora(path)
        assert kind == naming and {(d.part, d.path) for d in found} == wanted.keys()
        for d in found:
            want = wanted[d.part, d.path]
            assert d.tensors["down"].shape == want.tensors["down"].shape  # SD3's fused layers give back the ranks that went in
            assert relative_error(d, want) < 1e-5, (naming, d.path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["diffusers", "comfy"])
def test_convert_there_and_back(live, tmp_path, family, to):
    _, deltas, layers = live(family)
    path = save(tmp_path, family, deltas, layers).path
    assert convert(path, tmp_path / "there.safetensors", to) == []
    assert convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "kohya") == []
    first, back = load_file(path), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys()
    wanted = {(d.part, kohya.canonical(d.part, d.path)): d for d in deltas}
    for file in ("there", "back"):
        found = read_lora(tmp_path / f"{file}.safetensors")[1]
        assert len(found) == len(deltas)
        assert max(relative_error(d, wanted[d.part, d.path]) for d in found) < 2e-3
    before, after = read_header(path)[0], read_header(tmp_path / "back.safetensors")[0]
    assert {k: v for k, v in before.items() if "hash" not in k} == {k: v for k, v in after.items() if "hash" not in k}
    with pytest.raises(FormatError, match="has kohya naming already"):
        convert(path, tmp_path / "again.safetensors", "kohya")


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect(live, tmp_path, family):
    models, deltas, layers = live(family)
    done = save(tmp_path, family, deltas, layers)
    found = inspect(done.path)
    assert list(found) == [
        *("family", "adapter", "rank", "alpha", "layers", "parameters", "effect", "finite", "metadata", "unread", "problems"),
    ]
    assert (found["family"], found["effect"], found["finite"]) == (family, True, True)
    assert found["adapter"] == ("lora" if family == "sd3" else "locon")
    assert found["rank"] == sorted({d.tensors["down"].shape[0] for d in deltas})
    counts = {part: sum(b["layers"] for b in blocks.values()) for part, blocks in found["layers"].items()}
    assert counts == {part: sum(d.part == part for d in deltas) for part in models.parts}
    block = "transformer_blocks.1" if family == "sd3" else "mid_block"
    inside = [d for d in deltas if d.part == "unet" and d.path.startswith(block)]
    whole = [d.scale * d.tensors["up"].double().flatten(1) @ d.tensors["down"].double().flatten(1) for d in inside]
    norm = sum(float(w.norm()) ** 2 for w in whole) ** 0.5
    assert found["layers"]["unet"][block] == {"layers": len(inside), "norm": pytest.approx(norm, rel=2e-3)}
    wanted = {"ComfyUI", "Forge", "sd-scripts"} if family == "sd3" else set(readers.READERS)
    assert {tool for tool, keys in found["unread"].items() if not keys} == wanted
    assert any("other sizes" in text for text in found["problems"])  # these small models are not the published ones


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_alone_is_completed_for_the_tools(live, tmp_path, family):
    """Text layers alone, and of their attention q and v alone, reach the same tools."""
    _, deltas, layers = live(family)
    some = [d for d in deltas if d.part == "text_1" and d.path.endswith(("q_proj", "v_proj"))]
    done = save(tmp_path, family, some, layers)
    assert [n for n in done.notes if "layers of zeros" not in n] == []
    assert set(done.vouched) == ({"ComfyUI", "Forge", "sd-scripts", "diffusers"} if family == "sd3" else set(readers.READERS))


def test_sd3_with_one_of_q_k_and_v(live, tmp_path):
    _, deltas, layers = live("sd3")
    some = [d for d in deltas if d.path.endswith("attn.to_q")]
    done = save(tmp_path, "sd3", some, layers)
    found = [d for d in read_lora(done.path)[1] if d.tensors["up"].any()]
    assert {d.path for d in found} == {d.path for d in some}


def test_sd3_shared_down_keeps_its_rank(live, tmp_path):
    """A kohya file of SD3 has one down for q, k and v; taken apart and written again it has the rank that it had."""
    from dataclasses import replace

    _, deltas, layers = live("sd3")
    qkv = [d for d in deltas if d.path.startswith("transformer_blocks.0.attn.to_") and d.path[-1] in "qkv"]
    shared = [replace(d, tensors=d.tensors | {"down": qkv[0].tensors["down"]}) for d in qkv]
    path = save(tmp_path, "sd3", shared, layers, dtype="fp32").path
    assert load_file(path)["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"].shape[0] == 4
    assert max(relative_error(a, b) for a, b in zip(read_lora(path)[1], shared, strict=True)) < 1e-6


def test_sd3_last_blocks_and_the_end_turn_their_halves(live):
    """The original has shift before scale, diffusers scale before shift, in these two layers alone (diffusers `swap_scale_shift`)."""
    _, _, layers = live("sd3")
    torch.manual_seed(0)
    for path, turned in (
        ("transformer_blocks.2.norm1_context.linear", True),
        ("transformer_blocks.1.norm1_context.linear", False),
        ("transformer_blocks.2.norm1.linear", False),
        ("norm_out.linear", True),
    ):
        rows, width = layers["unet"][path]
        d = adapters.Delta("unet", path, "lora", {"down": torch.randn(2, width), "up": torch.randn(rows, 2)}, 1.0)
        state = kohya.to_kohya("sd3", [d])
        up = next(t for k, t in state.items() if k.endswith("lora_up.weight"))
        first, second = d.tensors["up"].chunk(2)
        torch.testing.assert_close(up, torch.cat([second, first]) if turned else d.tensors["up"])


def test_when_the_second_file_fails_the_first_is_not_written(live, tmp_path, monkeypatch):
    _, deltas, layers = live("sd3")
    good = save(tmp_path, "sd3", deltas, layers).path.read_bytes()
    check = self_check.check
    monkeypatch.setattr(self_check, "check", lambda path, *rest: ["It is bad."] if "_diffusers" in path.name else check(path, *rest))
    with pytest.raises(ExportError, match=r"small_diffusers\.safetensors failed its check"):
        save(tmp_path, "sd3", deltas[:5], layers)
    assert (tmp_path / "small.safetensors").read_bytes() == good
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_numbers_are_those_of_the_original_layout(base, live, tmp_path, family):
    """The LoRA added to a single file by its own keys is the single file made of the folder to which the adapter was added."""
    _, deltas, layers = live(family)
    folder = tmp_path / "merged"
    shutil.copytree(base(family), folder)
    component = "transformer" if family == "sd3" else "unet"
    file = folder / component / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for d in deltas:
        if d.part == "unet":
            change = d.scale * d.tensors["up"].flatten(1) @ d.tensors["down"].flatten(1)
            state[f"{d.path}.weight"] += change.reshape(state[f"{d.path}.weight"].shape)
    save_file(state, file, {"format": "pt"})
    options = {"encoders": False, "vae": False, "prefix": "diffusion_model."}
    plain = load_file(make_single(base(family), tmp_path / "plain.safetensors", **options))
    wanted = load_file(make_single(folder, tmp_path / "merged.safetensors", **options))

    unet = [d for d in deltas if d.part == "unet"]
    for naming in ("comfy", "kohya"):
        if naming == "kohya" and family in ("sd1", "sd2"):  # these have diffusers' block names there
            continue
        lora = load_file(save(tmp_path, family, unet, layers, naming, "fp32", naming).path)
        prefix = {"comfy": "diffusion_model.", "kohya": "lora_unet_"}[naming]
        names = {k.removesuffix(".weight"): k for k in plain}
        if naming == "kohya":
            names = {"lora_unet_" + n.removeprefix("diffusion_model.").replace(".", "_"): k for n, k in names.items()}
        found = dict(plain)
        for name in {k.removesuffix(".alpha") for k in lora if k.endswith(".alpha")}:
            assert name.startswith(prefix)
            down, up = lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"]
            change = lora[f"{name}.alpha"] / len(down) * up.flatten(1) @ down.flatten(1)
            found[names[name]] = plain[names[name]] + change.reshape(plain[names[name]].shape)
        assert found.keys() == wanted.keys()
        moved = [k for k in plain if not torch.equal(plain[k], wanted[k])]
        assert len(moved) == len(lora) // 3
        for key, want in wanted.items():
            torch.testing.assert_close(found[key], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "shown"), [("sd1", "sd1"), ("sd2", "sd2"), ("sdxl", "sdxl")])
def test_the_web_uis_tell_the_family(live, tmp_path, family, shown):
    _, deltas, layers = live(family)
    entries = read_header(save(tmp_path, family, deltas[:1], layers).path)[0]
    assert shown_as(entries) == {"AUTOMATIC1111": shown, "Forge": shown}
