"""Find or make the environment, install what is missing, start. Standard library only, parses on Python 3.8.

    python launch.py [gui|demo|train|caption|test|doctor|update] [arguments] [--index-url URL]

A first start installs into `.venv` beside this file, or into the virtual or conda environment that is active.
A stamp in that environment says what was installed; while it matches, a start calls neither pip nor nvidia-smi.
A changed GPU, driver or torch index is looked at again by `update`. pip's full log is `install.log` in the environment.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
WINDOWS = os.name == "nt"
PYTHONS = ((3, 13), (3, 12), (3, 11))  # as requires-python in pyproject.toml
QUIET = {"PYTHONUTF8": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
CHILD_ENV = {**os.environ, **QUIET}
COMMANDS = {
    "gui": "open the browser front end (the default)",
    "demo": "train a small LoRA on the shipped demo images",
    "train": "train by a config file: train CONFIG",
    "caption": "write a caption beside each image of a folder: caption FOLDER",
    "test": "lint and run the tests; --full adds the slow ones; other arguments go to pytest",
    "doctor": "say what is installed, on which device, and what would be slow",
    "update": "get the newest version, look at the hardware again, reinstall within assets/constraints.txt",
}


class Stop(Exception):
    """Ends the launcher: one sentence for the user, an exit code, and for pip failures which kind (see PIP_FAILURES)."""

    def __init__(self, sentence: str, code: int = 1, kind: str = ""):
        super().__init__(sentence)
        self.code, self.kind = code, kind


def say(text: str) -> None:
    print(text, flush=True)


def ask(*command: object, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Run a command out of sight; one that can't start or takes longer than `timeout` s answers with 127 and the reason."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, cwd=str(HERE), env=CHILD_ENV, capture_output=True, text=True, errors="replace", timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 127, "", str(error))


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1]


# ---- which torch ------------------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    vendor: str  # "nvidia" or "amd"
    name: str
    capability: tuple | None = None  # NVIDIA compute capability, (8, 6); None where the driver is too old to say
    driver: tuple = ()  # (580, 65, 6)
    arch: str = ""  # AMD: "gfx1100"; empty where it can't be read


class Choice(NamedTuple):
    index_url: str | None  # None: pip's default index
    reason: str
    download_gb: float  # torch and all the rest, rounded up


class Build(NamedTuple):
    tag: str
    lowest: tuple  # compute capabilities that the build has kernels for
    highest: tuple
    driver: dict  # oldest driver, by system
    download_gb: float


WHEELS = "https://download.pytorch.org/whl/"
# Which builds torch 2.10 to 2.13 has, and their compute capabilities: "PyTorch CUDA Support Matrix" in RELEASE.md of pytorch/pytorch
# (2.12 and 2.13 by its pull requests 182849 and 187075). A kernel for x.y also runs on x.z with z > y, hence 9.9 and 12.9.
# Drivers: NVIDIA "CUDA Compatibility", minor version compatibility (13.x: 580; 12.x: 525.60.13 on Linux, 528.33 on Windows).
# First row that fits wins. Sizes are estimates from 2.9 to 2.11 wheels.
CUDA_BUILDS = (
    # Turing to Blackwell; stable in 2.11 to 2.13. cu132 is experimental there, so it is not offered.
    Build("cu130", (7, 5), (12, 9), {"Linux": (580,), "Windows": (580,)}, 3.2),
    # The legacy build: alone in keeping Maxwell, Pascal and Volta (5.0 to 7.2), and alone in running on a 12.x driver. Up to 2.14.
    Build("cu126", (5, 0), (9, 9), {"Linux": (525, 60, 13), "Windows": (528, 33)}, 3.5),
    # Blackwell on a 12.x driver: 570 is its first. Last torch is 2.11 (pytorch issue 178665), so the exact pin is given up for it.
    Build("cu128", (7, 5), (12, 9), {"Linux": (570,), "Windows": (570,)}, 3.5),
)
# ROCm 7.2 is the one that 2.12 and 2.13 have (pull request 187075), Linux x86_64 only. Architectures: PYTORCH_ROCM_ARCH in
# .ci/docker/manywheel/build.sh. Most Ryzen graphics (gfx90c, gfx1036, gfx1103) are not among them, though /dev/kfd is there.
ROCM_TAG, ROCM_GB = "rocm7.2", 5.5
ROCM_ARCHS = r"gfx9(00|06|08|0a|42|50)|gfx10(30)|gfx11(00|01|02|50|51)|gfx12(00|01)"
CPU_GB = 0.6


def default_build(system: str, machine: str) -> tuple[str, float]:
    """What torch 2.13 from pip's default index is, and the GB to download: CUDA 13.0 on Linux x86_64 (RELEASE.md), else no CUDA."""
    cuda = system == "Linux" and machine == "x86_64"
    return ("the CUDA 13.0 build", CUDA_BUILDS[0].download_gb) if cuda else ("a build without CUDA", CPU_GB)


