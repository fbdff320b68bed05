"""Captioning a folder, by a small BLIP of random weights that is made on the spot."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from small_captioners import make_florence, make_qwen, make_wd

from trainer import __main__ as program
from trainer import control, events
from trainer.captioners import CAPTIONERS, KNOWN, blip, files, florence, kind_of, wd
from trainer.captioners.job import caption
from trainer.captioners.texts import bare, combined
from trainer.config import DataConfig
from trainer.data.scan import scan
from trainer.run_dir import RunDir, is_alive

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(small_blip) -> Path:
    return small_blip


@pytest.fixture(scope="module", params=sorted(CAPTIONERS))
def each(request, small_blip, tmp_path_factory) -> tuple[str, dict]:
    """(name, settings) of each captioner with a small model of random weights."""
    make = {"blip": lambda folder: small_blip, "florence": make_florence, "qwen": make_qwen, "wd": make_wd}[request.param]
    settings = {"source": str(make(tmp_path_factory.mktemp(request.param) / "model")), "batch": 1}
    return request.param, settings if request.param == "wd" else settings | {"max_tokens": 6}


@pytest.fixture
def folder(draw_pictures, tmp_path) -> Path:
    """Five pictures of other colours and sizes, one in a folder within, none with a caption."""
    root = draw_pictures(tmp_path / "images", [(64, 64), (96, 48), (48, 96), (64, 64)])
    draw_pictures(root / "more", [(80, 40)], seed=5)
    for path in root.rglob("*.txt"):
        path.unlink()
    return root


def read(folder: Path) -> dict[str, str]:
    """{image: caption} as the trainer reads them."""
    found = scan([DataConfig(folder=folder)]).images
    return {i.path.relative_to(folder).as_posix(): i.caption for i in found}


def job(root: Path, *kinds: str) -> list[dict]:
    return [e for e in events.read(root / "events.jsonl") if not kinds or e["type"] in kinds]


def test_every_image_gets_the_caption_that_the_model_gives_it(model, folder, tmp_path):
    root = tmp_path / "job"
    assert caption(folder, root, settings={"source": str(model), "batch": 2, "max_tokens": 8}, device="cpu") == "finished"
    texts = read(folder)
    assert len(texts) == 5 and all(texts.values()) and len(set(texts.values())) > 1
    told = job(root, "captioned")
    assert {e["file"]: e["text"] for e in told} == texts and [e["done"] for e in told] == [1, 2, 3, 4, 5]
    assert all(e["total"] == 5 and e["seconds"] >= 0 for e in told)
    (started,) = job(root, "started")
    assert (started["name"], started["total"], started["dtype"]) == ("blip", 5, "fp32") and len(started["reasons"]) == 3
    assert job(root)[-1]["type"] == "finished" and not is_alive(RunDir(root))
    asked = json.loads((root / "config.json").read_text())
    assert (asked["folder"], asked["source"], asked["max_tokens"]) == (str(folder), str(model), 8)
    assert not (root / "backup").exists() and not list(folder.rglob("*.tmp"))

    # the words come from this model and this image: transformers alone says the same of one of them
    from transformers import BertTokenizerFast, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    pixels = BlipImageProcessorPil.from_pretrained(model)(Image.open(folder / "01.png"), return_tensors="pt").pixel_values
    tokens = BlipForConditionalGeneration.from_pretrained(model).eval().generate(pixels, max_new_tokens=8, num_beams=3)
    assert blip.tidy(BertTokenizerFast.from_pretrained(model).decode(tokens[0], skip_special_tokens=True)) == texts["01.png"]


def test_what_stood_there_is_backed_up_and_only_missing_leaves_it_alone(model, folder, tmp_path):
    root, settings = tmp_path / "job", {"source": str(model), "max_tokens": 4}
    (folder / "00.txt").write_text("mine\n", encoding="utf-8")
    (folder / "01.caption").write_text("also mine", encoding="utf-8")
    (folder / "02.txt").write_text(" \n", encoding="utf-8")  # empty is missing
    assert caption(folder, root, settings=settings, only_missing=True, device="cpu") == "finished"
    assert {e["file"] for e in job(root, "captioned")} == {"02.png", "03.png", "more/00.png"}
    assert (folder / "00.txt").read_text() == "mine\n" and read(folder)["01.png"] == "also mine"

    assert caption(folder, root, settings=settings, device="cpu") == "finished"
    texts = read(folder)
    assert "mine" not in texts["00.png"] and "mine" not in texts["01.png"] and not (folder / "01.txt").exists()
    assert (root / "backup" / "00.txt").read_text() == "mine\n" and (root / "backup" / "01.caption").read_text() == "also mine"
    assert not (root / "backup" / "more").exists()  # what is written anew as it was needs no backup
    seqs = [e["seq"] for e in job(root)]
    assert seqs == list(range(len(seqs)))

    (folder / "00.txt").write_text("mine again", encoding="utf-8")
    caption(folder, root, settings=settings, device="cpu")
    assert (root / "backup" / "00.txt").read_text() == "mine\n" and (root / "backup" / "00.txt.2").read_text() == "mine again"

    kept = {p: p.read_bytes() for p in folder.rglob("*.txt")}
    assert caption(folder, root, settings={"source": str(tmp_path / "gone")}, only_missing=True, device="cpu") == "finished"
    assert job(root, "started")[-1]["total"] == 0 and {p: p.read_bytes() for p in folder.rglob("*.txt")} == kept


def test_images_that_share_a_name_get_captions_of_their_own(model, folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(folder / "00.jpg")
    Image.new("RGB", (64, 64), "blue").save(folder / "03.webp")
    (folder / "03.txt").write_text("of both", encoding="utf-8")
    caption(folder, tmp_path / "job", settings={"source": str(model), "max_tokens": 4}, device="cpu")
    for name in ("00.png.txt", "00.jpg.txt", "03.png.txt", "03.webp.txt", "01.txt"):
        assert (folder / name).exists(), name
    assert (folder / "03.txt").read_text() == "of both" and not (folder / "00.txt").exists()
    assert read(folder) == {e["file"]: e["text"] for e in job(tmp_path / "job", "captioned")}


def test_an_image_that_cannot_be_read_is_passed_over(model, folder, tmp_path):
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "02.png").write_bytes(b"no image")
    root = tmp_path / "job"
    assert caption(folder, root, settings={"source": str(model), "max_tokens": 4, "batch": 1}, device="cpu") == "finished"
    assert {e["file"] for e in job(root, "captioned")} == {"00.png", "03.png", "more/00.png"}
    warned = [e["text"] for e in job(root, "warning") if "passed over" in e["text"]]
    assert [w.split()[0] for w in warned] == ["01.png", "02.png"] and job(root)[-1]["skipped"] == 2
    assert not (folder / "01.txt").exists()


def test_a_stop_ends_after_the_batch_and_only_missing_goes_on(model, folder, tmp_path):
    root, settings = tmp_path / "job", {"source": str(model), "max_tokens": 4, "batch": 2}

    def show(event):
        if event["type"] == "captioned" and event["done"] == 1:
            control.send(RunDir(root), "stop")

    assert caption(folder, root, settings=settings, device="cpu", show=show) == "stopped"
    assert len(job(root, "captioned")) == len(list(folder.rglob("*.txt"))) == 2
    assert [e["type"] for e in job(root)][-2:] == ["answered", "stopped"] and not list((root / "control").glob("*.json"))
    first = {p: p.read_bytes() for p in folder.rglob("*.txt")}
    assert caption(folder, root, settings=settings, only_missing=True, device="cpu") == "finished"
    assert job(root, "started")[-1]["total"] == 3 and all(read(folder).values())
    assert all(p.read_bytes() == raw for p, raw in first.items())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no polite kill")
def test_a_polite_kill_stops_the_command(model, draw_pictures, tmp_path):
    folder = draw_pictures(tmp_path / "images", [(64, 64)] * 300)
    root = tmp_path / "job"
    words = [sys.executable, "-m", "trainer", "caption", folder, "--source", model, "--run-dir", root, "--batch", "1", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        list(map(str, words)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 100
    while not job(root, "captioned") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_alive(RunDir(root))
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130, out
    assert job(root)[-1]["type"] == "stopped" and 0 < len(job(root, "captioned")) < 300
    assert not is_alive(RunDir(root)) and "Captions that were there before" in out and "1 of 300: 00.png: " in out


def test_what_cannot_caption_is_refused_with_a_sentence(model, folder, tmp_path, capsys):
    def copy(name: str, leave: str = "", **changes: object) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in model.iterdir():
            if path.name != leave:
                (target / path.name).write_bytes(path.read_bytes())
        if changes:
            config = json.loads((target / "config.json").read_text())
            (target / "config.json").write_text(json.dumps(config | changes))
        return target

    pickle = copy("pickle", "model.safetensors")
    (pickle / "pytorch_model.bin").write_bytes(b"\x80\x02")
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    expected = {
        pickle: ["pytorch_model.bin is a pickle and is not opened", blip.DEFAULT],
        torn: ["model.safetensors", str(torn)],
        copy("empty", "model.safetensors"): ["model.safetensors is missing"],
        copy("words", "vocab.txt"): ["vocab.txt"],
        copy("processor", "preprocessor_config.json"): ["preprocessor_config.json is missing"],
        copy("other", model_type="clip", architectures=["CLIPModel"]): ["clip (CLIPModel)", "Give a BLIP captioning model"],
        tmp_path / "none": ["there is no such folder", blip.DEFAULT],
        folder / "00.png": ["which is a file"],
    }
    for n, (source, words) in enumerate(expected.items()):
        root = tmp_path / f"job-{n}"
        assert program.main(["caption", str(folder), "--source", str(source), "--run-dir", str(root), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and all(w in error for w in words), error
        failed = job(root)[-1]
        assert failed["type"] == "failed" and all(w in failed["text"] for w in words) and not is_alive(RunDir(root))
    assert not list(folder.rglob("*.txt"))
    for wrong, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "job-0", "has no image")):
        assert program.main(["caption", str(wrong), "--source", str(model), "--run-dir", str(tmp_path / "job"), "--device", "cpu"]) == 1
        assert words in capsys.readouterr().err


def test_of_the_hub_only_the_needed_files_are_fetched_and_never_a_pickle():
    class Sibling:
        def __init__(self, name):
            self.rfilename = name

    def wanted(*names):
        return {f.rfilename for f in files.wanted(blip.SHAPE, "a/b", [Sibling(n) for n in names])}

    needed = {"config.json", "preprocessor_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    others = {"pytorch_model.bin", "tf_model.h5", "vocab.txt", "README.md", ".gitattributes", "onnx/model.safetensors"}
    assert wanted(*needed, *others) == needed
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        wanted(*(needed | others) - {"model.safetensors"})

    tags = {"model.onnx", "selected_tags.csv"}  # of a tagger no other weights
    found = files.wanted(wd.SHAPE, "a/b", [Sibling(n) for n in (*tags, "model.safetensors", "config.json", "model.msgpack")])
    assert {f.rfilename for f in found} == tags


def test_the_registry_is_free_of_torch_and_a_caption_is_tidied():
    code = "import sys, trainer.captioners, trainer.captioners.job; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
    assert CAPTIONERS["blip"].config().source == blip.DEFAULT
    assert blip.tidy("arafed  cat on a\nhouse , araffes dog") == "cat on a house , dog"


# Every captioner, by the registry


def test_each_captioner_keeps_what_was_there_stops_and_goes_on(each, draw_pictures, tmp_path):
    name, settings = each
    assert kind_of(settings["source"]) == name
    folder, root = draw_pictures(tmp_path / "images", [(64, 64), (96, 48), (48, 96)]), tmp_path / "job"
    (folder / "02.txt").unlink()
    before = read(folder)

    def show(event):
        if event["type"] == "captioned" and event["done"] == 1:
            control.send(RunDir(root), "stop")

    asked = {"captioner": "auto", "settings": settings, "trigger": "zorp", "device": "cpu"}
    assert caption(folder, root, **asked, show=show) == "stopped"
    texts = read(folder)
    assert texts["00.png"] != before["00.png"] and texts["01.png"] == before["01.png"] and not texts["02.png"]
    assert (root / "backup" / "00.txt").read_text() == before["00.png"]
    assert caption(folder, root, **asked, only_missing=True) == "finished"
    assert job(root, "started")[-1]["total"] == 1 and read(folder)["01.png"] == before["01.png"]

    assert caption(folder, root, **asked) == "finished"
    texts = read(folder)
    assert (root / "backup" / "01.txt").read_text() == before["01.png"]
    assert all(re.match(r"zorp, \S", text) for text in texts.values()) and len(set(texts.values())) > 1
    assert {e["file"]: e["text"] for e in job(root, "captioned")} == texts
    (started, *_), asked_for = job(root, "started"), json.loads((root / "config.json").read_text())
    assert started["name"] == asked_for["captioner"] == name and asked_for["trigger"] == "zorp"
    assert all(e["text"].endswith(".") for e in job(root, "chosen")) and bool(job(root, "chosen")) == (name in ("qwen", "wd"))


def test_each_captioner_says_the_same_of_an_image_alone_and_among_others(each, folder):
    name, settings = each
    kind, notes = CAPTIONERS[name], []
    write = kind.build(kind.config.model_validate(settings), Path(settings["source"]), "cpu", "fp32", notes.append)
    images = [Image.open(p).convert("RGB") for p in sorted(folder.glob("*.png"))]
    assert write(images) == [write([image])[0] for image in images] and all(write(images))


def test_one_image_alone_is_written_anew_and_tags_are_added_to_sentences(model, folder, tmp_path):
    tagger = make_wd(tmp_path / "wd")
    root, blip_settings = tmp_path / "job", {"source": str(model), "max_tokens": 4}
    caption(folder, root, settings=blip_settings, trigger="zorp", device="cpu")
    sentences = read(folder)
    add = {"captioner": "wd", "settings": {"source": str(tagger)}, "add": True, "trigger": "zorp", "device": "cpu"}
    assert caption(folder, root, only=["more/00.png"], **add) == "finished"
    texts = read(folder)
    assert {n for n in texts if texts[n] != sentences[n]} == {"more/00.png"}
    assert texts["more/00.png"].startswith(sentences["more/00.png"] + ", ") and texts["more/00.png"].count("zorp,") == 1

    assert caption(folder, root, **add) == "finished"
    texts = read(folder)
    assert all(texts[n].startswith(sentences[n] + ", ") for n in texts)
    kept = {p.name: p.read_text().strip() for p in (root / "backup").glob("*.txt")}
    assert kept == {f"{n[:-4]}.txt": text for n, text in sentences.items() if "/" not in n}
    caption(folder, root, **add)  # as after a stop: nothing is added twice, and nothing is written or kept again
    assert read(folder) == texts and len(list((root / "backup").iterdir())) == len(kept) + 1
    for wrong, words in (({"only": ["gone.png"]}, "has no image 'gone.png'"), ({"only_missing": True}, "exclude each other")):
        with pytest.raises(ValueError, match=words):
            caption(folder, root, **add | wrong)
    assert read(folder) == texts


def test_an_image_of_which_nothing_is_said_keeps_its_caption(draw_pictures, tmp_path):
    tagger, folder = make_wd(tmp_path / "wd"), draw_pictures(tmp_path / "images", [(64, 64)])
    root, settings = tmp_path / "job", {"source": str(tagger), "general": 1, "character": 1}
    assert caption(folder, root, captioner="wd", settings=settings, device="cpu") == "finished"
    assert "nothing to say" in job(root, "warning")[-1]["text"] and job(root)[-1]["skipped"] == 1
    assert (folder / "00.txt").read_text() == "zorp, thing 0, red, small" and not (root / "backup").exists()


def test_the_command_takes_the_settings_of_a_captioner(draw_pictures, tmp_path, capsys):
    tagger, folder = make_wd(tmp_path / "wd"), draw_pictures(tmp_path / "images", [(64, 64)])
    words = ["caption", str(folder), "--source", str(tagger), "--run-dir", str(tmp_path / "job"), "--device", "cpu", "--trigger=-zorp"]
    assert program.main([*words, "--set", "general=0.2", "--set", "blocked=smile, 1girl", "--set", "spaces=false"]) == 0
    asked = json.loads((tmp_path / "job" / "config.json").read_text())
    assert (asked["captioner"], asked["general"], asked["blocked"], asked["spaces"]) == ("wd", 0.2, ["smile", "1girl"], False)
    text = (folder / "00.txt").read_text()
    assert text.startswith("-zorp, ") and "_" in text and "smile" not in text
    for wrong, said in (
        (["--set", "general=2"], "general is '2': Input should be less than or equal to 1."),
        (["--max-tokens", "5"], "The captioner wd has no setting max_tokens; it has source, batch, general"),
        (["--set", "general"], "it must be NAME=VALUE"),
    ):
        assert program.main([*words, *wrong]) == 1
        assert said in capsys.readouterr().err


def test_florence_in_its_first_format_is_refused_since_its_code_is_not_run(tmp_path):
    folder = make_florence(tmp_path / "florence")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "davit"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no code of a model is run here") as error:
        files.resolve(florence.SHAPE, str(folder), print)
    assert florence.DEFAULT in str(error.value)


def test_what_is_offered_is_known_without_a_look_at_the_hub():
    assert len({known.source for known in KNOWN}) == len(KNOWN) and {known.kind for known in KNOWN} == set(CAPTIONERS)
    for known in KNOWN:
        assert kind_of(known.source) == known.kind and known.why.endswith(".") and known.licence
    assert {kind: captioner.config().source for kind, captioner in CAPTIONERS.items()}.items() <= {(k.kind, k.source) for k in KNOWN}


def test_words_are_made_into_captions():
    assert bare("The image shows a cat on\na chair.") == "a cat on a chair."
    assert bare("In this image we can see a dog. It runs. Behind it") == "a dog. It runs."
    assert bare("“A cat.”") == "A cat." and bare("a cat on a chair") == "a cat on a chair" and bare("") == ""
    assert bare("The image quality is poor") == "The image quality is poor"
    assert combined("a cat, red", "Red, cat, grass", "", add=True) == "a cat, red, cat, grass"
    assert combined("zorp sits on grass.", "grass, red", "zorp", add=True) == "zorp sits on grass, grass, red"
    assert combined("red, small", "A cat, asleep.", "zorp", add=True) == "zorp, red, small, A cat, asleep."
    again = "zorp, red, small, A cat, asleep."
    assert combined(again, "A cat, asleep.", "zorp", add=True) == again
    assert combined("old", "red, zorp", "zorp", add=False) == "zorp, red" and combined("", "red", "", add=True) == "red"
