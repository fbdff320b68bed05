"""Base models found on a made-up machine, told by their headers; and the hub by a real server on this machine."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app import models, settings
from app.errors import Problem
from app.paths import Home
from trainer.formats.probe import TITLES

SD1 = {
    "cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77],
    "first_stage_model.encoder.conv_in.weight": [1, 1],
    "model.diffusion_model.input_blocks.0.0.weight": [1, 4],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [1, 768],
}
LDM = "model.diffusion_model."
SD2 = {k.replace("cond_stage_model.transformer", "cond_stage_model.model"): v for k, v in SD1.items()}
SDXL = {k.replace("cond_stage_model.transformer", "conditioner.embedders.1.model"): v for k, v in SD1.items()} | {
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": [768]
}
INPAINTING = SDXL | {LDM + "input_blocks.0.0.weight": [1, 9]}
SD3 = {
    "first_stage_model.encoder.conv_in.weight": [1, 1],
    LDM + "joint_blocks.0.x_block.attn.qkv.weight": [3, 1],
    LDM + "x_embedder.proj.weight": [1, 16],
}
CLIPS = {"text_encoders.clip_l.transformer.x": [1, 1], "text_encoders.clip_g.transformer.x": [1, 1]}
T5 = {"text_encoders.t5xxl.transformer.x": [1, 1]}
SD35 = SD3 | {LDM + "joint_blocks.0.x_block.attn.ln_q.weight": [1], LDM + "joint_blocks.0.x_block.attn2.qkv.weight": [3, 1]}
LORA = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": [4, 768]}


def write(path: Path, tensors: dict[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of zeros with these shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in tensors.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    return path


def diffusers(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(models.DEMO, folder))


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def machine(tmp_path, monkeypatch) -> models.Machine:
    """A machine with nothing on it."""
    for name in ("APPDATA", "LOCALAPPDATA", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    roots = [tmp_path / n for n in ("user", "drive", "code/project", "hub")]
    for root in roots:
        root.mkdir(parents=True)
    return models.Machine(roots[0], (roots[1],), roots[2], roots[3])


@pytest.fixture
def look(home, machine):
    """look(q, all): the finished list."""

    def go(query: str = "", everything: bool = False) -> dict:
        scanner = models.scanner(home, machine)
        scanner.scan(again=True)
        scanner.thread.join(30)
        return models.listing(home, query, everything)

    return go


PLACES = [
    ("user/stable-diffusion-webui/models/Stable-diffusion/a.safetensors", "A1111"),
    ("user/AI/sd.webui/webui/models/Stable-diffusion/deep/er/a.safetensors", "A1111"),
    ("drive/webui_forge_cu121_torch231/webui/models/Stable-diffusion/a.safetensors", "Forge"),
    ("user/ComfyUI/models/checkpoints/SD 1.5/a.safetensors", "ComfyUI"),
    ("drive/ComfyUI_windows_portable/ComfyUI/models/checkpoints/a.safetensors", "ComfyUI"),
    ("code/ComfyUI/models/checkpoints/a.safetensors", "ComfyUI"),
    ("user/sdnext/models/Stable-diffusion/a.safetensors", "SD.Next"),
    ("user/StabilityMatrix/Data/Models/StableDiffusion/a.safetensors", "StabilityMatrix"),
    ("user/AppData/Roaming/StabilityMatrix/Models/StableDiffusion/a.safetensors", "StabilityMatrix"),
    ("user/StabilityMatrix/Data/Packages/ComfyUI/models/checkpoints/a.safetensors", "ComfyUI"),
    ("user/invokeai/models/sd-1/main/a.safetensors", "InvokeAI"),
    ("user/Downloads/a.safetensors", "Downloads"),
]


@pytest.mark.parametrize("path, where", PLACES)
def test_models_are_found_where_other_tools_keep_them(path, where, tmp_path, look):
    file = write(tmp_path / path, SD1)
    (found,) = look()["models"]
    assert found["source"] == str(file) and found["where"] == where
    assert (found["kind"], found["family"], found["title"], found["name"]) == ("sd1", "sd1", TITLES["sd1"], "a")
    assert found["trainable"] and not found["warning"] and not found["toy"]


def test_comfyuis_list_of_extra_folders_is_read(tmp_path, look):
    a, b, c = (write(tmp_path / f"far/{n}/x/{n}.safetensors", SD1) for n in "abc")
    (tmp_path / "user/ComfyUI").mkdir()
    (tmp_path / "user/ComfyUI/extra_model_paths.yaml").write_text(
        f"a111:\n  base_path: {tmp_path}/far\n  checkpoints: |\n    a\n    b\n  loras: c\nother:\n  checkpoints: {c.parent}\nodd: 3\n"
    )
    assert {m["source"] for m in look()["models"]} == {str(p) for p in (a, b, c)}
    (tmp_path / "user/ComfyUI/extra_model_paths.yaml").write_text("a: [b\n: :")
    assert look()["models"] == []


def test_the_hub_cache_and_the_users_own_folders(home, tmp_path, look):
    diffusers(tmp_path / "hub/models--some--model/snapshots/0123")
    (tmp_path / "hub/models--torn--one/snapshots/1/unet").mkdir(parents=True)
    (tmp_path / "hub/models--torn--one/snapshots/1/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    own = write(tmp_path / "mine/Deep Er.safetensors", SD1)
    settings.save(home, {"model_folders": [f'"{own.parent}"', str(tmp_path / "nowhere")]})
    found = look()
    assert {(m["name"], m["where"]) for m in found["models"]} == {("some/model", "hub cache"), ("Deep Er", "your folder")}
    assert {"path": str(own.parent), "where": "your folder", "count": 1} in found["folders"]


def test_what_cannot_be_trained_is_named_when_asked_for(tmp_path, look):
    folder = tmp_path / "user/ComfyUI/models/checkpoints"
    write(folder / "good.safetensors", SD1)
    write(folder / "fill.safetensors", INPAINTING)
    write(folder / "lora.safetensors", LORA)
    (folder / "old.ckpt").write_bytes(b"PK\x03\x04whatever")
    (folder / "cut.safetensors").write_bytes(b"\x10")
    found = look()
    assert [m["name"] for m in found["models"]] == ["good"] and found["hidden"] == 4
    named = {m["name"]: m for m in look(everything=True)["models"]}
    assert named.pop("good")["trainable"] and not any(m["trainable"] for m in named.values())
    assert (named["fill"]["kind"], named["fill"]["title"]) == ("inpainting", TITLES["sdxl"])
    assert "a LoRA for" in named["lora"]["what"] and "pickle" in named["old"]["what"] and named["cut"]["kind"] == "damaged"


def test_the_search_is_over_name_and_folder_in_any_case(tmp_path, look):
    write(tmp_path / "user/ComfyUI/models/checkpoints/Photo/DreamShaper_8.safetensors", SD1)
    write(tmp_path / "user/ComfyUI/models/checkpoints/anime.safetensors", SD1)
    assert [m["name"] for m in look("dream")["models"]] == ["DreamShaper_8"] == [m["name"] for m in look("PHOTO shaper")["models"]]
    assert look("dream anime")["models"] == [] and len(look("comfyui")["models"]) == 2


@pytest.mark.parametrize(
    "name, kind",
    [
        ("sdxl_lightning_4step", "Lightning"), ("dreamshaperXLTurbo", "Turbo"), ("DreamShaper_8_LCM", "LCM"), ("Hyper-SD15-8steps", "Hyper-SD"),
        ("model-dmd2", "Dmd2"), ("flux1-schnell", "Schnell"), ("TurboVision", "Turbo"), ("HyperRealism_v3", ""), ("turbocharged", ""),
        ("enlightening", ""), ("dreamshaper_8", ""),
    ],
)  # fmt: skip
def test_distilled_models_are_named_as_such(name, kind):
    said = models.distilled(name)
    assert said == (f"a distilled model ({kind}): train on its undistilled parent" if kind else "")


def test_a_file_is_read_once_and_again_when_it_changes(home, machine, tmp_path, look, monkeypatch):
    file = write(tmp_path / "user/ComfyUI/models/checkpoints/a.safetensors", SD1)
    look()
    models._scanners.clear()
    monkeypatch.setattr(models, "identify", lambda path: pytest.fail("read again"))
    assert look()["models"][0]["source"] == str(file)
    monkeypatch.undo()
    write(file, SDXL)
    assert look()["models"][0]["kind"] == "sdxl"
    write(file, INPAINTING)
    assert look()["models"] == [] and look(everything=True)["models"][0]["kind"] == "inpainting"
    file.unlink()
    assert look(everything=True)["models"] == []


def test_circles_depth_and_hidden_folders(tmp_path, look):
    folder = tmp_path / "user/ComfyUI/models/checkpoints"
    write(folder / "1/2/3/4/in.safetensors", SD1)
    write(folder / "1/2/3/4/5/out.safetensors", SD1)
    write(folder / ".cache/out.safetensors", SD1)
    (folder / "1/loop").symlink_to(folder, target_is_directory=True)
    assert [m["name"] for m in look()["models"]] == ["in"]


# ---- one path


def test_a_path_is_checked(home, machine, tmp_path):
    models.scanner(home, machine)
    file = write(tmp_path / "a b/x.safetensors", SD1)
    for text in (str(file), f'"{file}"', f" '{file}' "):
        assert models.check(home, text)["source"] == str(file)
    assert models.check(home, str(models.DEMO))["toy"]
    folder = diffusers(tmp_path / "my model")
    assert models.check(home, str(folder)) | {"size_gb": 0} == {
        "source": str(folder), "name": "my model", "where": "", "kind": "sd1", "family": "sd1", "variant": None, "title": TITLES["sd1"],
        "what": f"a diffusers folder of {TITLES['sd1']}", "size_gb": 0, "trainable": True, "warning": "", "toy": False,
        "prediction": "epsilon", "zero_snr": False, "words": "", "text_encoders": None, "tokenizer_3": False,
        "facts": ["predicts noise (epsilon)"],
    }  # fmt: skip


V = {"v_pred": [1], "ztsnr": [1]}
FILES = {
    # name -> (tensors, metadata, what of MODEL it shows, side in pixels)
    "sd2": (SD2, {}, {"kind": "sd2", "title": TITLES["sd2"], "prediction": None}, 768),
    "sd2 epsilon": (SD2, {"modelspec.prediction_type": "epsilon"}, {"kind": "sd2", "prediction": "epsilon"}, 512),
    "juggernaut": (SDXL, {}, {"kind": "sdxl", "title": TITLES["sdxl"], "words": "", "text_encoders": None}, 1024),
    "noobaiXLNAIXL_vPred10": (SDXL | V, {}, {"prediction": "v_prediction", "zero_snr": True, "words": "anime"}, 1024),
    "waiIllustrious_v14": (SDXL, {}, {"words": "anime"}, 1024),
    "ponyDiffusionV6XL": (SDXL, {}, {"words": "pony"}, 1024),
    "mymerge": (SDXL, {"modelspec.title": "My Illustrious-XL merge"}, {"words": "anime"}, 1024),
    "hawaii_pictures": (SDXL, {}, {"words": ""}, 1024),
    "illustrious for sd1": (SD1, {}, {"words": ""}, 512),
    "sd3.5 medium": (SD35 | CLIPS | T5, {}, {"variant": "sd35_medium", "title": TITLES["sd35_medium"], "prediction": "flow"}, 1024),
    "sd3 medium": (SD3 | CLIPS, {}, {"variant": "sd3_medium", "text_encoders": ["text_encoder", "text_encoder_2"]}, 1024),
    "sd3 without": (SD35, {}, {"text_encoders": [], "facts": ["flow matching", "without its text encoders"]}, 1024),
}


@pytest.mark.parametrize("name", FILES)
def test_each_family_is_told_and_what_its_file_says_of_it(name, home, machine, tmp_path):
    models.scanner(home, machine)
    tensors, metadata, shown, side = FILES[name]
    found = models.check(home, str(write(tmp_path / f"{name}.safetensors", tensors, metadata)))
    assert found["trainable"] and {k: found[k] for k in shown} == shown
    assert models.resolution(found) == side and found["facts"] and all(isinstance(f, str) for f in found["facts"])
    if found["family"] == "sd2":
        assert (models.resolution(found, "epsilon"), models.resolution(found, "v_prediction")) == (512, 768)


def test_t5_is_used_where_it_and_its_tokenizer_are_there(home, machine, tmp_path):
    models.scanner(home, machine)
    whole = models.check(home, str(write(tmp_path / "whole.safetensors", SD35 | CLIPS | T5)))
    without = models.check(home, str(write(tmp_path / "without.safetensors", SD35 | CLIPS)))
    assert whole["facts"][-1] == "with T5" and without["facts"][-1] == "without T5"
    assert not models.uses_t5(whole, None, "auto") and not models.uses_t5(whole, tmp_path / "nowhere", "auto")
    (tmp_path / "words" / "tokenizer_3").mkdir(parents=True)
    (tmp_path / "words" / "tokenizer_3" / "tokenizer.json").touch()
    assert models.uses_t5(whole, tmp_path / "words", "auto") and not models.uses_t5(whole, tmp_path / "words", "skip")
    assert not models.uses_t5(without, tmp_path / "words", "8bit")
    (tmp_path / "words" / "t5xxl_fp16.safetensors").touch()
    assert models.uses_t5(without, tmp_path / "words", "8bit")
    assert not models.uses_t5(models.check(home, str(write(tmp_path / "xl.safetensors", SDXL))), tmp_path / "words", "auto")


def test_what_is_no_base_model_is_refused_in_a_sentence(home, machine, tmp_path):
    models.scanner(home, machine)
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    for source, said in (
        ("", "No model is named"),
        ("demo", "toy of the built-in example"),
        (str(tmp_path / "nope.safetensors"), "There is no file or folder"),
        (str(tmp_path / "old.ckpt"), "is a pickle"),
        (str(tmp_path / "empty"), "no model_index.json"),
        (
            str(write(tmp_path / "fill.safetensors", INPAINTING)),
            "an inpainting or editing model of Stable Diffusion XL.*Choose a base model",
        ),
        (
            str(write(tmp_path / "flux.safetensors", {"double_blocks.0.x": [1, 1]})),
            "Flux.*Choose a base model of Stable Diffusion 1.x, 2.x, XL",
        ),
        (str(write(tmp_path / "l.safetensors", LORA)), "a LoRA for"),
        ("x" * 5000, "There is no file"),
        ("a\0b", "There is no file"),
    ):
        with pytest.raises(Problem, match=said):
            models.check(home, source)
    assert models.check(home, "demo", example=True)["source"] == "demo"


# ---- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub[repo] = (status, answer): a server that answers as the hub's API does."""
    from huggingface_hub import constants

    answers: dict[str, tuple[int, dict]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.get(self.path.split("?")[0].removeprefix("/api/models/"), (404, {"error": "Repository not found"}))
            raw = json.dumps(body).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if status == 403:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answers["server"] = server
    yield answers
    server.shutdown()
    server.server_close()


def described(pipeline: str, files: dict[str, int] | None = None, **more) -> tuple[int, dict]:
    all_files = {"model_index.json": 500, "unet/config.json": 1000, "unet/diffusion_pytorch_model.safetensors": 3_000_000_000,
             "unet/diffusion_pytorch_model.fp16.safetensors": 9_000_000_000, "vae/diffusion_pytorch_model.safetensors": 300_000_000,
             "text_encoder/model.safetensors": 500_000_000, "v1-5-pruned.ckpt": 7_000_000_000, **(files or {})}  # fmt: skip
    siblings = [{"rfilename": n, "size": s} for n, s in all_files.items()]
    return 200, {"id": "x/y", "modelId": "x/y", "siblings": siblings, "config": {"diffusers": {"_class_name": pipeline}}, "tags": [],
                 "cardData": {"license": "creativeml-openrail-m"}, "sha": "0" * 40, **more}  # fmt: skip


def test_a_hub_model_says_its_size_and_licence_before_any_download(home, machine, hub):
    models.scanner(home, machine)
    hub["some/model"] = described("StableDiffusionPipeline")
    found = models.check(home, "some/model")
    assert (found["kind"], found["family"], found["trainable"]) == ("hub", "sd1", True)
    assert (found["download_gb"], found["license"]) == (3.8, "creativeml-openrail-m")
    hub["server"].shutdown()
    assert models.glance(home, "some/model", False) == (found, "")  # what it said is remembered
    assert list(machine.hub.iterdir()) == []


def test_of_a_large_hub_model_all_parts_are_counted_that_will_be_fetched(home, machine, hub):
    models.scanner(home, machine)
    pieces = {f"text_encoder_3/model-0000{k}-of-00002.safetensors": 5_000_000_000 for k in (1, 2)}
    more = {"transformer/diffusion_pytorch_model.safetensors": 5_000_000_000, "text_encoder_2/model.fp16.safetensors": 1_000_000_000,
            "text_encoder_3/model.fp16.safetensors": 9_000_000_000, "sd3.5_medium.safetensors": 5_000_000_000}  # fmt: skip
    hub["a/sd3.5-medium"] = described("StableDiffusion3Pipeline", pieces | more)
    found = models.check(home, "a/sd3.5-medium")
    assert (found["family"], found["trainable"], found["download_gb"]) == ("sd3", True, 3 + 0.3 + 0.5 + 5 + 1 + 10)
    hub["a/noobai"] = described("StableDiffusionXLPipeline")
    assert models.check(home, "a/noobai")["words"] == "anime" and models.glance(home, "a/noobai", False)[0]["family"] == "sdxl"


def test_hub_models_that_cannot_be_used(home, machine, hub):
    models.scanner(home, machine)
    hub["a/flux"] = described("FluxPipeline")
    hub["a/files"] = described("StableDiffusionPipeline", siblings=[{"rfilename": "x.safetensors", "size": 1}])
    hub["a/gated"] = (403, {"error": "gated"})
    for repo, said in (
        ("a/flux", "a model of Flux on the hub.*Choose a base model"),
        ("a/files", "without model_index.json"),
        ("a/gated", "accept its terms"),
        ("a/none", "no such model"),
    ):
        with pytest.raises(Problem, match=said):
            models.check(home, repo)


def test_offline_is_said_in_a_sentence(home, machine, hub, monkeypatch):
    models.scanner(home, machine)
    hub["server"].shutdown()
    hub["server"].server_close()
    with pytest.raises(Problem, match="the hub cannot be reached"):
        models.check(home, "some/model")
