"""The bug report: what is private is planted everywhere a file can hold it, and looked for in the zip."""

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from app import report, settings
from app.paths import Home

TOKEN, OTHER_TOKEN, PASSWORD = "hf_abcdefGHIJKL123456", "hf_ZYXwvu9876543210", "swordfish-and-chips"
CAPTION = 'a photo of quibblefex, sitting on aunt "Marlene", at\nher wooden table'
PROMPT = "quibblefex riding a llama\u00e4 through Wuppertal, very detailed and quite long indeed"
TRIGGER, RUN, IMAGE, FOLDER, MODEL = (
    "quibblefex",
    "20261123-120000-my-quibblefex-lora",
    "holiday in Wuppertal 01.jpg",
    "Marlenes Fotos",
    "secretmix_v7",
)
LINKED = "second cousin.png"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A data folder of a person, in their home folder, with a run, a failed one, logs, a probe and jobs."""
    person = tmp_path / "users" / "zoe.private"
    (person / FOLDER).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(person / FOLDER / LINKED)
    (person / FOLDER / "second cousin.txt").write_text("cousin Hieronymus in the garden")
    monkeypatch.setattr(Path, "home", lambda: person)
    monkeypatch.setattr(report.getpass, "getuser", lambda: "zoeprivate")
    monkeypatch.setattr(report.platform, "node", lambda: "zoes-laptop")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_API_KEY", "k3y-of-something")
    home = Home(person / "atelier")
    home.create()
    settings.save(home, {"model_folders": [str(person / "models of mine")], "lora_folder": str(person / "out"), "run_folders": []})

    images = home.datasets / "a1b2" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / IMAGE)
    (images / IMAGE).with_suffix(".txt").write_text(CAPTION)
    config = {
        "model": {"source": str(person / "models of mine" / f"{MODEL}.safetensors")},
        "data": [{"folder": str(person / FOLDER), "trigger": TRIGGER, "class_word": "marmoset"}],
        "adapter": {"kind": "lora", "rank": 16},
        "preview": {"prompts": [PROMPT], "negative": "uglyface"},
        "output": {"name": "my-quibblefex-lora", "author": "Zoe Private", "dtype": "fp16"},
    }
    run = home.runs / RUN
    (run / "data").mkdir(parents=True)
    (run / "previews").mkdir()
    Image.new("RGB", (8, 8)).save(run / "previews/step-000000-1.png")
    (run / "config.json").write_text(json.dumps(config))
    events = [
        {"type": "started", "name": "my-quibblefex-lora", "total": 10, "device": "cuda"},
        {"type": "stage", "name": "training"},
        {"type": "warning", "text": f"{IMAGE} is small; {images / IMAGE} is 8 x 8."},
        {"type": "warning", "text": f"Two images have the caption {CAPTION!r}."},
        {"type": "preview", "step": 5, "images": ["step-000005-1.png"], "prompts": [PROMPT]},
        {"type": "exported", "step": 10, "file": "my-quibblefex-lora.safetensors", "bytes": 9},
        {"type": "failed", "step": 10, "text": f"Cannot read {person / FOLDER / 'gone.png'}: token {OTHER_TOKEN} refused"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps({"v": 1, "seq": k, **e}, ensure_ascii=False) + "\n" for k, e in enumerate(events)))
    (run / "log.txt").write_text(
        f"Loading {person}/models of mine/{MODEL}.safetensors\n{PROMPT[:40]}...\nUser zoeprivate on zoes-laptop\n"
        f"Authorization: Bearer {OTHER_TOKEN}\nhttp://zoe:{PASSWORD}@proxy.example:8080 failed\n"
        f'  File "{person}/venv/x.py", line 3\nCUDA out of memory at step 7\n'
    )
    (run / "launch.json").write_text(json.dumps({"pid": 1, "kind": "train", "words": ["train", "--run-dir", str(run)]}))
    job = home.jobs / "caption-1"
    job.mkdir()
    (job / "config.json").write_text(json.dumps({"kind": "caption", "folder": str(images), "source": str(person / "blip")}))
    (job / "log.txt").write_text(f"captioned {images / IMAGE} as {CAPTION!r}; /mnt/disk of zoe/Marlenes Bilder/x.webp is odd\n")
    home.log.write_text(
        f"ERROR app: GET /api/runs/{RUN}\nTraceback\n  File \"{report.ROOT}/app/runner.py\", line 10, in look\nKeyError: 'LORA_ATELIER_PASSWORD={PASSWORD}'\n"
        f'password: "{PASSWORD}"\nkey k3y-of-something\nC:\\Users\\Zoe\\cats\\a.png D:\\zoes stuff\\b.png ~/zoes/c\n'
    )
    (home.cache / "probe.json").write_text(
        json.dumps({"stamp": "", "found": {"gpus": [{"name": "NVIDIA GeForce RTX 3060"}], "python": "3.11"}})
    )
    home.password.write_text(json.dumps({"hash": "deadbeefcafe"}))
    return home


def unzip(content: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name).decode() for name in file.namelist()}


ALWAYS = (TOKEN, OTHER_TOKEN, PASSWORD, "k3y-of-something", "deadbeefcafe", "zoe.private")
CAPTIONS = (TRIGGER, "sitting on aunt", "wooden table", "marmoset", "Hieronymus")
PROMPTS = ("llama", "through Wuppertal", "uglyface")
NAMES = (RUN, "my-quibblefex-lora", "holiday in", "Wuppertal 01", "Marlenes", MODEL, "second cousin", "zoeprivate", "zoes-laptop", "Zoe Private",
         "models of mine", "gone.png", "disk of zoe", "Bilder", "x.webp", "\\Zoe", "\\cats", "zoes stuff", "b.png", "~/zoes")  # fmt: skip


def test_nothing_private_is_in_it(home):
    files = unzip(report.make(home))
    whole = "\n".join([*files, *files.values()])
    for secret in (*ALWAYS, *CAPTIONS, *PROMPTS, *NAMES):
        place = next((name for name, text in files.items() if secret.lower() in text.lower()), None)
        assert secret.lower() not in whole.lower(), f"{secret} is in {place}:\n{files.get(place)}"
    assert not [name for name in files if re.search(r"\.(png|jpg|webp|safetensors|sqlite)$", name)]
    assert "password.json" not in whole


def test_what_helps_stays(home):
    files = unzip(report.make(home))
    config = json.loads(files["run-1/config.json"])
    assert config["adapter"] == {"kind": "lora", "rank": 16} and config["output"]["dtype"] == "fp16"
    events = [json.loads(line) for line in files["run-1/events.jsonl"].splitlines()]
    assert [e["type"] for e in events] == ["started", "stage", "warning", "warning", "preview", "exported", "failed"]
    assert events[1]["name"] == "training" and events[0]["total"] == 10 and events[4]["images"] == ["step-000005-1.png"]
    assert "is small" in events[2]["text"] and "is 8 x 8" in events[2]["text"]
    assert "CUDA out of memory at step 7" in files["run-1/log.txt"] and "proxy.example" in files["run-1/log.txt"]
    assert '"<app>/app/runner.py", line 10, in look' in files["server.log"] and "KeyError" in files["server.log"]
    assert "GET /api/runs/" in files["server.log"]
    assert json.loads(files["hardware.json"])["gpus"][0]["name"] == "NVIDIA GeForce RTX 3060"
    assert json.loads(files["versions.json"])["packages"]["gradio"].startswith("6.")
    assert json.loads(files["settings.json"])["theme"] == "system"
    assert "captions, names, prompts" in files["README.txt"]


@pytest.mark.parametrize(("tick", "back"), [("captions", "marmoset"), ("prompts", "uglyface"), ("names", MODEL)])
def test_what_is_ticked_stays_and_the_rest_does_not(home, tick, back):
    whole = "\n".join(unzip(report.make(home, **{tick: True})).values())
    assert back in whole
    for secret in ALWAYS:
        assert secret not in whole, secret
    others = {"captions": ("sitting on aunt", "Hieronymus"), "prompts": ("llama", "uglyface"), "names": (MODEL, "zoes-laptop")}
    for kind, secrets in others.items():
        assert kind == tick or not [s for s in secrets if s in whole], kind


def test_an_empty_data_folder_gives_a_report_too(tmp_path):
    home = Home(tmp_path / "new")
    home.create()
    settings.save(home, {"run_folders": []})
    assert {"README.txt", "versions.json", "settings.json"} <= unzip(report.make(home)).keys()


def test_a_large_log_is_cut_to_its_end(home):
    home.log.write_text("x y\n" * 200_000 + "the last line\n")
    text = unzip(report.make(home))["server.log"]
    assert len(text) <= report.TAIL and text.endswith("the last line\n")
