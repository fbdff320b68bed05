"""Where a base comes from. The hub is played by a server on this machine; the real one is never asked."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from trainer.families import sources
from trainer.families.sources import DEMO, SourceError, family_of, resolve

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
    down: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """Files whose content was sent since the last call."""
        found = [m[1] for line in self.asked if (m := re.fullmatch(rf"GET .+/resolve/{COMMIT}/(.+)", line))]
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


@pytest.fixture
def ask(hub, tmp_path):
    """ask(source): (path or None, what was said before, the error's sentence), by a process that knows no other hub than ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and not k.lower().endswith("_proxy")}

    def go(source: str, **more: str):
        environment = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", **more}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, source], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
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
    models = family.load(path, torch.float32, torch.device("cpu"), "auto", "sdpa")
    ours = family.load(DEMO, torch.float32, torch.device("cpu"), "auto", "sdpa")
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


def test_repositories_that_cannot_be_used(hub, ask):
    half = {n.replace("model.safetensors", "model.fp16.safetensors"): b for n, b in TOY.items()}
    hub.repos |= {
        "someone/loras": {"toy.safetensors": b"x", "README.md": b""},
        "someone/half": half,
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
        "someone/half": ["'someone/half'", "fp16.safetensors is not read", "Choose a model"],
        "someone/pickles": ["'someone/pickles'", ".bin is a pickle", "Choose a model"],
    }
    for repo, words in expected.items():
        path, said, error = ask(repo)
        assert path is None and all(w in error for w in words), (repo, error)
        assert bool(said) == (repo == "someone/terms") and hub.fetched() == []


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
    hub.gated = {"someone/toy"}
    _, (said,), _ = ask("someone/toy")
    assert said == "Downloading someone/toy from huggingface.co: about 4.2 GB, licence: mit."


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


def test_weights_in_pieces_are_a_whole_model(tmp_path):
    """The names that the loaders give to weights over 10 GB, and the index beside them."""
    for name, raw in TOY.items():
        target = tmp_path / name.replace("model.safetensors", "model-00001-of-00001.safetensors")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(raw)
    assert family_of(tmp_path, "auto") == "sd1"
