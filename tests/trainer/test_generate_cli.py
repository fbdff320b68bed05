"""The commands beside training: generate, inspect, convert, probe, and train --dry-run."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import __main__ as program
from trainer import plan
from trainer.families import sources
from trainer.families.sources import DEMO

SMALL = ["--steps", "3", "--width", "64", "--height", "64", "--device", "cpu"]
STRONG = {"part": {"unet": {"learning_rate": 1e-2}, "text_1": {"learning_rate": 1e-2}}, "train.visits": 2}


@pytest.fixture(scope="module")
def run(train):
    return train(STRONG)


@pytest.fixture(scope="module")
def lora(run, tmp_path_factory) -> Path:
    """A trained LoRA under a name as people give them."""
    target = tmp_path_factory.mktemp("my LoRAs") / "it's Zoë's 猫 (v1.0).safetensors"
    target.write_bytes((run.root / "lora.safetensors").read_bytes())
    return target


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch, one_thread):
    """cli(*words): (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def go(*words) -> tuple[int, str, str]:
        code = program.main([str(w) for w in words])
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def generate(cli):
    """generate(prompt, *words): the paths that it printed."""

    def go(*words) -> list[Path]:
        code, out, err = cli("generate", *words, *SMALL)
        assert code == 0, err
        paths = [Path(line) for line in out.splitlines()]
        assert paths and all(p.is_file() for p in paths)
        return paths

    return go


def picture(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def refusal(said: tuple[int, str, str]) -> str:
    code, out, err = said
    assert code == 1 and "Traceback" not in err and out == ""
    (sentence,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    return sentence


# generate


def test_a_lora_changes_the_picture_by_its_strength(generate, lora):
    base, off, half, on = (
        picture(generate("a zorp on a beach", "--out", name, *more)[0])
        for name, more in {
            "base": [],
            "off": ["--lora", lora, "--strength", 0],
            "half": ["--lora", lora, "--strength", 0.5],
            "on": ["--lora", lora],
        }.items()
    )
    assert base.shape == (64, 64, 3) and np.array_equal(off, base)
    change = [np.abs(x - base).mean() for x in (half, on)]
    assert change[1] > 5 and change[0] > 1 and not np.array_equal(half, on), change


def test_the_picture_is_the_one_that_training_would_preview(generate, lora, run, configure):
    """diffusers' LoRA loader on the exported file, and the trainer's own adapter with the weights of its checkpoint."""
    from trainer import adapters, families

    family = families.get("sd1")
    models = family.load(DEMO, torch.float32, torch.device("cpu"))
    config = configure(STRONG).adapter
    adapter = adapters.build(config, models.parts, {p: family.targets(models, p, config.targets) for p in family.parts}, 0)
    adapter.load({k.removeprefix("adapter/"): t for k, t in run.state()[0].items() if k.startswith("adapter/")})
    (ours,) = family.sample(models, ["a zorp"], [3], negative="grey", steps=3, guidance=7.0, size=(64, 64))
    (path,) = generate("a zorp", "--lora", lora, "--seed", 3, "--negative", "grey")
    assert np.abs(picture(path) - np.asarray(ours).astype(int)).max() <= 3


def test_each_prompt_has_its_own_seed_and_nothing_is_overwritten(generate):
    first = generate("a zorp", "an owl", "--seed", 5)
    assert first == [Path("pictures/5-1.png"), Path("pictures/6-2.png")]
    before = [p.read_bytes() for p in first]
    again = generate("a zorp", "an owl", "--seed", 5)
    third = generate("a zorp", "an owl", "--seed", 5)
    assert len({*first, *again, *third}) == 6 and [p.read_bytes() for p in first] == before
    assert len(list(Path("pictures").iterdir())) == 6
    (alone,) = generate("an owl", "--seed", 6, "--out", "other/folder")
    assert alone == Path("other/folder/6-1.png") and np.abs(picture(alone) - picture(first[1])).max() <= 2
    assert np.abs(picture(first[0]) - picture(first[1])).mean() > 5


def test_what_is_no_lora_is_refused(cli, tmp_path):
    base = DEMO / "unet" / "diffusion_pytorch_model.safetensors"
    sdxl = tmp_path / "xl.safetensors"
    save_file({f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{n}.weight": torch.zeros(2, 2) for n in ("up", "down")}, sdxl)
    wide = tmp_path / "wide.safetensors"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{stem}.lora_down.weight": torch.zeros(2, 768), f"{stem}.lora_up.weight": torch.zeros(320, 2)}, wide)
    expected = {
        base: ["diffusion_pytorch_model.safetensors", "one part of a diffusers model", "Give a LoRA file"],
        DEMO: ["a diffusers folder of Stable Diffusion 1.x", "Give a LoRA file"],
        sdxl: ["xl.safetensors", "a LoRA for Stable Diffusion XL", "the base is sd1", "Give a LoRA"],
        wide: ["wide.safetensors", "do not fit the base", "Give the base that it was trained on"],
        tmp_path / "none.safetensors": ["none.safetensors does not exist", "Give the path"],
    }
    for path, words in expected.items():
        sentence = refusal(cli("generate", "x", "--lora", path, *SMALL))
        assert all(w in sentence for w in words), sentence
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "nowhere.safetensors"], ["nowhere.safetensors", "no such file or folder"]),
        (["--out", "file/pictures"], ["--out is file", "Give another folder"]),
        (["--device", "gpu"], ['device is "gpu"', "allowed are"]),
        (["--width", "60"], ["60", "divisible by 8"]),
    ],
)
def test_what_generate_cannot_do_is_told(cli, tmp_path, words, said):
    (tmp_path / "file").write_text("mine")
    sentence = refusal(cli("generate", "x", *SMALL, *words))
    assert all(w in sentence for w in said), sentence
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.rglob("*.png"))