def torch_index(system: str, machine: str, gpus: list) -> Choice:
    """The torch that fits: `system` and `machine` as platform.system() and platform.machine() say them, `gpus` a list of Gpu.

    Raises Stop where no wheel of torch >= 2.10 exists at all (Intel Mac).
    """
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
    if system == "Darwin":
        if machine == "x86_64":  # pytorch issue 114602: 2.2 was the last with macOS x86_64 wheels
            raise Stop("This is an Intel Mac: PyTorch has had no build for it since 2.2, and 2.10 is needed. Use another computer.")
        return Choice(None, "Apple silicon: the default build, with Metal (MPS).", CPU_GB)
    nvidia = [gpu for gpu in gpus if gpu.vendor == "nvidia"]
    if nvidia and system in ("Linux", "Windows"):
        return _cuda_index(system, machine, nvidia)

    cpu = Choice(WHEELS + "cpu" if system == "Linux" else None, "No GPU found that PyTorch could use: the CPU build.", CPU_GB)
    amd = [gpu for gpu in gpus if gpu.vendor == "amd"]
    if not amd:
        return cpu
    if system != "Linux" or machine != "x86_64":
        return cpu._replace(reason="An AMD GPU is there, but PyTorch's wheels have ROCm on Linux x86_64 alone: the CPU build.")
    fitting = [gpu for gpu in amd if not gpu.arch or re.fullmatch(ROCM_ARCHS, gpu.arch)]
    if not fitting:
        return cpu._replace(
            reason=f"{amd[0].name} is {amd[0].arch}, which PyTorch's ROCm build has no kernels for: the CPU build. "
            f"To try it all the same, add --index-url {WHEELS}{ROCM_TAG}."
        )
    return Choice(WHEELS + ROCM_TAG, f"{fitting[0].name}: the build for ROCm 7.2.", ROCM_GB)


def _cuda_index(system: str, machine: str, gpus: list) -> Choice:
    def runs(build, gpu):
        return gpu.capability is not None and build.lowest <= gpu.capability <= build.highest and gpu.driver >= build.driver[system]

    best = max(CUDA_BUILDS, key=lambda build: sum(runs(build, gpu) for gpu in gpus))  # the first of equals
    good = [gpu for gpu in gpus if runs(best, gpu)]
    if good:
        reason = f"{good[0].name} (compute capability {_dotted(good[0].capability)}, driver {_dotted(good[0].driver)}): {best.tag}."
        left_out = [gpu.name for gpu in gpus if gpu not in good]
        if left_out:
            reason += f" No build fits all GPUs; left out: {', '.join(left_out)}."
        is_default = best.tag == "cu130" and default_build(system, machine)[0] == "the CUDA 13.0 build"
        return Choice(None if is_default else WHEELS + best.tag, reason, best.download_gb)

    gpu = gpus[0]
    builds = [build for build in CUDA_BUILDS if gpu.capability is None or build.lowest <= gpu.capability <= build.highest]
    if builds:
        needed = _dotted(min(build.driver[system] for build in builds))
        reason = f"{gpu.name} has NVIDIA driver {_dotted(gpu.driver) or 'unknown'}; PyTorch needs {needed} or newer. "
        reason += "The CPU build for now: install a newer driver, then run `python launch.py update`."
    else:
        reason = f"{gpu.name} has compute capability {_dotted(gpu.capability)}; PyTorch's builds need 5.0 or newer: the CPU build."
    return Choice(WHEELS + "cpu" if system == "Linux" else None, reason, CPU_GB)


