"""Where a base comes from. The hub is played by a server on this machine; the real one is never asked."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import small_models
from safetensors.torch import load_file, save_file
from small_captioners import make_florence, make_wd

from trainer import bases
from trainer.families import sources
from trainer.families.sources import DEMO, SourceError, family_of, resolve
from trainer.formats import FormatError, single_file
from trainer.run_dir import RunError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffee" * 6 + "c0ff"
TOY = {p.relative_to(DEMO).as_posix(): p.read_bytes() for p in sorted(DEMO.rglob("*")) if p.is_file()}
EXTRAS = {
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half" * 10,
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"more" * 10,
    "unet/diffusion_pytorch_model.bin": b"\x80\x02pickle",
    "safety_checker/model.safetensors": b"no" * 10,
    "toy.safetensors": b"single" * 10,
    "README.md": b"---\nlicense: mit\n---\n",
}


@dataclass
class Hub:
    """What stands on the hub: {repository: {file: bytes}}; those `gated`, with their files behind terms; what was asked of it."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)  # gated from the first look
    weights: bool = True  # whether large files can be fetched
    down: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """Files whose content was sent since the last call."""
        found = [m[1] for line in self.asked if (m := re.fullmatch(rf"GET .+/resolve/(?:main|{COMMIT})/(.+)", line))]
        self.asked.clear()
        return sorted(found)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.down:
            return self.reply(503, b"down")
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            return self.about(m[1], m[2] or "")
        if m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file(*m.groups())
        return self.reply(404)

    do_HEAD = do_GET

    def about(self, repo: str, rest: str) -> None:
        if repo in self.hub.closed:
            return self.reply(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if repo not in self.hub.repos:
            return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = self.hub.repos[repo]
        if rest.startswith("/tree"):
            found = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
        else:
            siblings = [{"rfilename": n, "size": len(b), "blobId": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
            found = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings, "downloads": 0, "likes": 0}
            if "README.md" in files:
                found["cardData"] = {"license": "mit"}
        self.reply(200, json.dumps(found).encode(), Content_Type="application/json")

    def file(self, repo: str, name: str) -> None:
        if repo in self.hub.gated:
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if name.endswith(".safetensors") and not self.hub.weights:
            return self.reply(403)
        body = self.hub.repos.get(repo, {}).get(name)
        if body is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        self.reply(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")


@pytest.fixture
def hub():
    hub = Hub({"someone/toy": TOY | EXTRAS})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from trainer.families.sources import SourceError, resolve
said = []
try:
    print(json.dumps([str(resolve(sys.argv[1], said.append)), said, ""]))
except SourceError as error:
    print(json.dumps(["", said, str(error)]))
assert not {"torch", "diffusers"} & set(sys.modules)
"""


CAPTIONER = SCRIPT.replace(
    "from trainer.families.sources import SourceError, resolve",
    """from trainer.captioners import CAPTIONERS, files, kind_of
from trainer.families.sources import SourceError
def resolve(source, say):
    kind = kind_of(source)
    return f"{kind} {files.resolve(CAPTIONERS[kind].shape, source, say)}\"""",
)


@pytest.fixture
def ask(hub, tmp_path):
    """ask(source): (path or None, what was said before, the error's sentence), by a process that knows no other hub than ours.

    `script`: CAPTIONER instead takes the model for a captioner's; the path has its kind and a space before it then.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and not k.lower().endswith("_proxy")}

    def go(source: str, script: str = SCRIPT, **more: str):
        environment = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", **more}
        done = subprocess.run(
            [sys.executable, "-c", script, source], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        path, said, error = json.loads(done.stdout)
        assert "\n" not in error
        return Path(path) if path else None, said, error

    return go


def test_a_model_of_the_hub_is_fetched_once_and_only_what_is_needed(hub, ask, one_thread):
    path, said, error = ask("someone/toy")
    size = round(sum(map(len, TOY.values())) / 1e6)
    assert not error and said == [f"Downloading someone/toy from huggingface.co: about {size} MB, licence: mit."]
    assert {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()} == TOY
    assert hub.fetched() == sorted(TOY)

    import torch

    from trainer import families

    family = families.get(family_of(path, "auto"))
    models = family.load(path, torch.float32, torch.device("cpu"))
    ours = family.load(DEMO, torch.float32, torch.device("cpu"))
    for name, part in ours.parts.items():
        got = models.parts[name].state_dict()
        assert all(torch.equal(got[k], t) for k, t in part.state_dict().items())

    assert ask("someone/toy") == (path, [], "")
    assert hub.fetched() == []


def test_a_torn_download_is_completed(hub, ask):
    path, _, _ = ask("someone/toy")
    hub.fetched()
    (path / "vae" / "config.json").resolve().unlink()
    (path / "vae" / "config.json").unlink()
    again, said, _ = ask("someone/toy")
    assert again == path and "about 1 MB" in said[0] and hub.fetched() == ["vae/config.json"]


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "down", "unreachable"])
def test_without_the_hub_the_copy_on_this_machine_serves(hub, ask, how):
    path, _, _ = ask("someone/toy")
    more = {"HF_HUB_OFFLINE": {"HF_HUB_OFFLINE": "1"}, "unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"}}.get(how, {})
    hub.down = how == "down"
    hub.asked.clear()
    again, (said,), error = ask("someone/toy", **more)
    assert (again, error) == (path, "") and family_of(again, "auto") == "sd1"
    assert said.startswith("Using the copy of someone/toy on this machine, since ")
    assert ("HF_HUB_OFFLINE is set" if how == "HF_HUB_OFFLINE" else "cannot be reached") in said
    assert bool(hub.asked) == (how == "down")

    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # a copy that lacks a file does not serve
    again, said, error = ask("someone/toy", **more)
    assert again is None and not said and "someone/toy" in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "Unset it", "path of a model"]),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["the hub cannot be reached", "Check the network", "path of a model"]),
        ({"HF_ENDPOINT": "http://nowhere.invalid"}, ["the hub cannot be reached", "Check the network", "path of a model"]),
    ],
    ids=["offline", "refused", "no such host"],
)
def test_without_the_hub_and_without_a_copy(ask, more, words):
    path, said, error = ask("someone/toy", **more)
    assert path is None and not said
    assert "'someone/toy': there is no such folder here" in error and all(w in error for w in words), error


@pytest.mark.slow
def test_a_captioner_of_the_hub_is_known_by_its_files_and_only_those_it_needs_are_fetched(hub, ask, small_blip, tmp_path):
    def files(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    wd, florence, blip = files(make_wd(tmp_path / "wd")), files(make_florence(tmp_path / "florence")), files(small_blip)
    more = {"README.md": b"---\nlicense: mit\n---\n", "pytorch_model.bin": b"\x80\x02", "onnx/model.onnx": b"no"}
    davit = json.loads(florence["config.json"])
    davit["vision_config"]["model_type"] = "davit"
    hub.repos |= {
        "someone/tagger": wd | more | {"config.json": b'{"architecture": "vit"}', "model.safetensors": b"x" * 99},
        "someone/florence": florence | more,
        "someone/blip": blip | more,
        "someone/first": florence | {"config.json": json.dumps(davit).encode()},
        "someone/clip": blip | {"config.json": b'{"model_type": "clip"}'},
    }
    needed = {"tagger": {"model.onnx", "selected_tags.csv"}, "florence": {*florence}, "blip": {*blip}}
    for name, kind in (("tagger", "wd"), ("florence", "florence"), ("blip", "blip")):
        path, said, error = ask(f"someone/{name}", CAPTIONER)
        assert not error and said[0].startswith(f"Downloading someone/{name} from huggingface.co: about 1 MB, licence: mit")
        folder = Path(str(path).removeprefix(f"{kind} "))
        assert {p.name for p in folder.iterdir()} >= needed[name] and "pytorch_model.bin" not in hub.fetched()
        assert ask(f"someone/{name}", CAPTIONER)[1:] == ([], "")
    hub.down = True
    again, (said,), error = ask("someone/tagger", CAPTIONER)
    assert str(again).startswith("wd ") and "Using the copy" in said and not error
    hub.down = False
    hub.fetched()
    for name, words in (("first", "no code of a model is run here"), ("clip", "a model of the kind clip")):
        _, said, error = ask(f"someone/{name}", CAPTIONER)
        assert f"'someone/{name}'" in error and words in error and not said
        assert hub.fetched() == ["config.json"]  # and no weights in vain
    for name, words in (("nothing", "no such model on the hub"), ("toy", "config.json is missing. Give a BLIP")):
        assert words in ask(f"someone/{name}", CAPTIONER)[2]


@pytest.mark.slow
def test_repositories_that_cannot_be_used(hub, ask):
    ema = {n.replace("model.safetensors", "model.non_ema.safetensors"): b for n, b in TOY.items()}
    pieces = {n.replace("model.safetensors", "model-00001-of-00002.safetensors"): b for n, b in TOY.items()}
    hub.repos |= {
        "someone/loras": {"toy.safetensors": b"x", "README.md": b""},
        "someone/ema": ema,
        "someone/piece": pieces,
        "someone/flux": {"model_index.json": b'{"_class_name": "FluxPipeline"}', "transformer/model.safetensors": b"x" * 99},
        "someone/inpainting": TOY | {"unet/config.json": TOY["unet/config.json"].replace(b'"in_channels": 4', b'"in_channels": 9')},
        "someone/broken": TOY | {"model_index.json": b"{"},
        "someone/pickles": {n.replace(".safetensors", ".bin"): b for n, b in TOY.items()},
        "someone/terms": TOY,
    }
    hub.gated, hub.closed = {"someone/terms"}, {"someone/closed"}
    expected = {
        "someone/nothing": ["'someone/nothing'", "no such folder here", "no such model on the hub", "private"],
        "someone/too--odd": ["'someone/too--odd'", "no such folder here", "no such model on the hub"],
        "someone/closed": ["someone/closed asks you to accept its terms", "huggingface.co/someone/closed", "hf auth login"],
        "someone/terms": ["someone/terms asks you to accept its terms", "huggingface.co/someone/terms", "hf auth login"],
        "someone/loras": ["'someone/loras'", "without model_index.json", "Choose one in diffusers format"],
        "someone/ema": ["'someone/ema'", "non_ema.safetensors is not read", "Choose a model"],
        "someone/piece": ["'someone/piece'", "only 1 of the 2 pieces of unet/diffusion_pytorch_model.safetensors are there"],
        "someone/flux": ["'someone/flux'", "a diffusers folder of Flux", "Choose a base model of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5"],
        "someone/inpainting": ["'someone/inpainting'", "an inpainting or editing model of Stable Diffusion 1.x (9 input channels"],
        "someone/broken": ["'someone/broken'", "cannot be read", "model_index.json"],
        "someone/pickles": ["'someone/pickles'", ".bin is a pickle", "Choose a model"],
    }
    for repo, words in expected.items():
        path, said, error = ask(repo)
        assert path is None and all(w in error for w in words), (repo, error)
        assert not said and not [n for n in hub.fetched() if not n.endswith(".json")]


def test_the_size_of_a_large_model_is_told_in_gb(hub, ask, monkeypatch):
    """Only its listing is that large: the download of the first file ends it."""
    about = Handler.about

    def larger(self, repo, rest):
        body = self.hub.repos[repo]
        self.hub.repos[repo] = {n: Large(b) if n.endswith(".safetensors") else b for n, b in body.items()}
        about(self, repo, rest)
        self.hub.repos[repo] = body

    class Large(bytes):
        def __len__(self):
            return 1_400_000_000

    monkeypatch.setattr(Handler, "about", larger)
    hub.weights = False
    _, (said,), _ = ask("someone/toy")
    assert said == "Downloading someone/toy from huggingface.co: about 4.2 GB, licence: mit."


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Callable[..., dict[str, bytes]]:
    """small(family): the files of a small model of it, as they stand on the hub."""

    def files(family: str, **changes) -> dict[str, bytes]:
        root = small_models.make_folder(tmp_path_factory.mktemp("small") / "m", family, **changes)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    return files


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3"])
def test_models_of_every_family_are_fetched_whole(hub, ask, small, family):
    files = small(family, t5=True)
    hub.repos["someone/model"] = files | EXTRAS | {"text_encoder_2/flax_model.msgpack": b"x", "vae_1_0/config.json": b"{}"}
    path, said, error = ask("someone/model")
    assert not error and family_of(path, "auto") == family
    assert {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()} == files
    t5 = sum(len(b) for n, b in files.items() if n.startswith("text_encoder_3/"))
    assert (f", {max(1, round(t5 / 1e6))} MB of it for the T5 text encoder," in said[0]) == (family == "sd3")


def test_half_precision_is_fetched_where_there_is_nothing_else(hub, ask, small):
    half, full = small("sdxl", half=True), small("sdxl")
    assert not [n for n in half if n.endswith("model.safetensors")]
    hub.repos |= {"someone/half": half, "someone/both": half | full}
    weights = [sorted(n for n in files if n.endswith(".safetensors")) for files in (half, full)]
    path, _, error = ask("someone/half")
    assert not error and family_of(path, "auto") == "sdxl"
    assert [n for n in hub.fetched() if n.endswith(".safetensors")] == weights[0]
    ask("someone/both")
    assert [n for n in hub.fetched() if n.endswith(".safetensors")] == weights[1]


def test_sd3_without_t5_is_whole(hub, ask, small):
    files = small("sd3")
    assert not [n for n in files if n.startswith("text_encoder_3")]
    hub.repos["someone/model"] = files
    path, said, _ = ask("someone/model")
    assert family_of(path, "auto") == "sd3" and "T5" not in said[0]


def test_a_model_without_a_licence_says_so(hub, ask):
    hub.repos["someone/bare"] = TOY
    assert ask("someone/bare")[1][0].endswith("licence: none stated.")


# On this machine


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args):
        raise AssertionError("something asked the hub")

    monkeypatch.setattr(sources, "_download", refuse)


def test_paths_never_ask_the_hub(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for text in ("owner/name", f"{folder}", f' "{folder}" ', f"'{folder}'", "./owner/name", "~/owner/name"):
        assert resolve(text, print) == folder
    assert resolve("demo", print) == resolve(" demo ", print) == DEMO
    for text in ("", "nowhere", "a/b.safetensors", "a/b.ckpt", "./a/b", "../a/b", "/a/b", "a/b/c", "~/a/b", "x" * 300):
        with pytest.raises(SourceError, match="no such file or folder"):
            resolve(text, print)


def test_the_family_is_read_from_the_files():
    assert family_of(DEMO, "auto") == family_of(DEMO, "sd1") == "sd1"
    with pytest.raises(SourceError, match=r"model\.family is 'sdxl', but .* is sd1\. Set model\.family to auto"):
        family_of(DEMO, "sdxl")


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_a_folder_that_lacks_a_file_is_told(tmp_path, family):
    folder = small_models.make_folder(tmp_path / "m", family)
    assert family_of(folder, "auto") == family
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name in ("special_tokens_map.json", "tokenizer_config.json"):
            continue
        raw = path.read_bytes()
        path.unlink()
        with pytest.raises((SourceError, FormatError), match=r"missing|model_index\.json|has neither") as told:
            family_of(folder, "auto")
        assert path.name in str(told.value) or path.parent.name in str(told.value), path
        path.write_bytes(raw)
    assert family_of(folder, "auto") == family


def test_what_is_no_base_is_told(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.zeros((1, 1))}, path)
    with pytest.raises(SourceError, match=r"a LoRA .* Choose a base model of Stable Diffusion 1\.x, 2\.x, XL, 3 or 3\.5\."):
        family_of(path, "auto")


def test_weights_in_pieces_are_a_whole_model(tmp_path):
    """The names that the loaders give to weights over 10 GB, and the index beside them."""
    for name, raw in TOY.items():
        target = tmp_path / name.replace("model.safetensors", "model-00001-of-00001.safetensors")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(raw)
    assert family_of(tmp_path, "auto") == "sd1"


@pytest.fixture
def beside(monkeypatch):
    """Runs on the CPU read the denoiser by a thread, too, as those on a GPU do."""
    monkeypatch.setattr(bases, "BESIDE", ("cpu",))


def test_a_run_on_a_damaged_denoiser_ends_with_a_sentence(train, tmp_path, beside):
    base = shutil.copytree(DEMO, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file)
    with pytest.raises(RunError, match=r"base: the UNet lacks the tensor conv_out\.bias"):
        train({"model.source": str(base)})


def test_what_a_thread_reads_meanwhile_is_trained_alike(train, same, request):
    before = train({})
    request.getfixturevalue("beside")
    inside = []
    load = single_file.Place.load

    def note(place, *args, **more):
        inside.append((place.name, threading.current_thread() is threading.main_thread()))
        return load(place, *args, **more)

    with mock.patch.object(single_file.Place, "load", note):
        after = train({})
    assert sorted(inside) == [("text_encoder", True), ("unet", False), ("vae", True)]
    assert same(before.lora(), after.lora())
    assert [e["loss"] for e in before.events("step")] == [e["loss"] for e in after.events("step")]