# inspect and convert


def test_inspect_by_the_command_line(cli, lora, run):
    code, out, err = cli("inspect", lora, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    modules = run.events("exported")[-1]["modules"]
    assert {p: sum(b["layers"] for b in blocks.values()) for p, blocks in report["layers"].items()} == modules
    assert (report["family"], report["adapter"], report["rank"], report["effect"], report["finite"]) == ("sd1", "lora", 2, True, True)
    assert not any(report["unread"].values())
    code, out, _ = cli("inspect", lora)
    assert code == 0 and out.startswith(f"{lora.name}\nkind: lora for Stable Diffusion 1.x\nrank: 2\nalpha: 2\n")
    assert "trigger words: zorp" in out and f"unet: {modules['unet']} layers" in out
    code, out, _ = cli("inspect", DEMO)
    assert code == 0 and "a diffusers folder of Stable Diffusion 1.x" in out
    code, out, _ = cli("inspect", DEMO.parent / "README.md")
    assert code == 0 and "README.md is not a .safetensors file" in out


def test_convert_there_and_back_draws_the_same_picture(cli, generate, lora, tmp_path):
    before = lora.read_bytes()
    said = "Saved {}, read back and checked.\n"
    assert cli("convert", lora, "--to", "diffusers", "--out", "peft.safetensors") == (0, said.format("peft.safetensors"), "")
    assert cli("convert", "peft.safetensors", "--to", "kohya") == (0, said.format("peft_kohya.safetensors"), "")
    assert lora.read_bytes() == before
    back, original = load_file("peft_kohya.safetensors"), load_file(lora)
    stems = {k.rpartition(".lora_")[0] for k in original if ".lora_" in k}
    assert back.keys() == original.keys() and len(stems) > 60
    for stem in stems:
        products = [
            s[f"{stem}.lora_up.weight"].flatten(1)
            @ s[f"{stem}.lora_down.weight"].flatten(1)
            * (s[f"{stem}.alpha"] / len(s[f"{stem}.lora_down.weight"]))
            for s in (original, back)
        ]
        assert torch.allclose(*products, rtol=1e-5, atol=1e-8)
    pictures = [picture(generate("a zorp", "--lora", f)[0]) for f in (lora, Path("peft.safetensors"), Path("peft_kohya.safetensors"))]
    assert all(np.abs(p - pictures[0]).max() <= 1 for p in pictures)


def test_convert_refuses_and_overwrites_nothing(cli, lora, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    expected = [
        ((lora, "--out", "there.safetensors", "--to", "diffusers"), "there.safetensors exists already and is not overwritten"),
        ((lora, "--out", "new.safetensors", "--to", "kohya"), "has kohya naming already"),
        ((DEMO / "unet" / "diffusion_pytorch_model.safetensors", "--out", "new.safetensors", "--to", "comfy"), "Needed here: a LoRA"),
        (("none.safetensors", "--out", "new.safetensors", "--to", "kohya"), "none.safetensors does not exist"),
        ((lora, "--out", "nowhere/new.safetensors", "--to", "diffusers"), "nowhere is no folder"),
    ]
    for words, said in expected:
        assert said in refusal(cli("convert", *words))
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"] and (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_convert_tells_what_it_added(cli, tmp_path):
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8), "alpha": torch.tensor(2.0)}
    save_file({f"{stem}.{n}": t for n, t in tensors.items()}, tmp_path / "q.safetensors", {"ss_base_model_version": "sd_v1"})
    code, out, _ = cli("convert", "q.safetensors", "--to", "diffusers")
    *notes, last = out.splitlines()
    assert code == 0 and last == "Saved q_diffusers.safetensors, read back and checked."
    assert any(n.startswith("Note: 3 layers of zeros were added") for n in notes), notes