def _dotted(numbers: tuple) -> str:
    return ".".join(map(str, numbers))


def _numbers(text: str) -> tuple:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def find_gpus() -> list:
    """NVIDIA by nvidia-smi, AMD by the kernel's topology files (Linux) or the HIP runtime that comes with the driver (Windows)."""
    gpus = nvidia_gpus(shutil.which("nvidia-smi"))
    if platform.system() == "Linux":
        gpus += amd_gpus(Path("/"))
    elif WINDOWS and any(Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32").glob("amdhip64*.dll")):
        gpus.append(Gpu("amd", "AMD GPU"))
    return gpus


def nvidia_gpus(smi: str | None) -> list:
    if not smi:
        return []
    gpus = []
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # drivers before about 510 don't know compute_cap
        answer = ask(smi, "--query-gpu=" + fields, "--format=csv,noheader", timeout=20)
        if answer.returncode == 0:
            for row in (line.split(",") for line in answer.stdout.splitlines() if line.count(",") >= 1):
                gpus.append(Gpu("nvidia", row[0].strip(), (_numbers(row[2]) or None) if len(row) > 2 else None, _numbers(row[1])))
            return gpus
    say(f"nvidia-smi says: {last_line(answer.stdout + answer.stderr)} Going on as if there were no NVIDIA GPU.")
    return []


def amd_gpus(root: Path) -> list:
    if not (root / "dev/kfd").exists():
        return []
    gpus = []
    for file in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        found = re.search(r"^gfx_target_version (\d+)$", file.read_text(), re.M)
        number = int(found.group(1)) if found else 0  # 100300 is gfx1030, 90010 is gfx90a; 0 is a CPU
        if number:
            arch = f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}"
            gpus.append(Gpu("amd", f"AMD GPU {arch}", arch=arch))
    return gpus or [Gpu("amd", "AMD GPU")]


def index_answers(url: str, timeout: float = 4.0) -> bool:
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/torch/", timeout=timeout) as answer:
            return answer.status == 200
    except (OSError, ValueError, http.client.HTTPException):  # OSError covers refused, no such host, timeout and HTTP errors
        return False


def reachable(choice: Choice, system: str, machine: str) -> Choice:
    """The choice itself, or pip's default index where the chosen one does not answer."""
    if choice.index_url is None or index_answers(choice.index_url):
        return choice
    what, gb = default_build(system, machine.lower())
    reason = f"{choice.index_url} does not answer, so pip's default index is used, which has {what}; `update` tries again."
    return Choice(None, reason, gb)


# ---- which Python, which environment ----------------------------------------------------------------------------------------------


def ask_python(path: str) -> tuple | None:
    """(major, minor) of a 64-bit Python, None for anything else: PyTorch has no 32-bit wheels."""
    if path == sys.executable:
        return sys.version_info[:2] if sys.maxsize > 2**32 else None
    code = "import sys; print(sys.version_info[0], sys.version_info[1], sys.maxsize > 2**32)"
    words = ask(path, "-c", code, timeout=20).stdout.split()
    return (int(words[0]), int(words[1])) if words[2:] == ["True"] else None


def python_candidates() -> list:
    """The running Python, then what `py -0p` lists (Windows), then python3.13 to python3.11 on PATH."""
    found = [sys.executable]
    if WINDOWS and shutil.which("py"):
        found += parse_py_list(ask("py", "-0p", timeout=20).stdout)
    return found + [path for path in (shutil.which("python" + _dotted(version)) for version in PYTHONS) if path]


def parse_py_list(text: str) -> list:
    return re.findall(r"([A-Za-z]:\\.*?python\d*\.exe)\s*$", text, re.M | re.I)


def find_python(candidates: list, version_of=ask_python) -> str:
    """The first candidate (the running Python) if it fits, else the newest that does. Raises Stop where none does."""
    versions = {}
    for path in candidates:
        version = version_of(path)
        if version in PYTHONS:
            if path == candidates[0]:
                return path
            versions.setdefault(version, path)
    if not versions:
        raise Stop(
            f"Python {_dotted(sys.version_info[:2])} is running this, but a 64-bit Python 3.11, 3.12 or 3.13 is needed and none was found: "
            "install one from https://www.python.org/downloads/ and start again."
        )
    return versions[max(versions)]


def active_environment() -> Path | None:
    """The folder of the virtual or conda environment that runs this file, if its Python fits."""
    conda = os.environ.get("CONDA_PREFIX")
    inside = sys.prefix != sys.base_prefix or (conda and Path(conda).resolve() == Path(sys.prefix).resolve())
    return Path(sys.prefix) if inside and ask_python(sys.executable) in PYTHONS else None


def python_of(folder: Path) -> Path:
    if folder == Path(sys.prefix):
        return Path(sys.executable)
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def venv_problem(folder: Path) -> str | None:
    """Why this virtual environment can't be used, or None. Reads files only: starting its Python would cost 30 ms or more."""
    if not python_of(folder).exists():  # also a link to a Python that was removed
        return "its Python is missing"
    try:
        settings = dict(re.findall(r"^(\w+) *= *(.*?)\s*$", (folder / "pyvenv.cfg").read_text(encoding="utf-8"), re.M))
    except OSError:
        return "it has no pyvenv.cfg"
    if not Path(settings.get("home", "")).is_dir():  # on Windows the environment's python.exe stays when the real one goes
        return f"the Python it was made from, in {settings.get('home')}, is gone"
    version = settings.get("version") or settings.get("version_info") or ""
    if _numbers(version)[:2] not in PYTHONS:
        return f"it has Python {version or 'of unknown version'}, and 3.11 to 3.13 is needed"
    if not [*folder.glob("lib/python*/site-packages/pip"), *folder.glob("Lib/site-packages/pip")]:
        return "it has no pip, as if its making was cut short"
    return None


def environment() -> Path:
    """The folder to install into: the active environment, or `.venv`, made or made anew where needed."""
    active = active_environment()
    if active:
        return active
    if VENV.exists():
        problem = venv_problem(VENV)
        if problem is None:
            return VENV
        say(f"Making {VENV} anew: {problem}.")
    make_venv(find_python(python_candidates()), VENV)
    return VENV


def make_venv(python: str, folder: Path) -> None:
    say(f"Making a virtual environment in {folder} with {python}.")
    answer = ask(python, "-m", "venv", "--clear", folder)
    if answer.returncode == 0:
        return
    shutil.rmtree(str(folder), ignore_errors=True)
    said = answer.stdout + answer.stderr
    if "ensurepip" in said or "No module named venv" in said:
        package = f"python{_dotted(ask_python(python) or PYTHONS[0])}-venv"
        raise Stop(f"{python} lacks its venv module: on Debian or Ubuntu run `sudo apt install {package}`, then start again.")
    if "Permission denied" in said:
        raise Stop(f"There is no permission to write in {folder.parent}: move this folder to one that you own, then start again.")
    raise Stop(f"The virtual environment could not be made in {folder}: {last_line(said)}")


# ---- install ----------------------------------------------------------------------------------------------------------------------

PIP_FAILURES = (  # kind, what pip's error and warning lines say, the sentence
    ("disk", r"No space left on device|Errno 28|not enough space|Disk quota", "The disk is full: free some space, then start again."),
    (
        "network",
        r"NewConnectionError|NameResolution|name resolution|getaddrinfo|Connect(ion)?Timeout|ReadTimeout|ConnectionReset|"
        r"Connection (refused|broken|aborted)|unreachable|ProxyError|SSLError|CERTIFICATE_VERIFY|RemoteDisconnected",
        "pip could not reach its package index: check the network (and proxy), then start again; what was downloaded is kept.",
    ),
    ("version", r"No matching distribution|Could not find a version", "The package index lacks a version that is needed:"),
    ("permission", r"Permission denied|Access is denied|WinError 5\b", "pip may not write to the environment: check who owns it."),
)