# probe and --dry-run


def test_probe_prints_json_alone(cli):
    code, out, err = cli("probe")
    found = json.loads(out)
    assert code == 0 and err == "" and {"python", "packages"} & found.keys() and found == json.loads(json.dumps(found))


@pytest.fixture
def config(tmp_path, settings) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings()), encoding="utf-8")
    return path


def test_a_dry_run_as_json_says_what_the_run_does_and_writes_nothing(cli, config, train, tmp_path):
    code, out, err = cli("train", config, "--dry-run", "--json", "--run-dir", tmp_path / "run")
    found = json.loads(out)
    assert (code, err) == (0, "") and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert found["base"] == str(DEMO) and found["family"] == "sd1"
    assert found["buckets"] == [[64, 64, 4], [80, 40, 3]] or sum(n for *_, n in found["buckets"]) == 7
    done = train()
    (started,) = done.events("started")
    assert (started["images"], started["total"], started["buckets"]) == (found["images"], found["steps"], found["buckets"])
    assert (started["device"], started["dtype"], started["reasons"]) == (found["device"], found["dtype"], found["reasons"])
    assert len(found["reasons"]) == 3 and all(r.endswith(".") for r in found["reasons"])
    assert {p: row["layers"] for p, row in found["parts"].items()} == done.events("exported")[-1]["modules"]
    state, _ = done.state()
    for part, row in found["parts"].items():
        assert row["parameters"] == sum(t.numel() for k, t in state.items() if k.startswith(f"adapter/{part}/"))
    assert found["parts"]["unet"]["learning_rate"] == 1e-3 and found["parts"]["unet"]["steps"] == found["steps"]
    assert found["visits"] == 4 and found["prompts"] and found["held_out"] == 0


def test_a_dry_run_without_a_folder_writes_nothing_either(cli, config, tmp_path):
    code, out, _ = cli("train", config, "--dry-run", "--set", "part.text_1.stop=0.5", "--set", "train.visits=8")
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "7 to train, 0 held out" in lines["Images"] and "8 visits to each image" in lines["Steps"]
    assert lines["Part"].split()[1] == "text_1:" and "8 steps" in lines["Part"]  # of 16


def test_a_dry_run_says_what_one_step_will_see(cli, config, configure):
    asked = "--dry-run", "--set", "dataset.shuffle_tags=true", "--set", "dataset.flip=true"
    code, out, _ = cli("train", config, *asked, "--step", "3", "--json")
    rows = json.loads(out)["step"]
    laid = plan.make(configure({"dataset.shuffle_tags": True, "dataset.flip": True}), 128)  # what trains
    assert code == 0
    for row, planned in zip(rows, laid.steps[2], strict=True):
        assert row["file"] == str(laid.images[planned.image].path)
        assert (row["caption"], row["mirrored"]) == (laid.captions[planned.caption], planned.flip)
    _, out, _ = cli("train", config, *asked, "--step", "3")
    assert all(f"{row['file']}{', mirrored' * row['mirrored']}: {row['caption']}" in out for row in rows)
    code, _, err = cli("train", config, "--dry-run", "--step", "9000")
    assert code and "step is 9000; this run has steps 1 to" in err


def test_a_part_that_is_not_trained_is_not_listed(cli, config):
    _, out, _ = cli("train", config, "--dry-run", "--json", "--set", "part.text_1.train=false")
    assert json.loads(out)["parts"].keys() == {"unet"}


def test_what_is_said_before_a_download_is_not_in_the_json(cli, config, monkeypatch):
    monkeypatch.setattr(sources, "_download", lambda repo, say: say(f"Downloading {repo}.") or DEMO)
    code, out, err = cli("train", config, "--dry-run", "--json", "--set", "model.source=someone/toy")
    assert code == 0 and json.loads(out)["base"] == str(DEMO) and err == "Downloading someone/toy.\n"