def pip_failure(log: str) -> tuple[str, str]:
    """(kind, sentence) for pip's log of a failed install; kinds as in PIP_FAILURES, or "other"."""
    lines = [line for line in log.splitlines() if re.search("ERROR|WARNING|Error|No module named pip", line)]
    errors = [line.split("ERROR:", 1)[1].strip() for line in lines if "ERROR:" in line and line.split("ERROR:", 1)[1].strip()]
    for kind, pattern, sentence in PIP_FAILURES:
        if any(re.search(pattern, line) for line in lines):
            return kind, f"{sentence} {errors[-1]}" if kind == "version" and errors else sentence
    return "other", "pip failed: " + (errors[-1] if errors else "it left no message") + "."


def pip_install(env: Path, *arguments: str) -> None:
    """pip with its own progress bar on the screen and its full log in `install.log`. Raises Stop with `kind` set."""
    log = env / "install.log"
    before = log.stat().st_size if log.exists() else 0
    command = [str(python_of(env)), "-m", "pip", "install", "--log", str(log), *arguments]
    if subprocess.run(command, cwd=str(HERE), env=CHILD_ENV).returncode == 0:
        return
    text = log.read_bytes()[before:].decode(errors="replace") if log.exists() else ""
    kind, sentence = pip_failure(text)
    raise Stop(f"{sentence.rstrip('.')} (full log: {log}).", kind=kind)


def constraint_lines() -> list:
    lines = (HERE / "assets/constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def torch_pin() -> str:
    return next(line for line in constraint_lines() if re.match(r"torch\b", line))


def torch_range() -> str:
    return re.search(r'"(torch[<>=][^"]*)"', (HERE / "pyproject.toml").read_text(encoding="utf-8")).group(1)


def project_hash() -> str:
    """Of what the project's install depends on: the requirements, the exact versions, and the folder (it is installed in place)."""
    parts = [(HERE / name).read_bytes() for name in ("pyproject.toml", "assets/constraints.txt")] + [str(HERE).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def stamp_file(env: Path) -> Path:
    return env / "lora-atelier.json"


def read_stamp(env: Path) -> dict:
    try:
        return json.loads(stamp_file(env).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or torn: install again
        return {}


def to_install(stamp: dict, index_url: str | None, extras: set) -> set:
    """{"torch", "project"}, {"project"} or nothing. `index_url` is the user's own wish, None for none."""
    if stamp.get("torch") != torch_pin() or (index_url and stamp.get("index") != index_url):
        return {"torch", "project"}
    return set() if stamp.get("project") == project_hash() and extras <= set(stamp["extras"]) else {"project"}


def install(env: Path, index_url: str | None = None, extras: set = frozenset(), again: bool = False) -> None:
    """Bring the environment up to date, and write the stamp; `again` (update) looks at the hardware and asks pip even if it matches."""
    stamp = read_stamp(env)
    todo = {"torch", "project"} if again else to_install(stamp, index_url, extras)
    if not todo:
        return
    if not os.access(str(env), os.W_OK):
        raise Stop(f"There is no permission to write to {env}: use an environment that you own, then start again.")
    if ask(python_of(env), "-m", "pip", "--version").returncode != 0:
        raise Stop(f"{env} has no working pip: run `{python_of(env)} -m ensurepip` (with uv: `uv pip install pip`), then start again.")
    (env / "install.log").unlink(missing_ok=True)
    if env != VENV:
        say(f"Installing into the active environment, {env}.")
    new = {"torch": torch_pin(), "project": project_hash(), "extras": sorted({*extras, *stamp.get("extras", ())})}
    new["index"] = install_torch(env, index_url, stamp) if "torch" in todo else stamp["index"]
    say("Installing the project" + (f" with {', '.join(new['extras'])}." if new["extras"] else "."))
    pip_install(env, "-e", str(HERE) + (f"[{','.join(new['extras'])}]" if new["extras"] else ""), "-c", str(keep_torch(env)))
    prove_device(env)
    stamp_file(env).write_text(json.dumps(new, indent=1), encoding="utf-8")


def install_torch(env: Path, index_url: str | None, stamp: dict) -> str | None:
    """Install torch from the index that fits; returns the index used, None for pip's default."""
    system, machine = platform.system(), platform.machine()
    if index_url:
        choice = Choice(index_url, "", CPU_GB)  # what it holds is not known: the smallest
    else:
        choice = torch_index(system, machine, find_gpus())
        say(choice.reason)
        wanted, choice = choice, reachable(choice, system, machine)
        if choice is not wanted:
            say(choice.reason)
    check_disk(env, choice.download_gb)
    size = f"{'at least' if index_url else 'about'} {choice.download_gb:g} GB"
    say(f"Installing PyTorch and the rest: {size} to download, if none of it is here yet.")
    arguments = ["--index-url", choice.index_url] if choice.index_url else []
    if "index" in stamp and stamp["index"] != choice.index_url:
        arguments += ["--force-reinstall"]  # another build of the same version; pip would call it satisfied
    try:
        pip_install(env, torch_pin(), *arguments)
    except Stop as failure:
        if failure.kind != "version":
            raise
        say(f"That index has no {torch_pin()}, the version tested here; trying {torch_range()}.")
        pip_install(env, torch_range(), *arguments)
    return choice.index_url


def keep_torch(env: Path) -> Path:
    """A constraints file with the torch that is installed, so that the project's own install can't swap it for another build."""
    code = "from importlib.metadata import version; print('torch==' + version('torch'))"
    installed = ask(python_of(env), "-c", code).stdout.strip()
    file = env / "lora-atelier-constraints.txt"
    file.write_text("\n".join([installed] + [line for line in constraint_lines() if line != torch_pin()]) + "\n", encoding="utf-8")
    return file


def check_disk(folder: Path, download_gb: float) -> None:
    """Wheels unpack to about twice their size, and pip keeps the download."""
    free, needed = shutil.disk_usage(str(folder)).free / 1e9, 3 * download_gb
    if free < needed:
        raise Stop(f"{folder} has {free:.1f} GB free and the installation needs about {needed:.1f} GB: free some, then start again.")


PROOF = """
import torch
from trainer.hardware import choose
hardware = choose()
if hardware.warning: print(hardware.warning)
try:
    x = torch.ones(64, 64, device=hardware.device)
    assert (x @ x).sum().item() == 64.0 ** 3
    print(f"Device: {hardware.name} ({hardware.device}, {hardware.dtype}), checked by a matrix product.")
except RuntimeError as error:
    print(f"{hardware.name} cannot be used: {str(error).splitlines()[0]} Set the device to cpu, or update the driver.")
"""


def prove_device(env: Path) -> None:
    answer = ask(python_of(env), "-c", PROOF)
    if answer.returncode != 0:
        raise Stop(f"PyTorch is installed but does not start: {last_line(answer.stderr)}")
    say(answer.stdout.strip())


# ---- the commands -----------------------------------------------------------------------------------------------------------------


def run(env: Path, *arguments: str, cwd: Path | None = None) -> int:
    """Run the environment's Python on this terminal; its exit code. On Ctrl-C the child decides: it may want to save first."""
    child = subprocess.Popen([str(python_of(env)), *arguments], cwd=str(cwd) if cwd else None, env=CHILD_ENV)
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            continue
    if code == -signal.SIGINT:  # it had no answer of its own to Ctrl-C
        raise KeyboardInterrupt
    return code if code >= 0 else 128 - code  # a signal, as shells count it


# Chromium and its kin, all of which Playwright drives: names on PATH, then the usual places. {X} is the environment variable X.
BROWSERS = (
    "google-chrome",
    "google-chrome-stable",
    "chromium",
    "chromium-browser",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
)
BROWSER_PLACES = {
    "Windows": [
        "{" + root + "}/" + place
        for root in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
        for place in ("Google/Chrome/Application/chrome.exe", "Chromium/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
    ],
    "Darwin": [
        root + "/Applications/" + name + ".app/Contents/MacOS/" + name
        for root in ("", "{HOME}")
        for name in ("Google Chrome", "Chromium", "Microsoft Edge")
    ],
}
PLAYWRIGHT_PATH = "from playwright.sync_api import sync_playwright\nwith sync_playwright() as p: print(p.chromium.executable_path)"


def find_browser(env: Path) -> str | None:
    """A Chrome, Edge or Chromium: LORA_ATELIER_BROWSER, on PATH, in the usual places, or the one that Playwright has installed."""
    named = os.environ.get("LORA_ATELIER_BROWSER")
    if named:
        if not shutil.which(named):
            raise Stop(f"LORA_ATELIER_BROWSER is {named!r}, which is no program: name a Chrome, Edge or Chromium, or unset it.")
        return shutil.which(named)
    places = [re.sub(r"{(.*?)}", lambda m: os.environ.get(m.group(1), "/nowhere"), p) for p in BROWSER_PLACES.get(platform.system(), ())]
    playwrights = last_line(ask(python_of(env), "-c", PLAYWRIGHT_PATH, timeout=60).stdout)
    found = [shutil.which(name) for name in BROWSERS] + [place for place in (*places, playwrights) if Path(place).is_file()]
    return next((path for path in found if path), None)


def browser(env: Path) -> str:
    """A browser for the tests, installed where there is none. Raises Stop where that does not work."""
    path = find_browser(env)
    if path:
        return path
    say("The tests need a Chrome, Edge or Chromium, and none was found: installing Chromium.")
    said = ""
    apt = shutil.which("apt-get")
    if apt and hasattr(os, "geteuid") and os.geteuid() == 0:
        for words in (("update",), ("install", "-y", "chromium")):
            answer = ask(apt, *words, timeout=900)
            said = last_line(answer.stderr + answer.stdout)
    path = find_browser(env)
    if not path:
        answer = ask(python_of(env), "-m", "playwright", "install", "chromium", timeout=1800)
        said = last_line(answer.stderr + answer.stdout) if answer.returncode else said
        path = find_browser(env)
    if not path:
        raise Stop(
            f"No browser could be installed for the tests: {said.rstrip('.')}. Install Chrome, Edge or Chromium yourself, "
            "or set LORA_ATELIER_BROWSER to one, then start again."
        )
    return path


CORES = os.cpu_count() or 1
WORKERS = min(4, CORES)
PARALLEL = ("-n", str(WORKERS), "--dist", "loadscope")  # modules side by side: models of real size are in one, so one at a time


def test(env: Path, arguments: list) -> int:
    CHILD_ENV["LORA_ATELIER_BROWSER"] = browser(env)
    CHILD_ENV["OMP_NUM_THREADS"] = str(CORES // WORKERS)  # more would spin while they wait for a core that another worker holds
    full = "--full" in arguments
    arguments = [word for word in arguments if word != "--full"]
    checks = (
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("pytest", "-m", "not gpu" if full else "not gpu and not slow", *PARALLEL, *arguments),
    )
    failed = []
    for check in checks:
        say("== " + " ".join(check))
        code = run(env, "-m", *check, cwd=HERE)
        if code != 0:  # pytest's 5, no test found, is a failure too
            failed.append(check[0] + (" format" if "--check" in check else ""))
    if failed:
        raise Stop(f"Failed: {', '.join(failed)}; what and where stands above.")
    return 0


def doctor() -> int:
    """Say what is here without changing anything; 1 only where something installed does not work."""
    say(f"Python      {platform.python_version()}, {sys.executable}")
    say(f"System      {platform.platform()}")
    say(f"Free disk   {shutil.disk_usage(str(HERE)).free / 1e9:.0f} GB in {HERE}")
    env = active_environment() or VENV
    problem = None if env != VENV or not VENV.exists() else venv_problem(VENV)
    if problem:
        raise Stop(f"{VENV} is broken: {problem}; `python launch.py update` makes it anew.")
    if not read_stamp(env):
        say(f"Environment {env}: {'nothing of this project is installed in it' if env.exists() else 'not made yet'}.")
        say("Run `python launch.py demo`: it installs everything first.")
        return 0
    say(f"Environment {env}")
    answer = ask(python_of(env), "-m", "trainer", "probe")
    try:
        probe = json.loads(answer.stdout)
    except ValueError:
        why = last_line(answer.stderr)
        raise Stop(f"The installation does not work: {why}; `python launch.py update` repairs what pip can repair.") from None
    for line in doctor_lines(probe):
        say(line)
    stale = to_install(read_stamp(env), None, set())
    if stale:
        say(f"The next start installs again, because it has changed: {', '.join(sorted(stale))}.")
    return 0


def doctor_lines(probe: dict) -> list:
    """trainer.hardware.probe() for reading."""
    lines = ["Packages    " + ", ".join(f"{name} {version or '(not installed)'}" for name, version in probe["versions"].items())]
    cpu, choice = probe["cpu"], probe["choice"]
    lines += [f"CPU         {cpu['name']}, {cpu['cores']} cores"]
    lines += [f"Memory      {probe['memory_gib']:.1f} GiB, {probe['free_memory_gib']:.1f} GiB free"]
    for gpu in probe["gpus"]:
        lines += [f"GPU         {gpu['name']}, {gpu['memory_gib']:.1f} GiB, {gpu['free_gib']:.1f} GiB free, bf16: {gpu['bf16']}"]
    lines += [f"GPU         {probe['gpu_unusable'] or 'none'}"] if not probe["gpus"] else []
    lines += [f"Training on {choice['name']} ({choice['device']}), dtype {choice['dtype']}, attention {choice['attention']}"]
    lines += [f"            {reason}" for reason in choice["reasons"]]
    if probe.get("fits"):
        lines += ["What fits (rank 16 on attention and feed-forward layers, one image at a time):"] + [
            f"  - {line}" for line in probe["fits"]
        ]
    return lines + ["What would be slow, and why:"] + [f"  - {line}" for line in probe["slow"] or ["nothing that is known of"]]


def pull() -> None:
    if not (HERE / ".git").exists() or not shutil.which("git"):
        say(f"{HERE} is no git checkout, or git is missing: to update, unpack the newer version over it. Reinstalling what is here.")
        return
    answer = ask("git", "pull", "--ff-only")
    say(answer.stdout.strip())
    if answer.returncode != 0:
        raise Stop(
            f"`git pull --ff-only` failed: {last_line(answer.stderr)} Settle that in {HERE}, then run `python launch.py update` again."
        )


def main(argv: list) -> int:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--index-url", default=os.environ.get("LORA_ATELIER_TORCH_INDEX"))
    known, words = options.parse_known_args(argv)
    parser = argparse.ArgumentParser(
        prog="launch.py",
        usage=f"python launch.py [{'|'.join(COMMANDS)}] [arguments] [--index-url URL]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
        + "\n\n  --index-url URL (or LORA_ATELIER_TORCH_INDEX) installs torch from there.",
    )
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["gui", *words]  # as without any word
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="gui", help=argparse.SUPPRESS)
    command, arguments = parser.parse_args(words[:1]).command, words[1:]
    if command in ("doctor", "update") and arguments:
        parser.error(f"{command} takes no arguments, and {arguments[0]!r} was given")

    if command == "doctor":
        return doctor()
    if command == "update":
        pull()
    env = environment()
    install(env, known.index_url, {"test"} if command == "test" else set(), again=command == "update")
    if command == "update":
        say("Up to date.")
        return 0
    if command == "test":
        return test(env, arguments)
    module = {"gui": ["app"], "demo": ["trainer.demo.run"], "train": ["trainer", "train"], "caption": ["trainer", "caption"]}[command]
    return run(env, "-m", *module, *arguments)


def guarded(argv: list) -> int:
    """main(), with every failure that a user can meet turned into one sentence and an exit code."""
    try:
        return main(argv)
    except Stop as stop:
        sentence, code = str(stop), stop.code
    except KeyboardInterrupt:
        sentence, code = "\nStopped. Run the same command again to go on.", 130
    except PermissionError as error:
        sentence, code = f"There is no permission to write {error.filename}: move this folder to one that you own, then start again.", 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sentence, code = "The disk is full: free some space, then start again.", 1
    print(sentence, file=sys.stderr, flush=True)
    return code


def opened_by_double_click() -> bool:
    """Windows closes the window with the program if nothing but Python (and py.exe) shares its console."""
    if not WINDOWS:
        return False
    import ctypes

    return ctypes.windll.kernel32.GetConsoleProcessList((ctypes.c_uint * 8)(), 8) <= 2


if __name__ == "__main__":
    code = guarded(sys.argv[1:])
    if code and opened_by_double_click():
        input("Press Enter to close this window.")
    sys.exit(code)
