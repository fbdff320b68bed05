"""launch.py: which torch, which Python, which environment, when to install, and the sentence that each failure ends in."""

import ast
import ctypes
import errno
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
launch = importlib.util.module_from_spec(spec)
sys.modules["launch"] = launch
spec.loader.exec_module(launch)

posix = pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for a program")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of what launch.py reads, taken for the project's folder."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "assets").mkdir()
    shutil.copy(ROOT / "assets/constraints.txt", tmp_path / "assets")
    monkeypatch.setattr(launch, "HERE", tmp_path)
    monkeypatch.setattr(launch, "VENV", tmp_path / ".venv")
    return tmp_path


# ---- which torch ------------------------------------------------------------------------------------------------------------------


def nvidia(name, capability, driver):
    return launch.Gpu("nvidia", name, capability, driver)


GTX1080 = nvidia("GTX 1080", (6, 1), (580, 65))
RTX3060_OLD = nvidia("RTX 3060", (8, 6), (552, 22))
RTX3060_NEW = nvidia("RTX 3060", (8, 6), (580, 65, 6))
RTX5090 = nvidia("RTX 5090", (12, 0), (581, 15))


@pytest.mark.parametrize(
    ("system", "machine", "gpus", "index", "words"),
    [
        ("Linux", "x86_64", [], "cpu", "No GPU"),
        ("Windows", "AMD64", [], None, "No GPU"),
        ("Linux", "aarch64", [], "cpu", "No GPU"),
        ("Darwin", "arm64", [], None, "Metal"),
        ("Linux", "x86_64", [GTX1080], "cu126", "6.1"),
        ("Windows", "AMD64", [GTX1080], "cu126", "6.1"),
        ("Linux", "x86_64", [nvidia("V100", (7, 0), (580, 65))], "cu126", "V100"),
        ("Linux", "x86_64", [RTX3060_NEW], None, "cu130"),  # pip's default index has that very build
        ("Windows", "AMD64", [RTX3060_NEW], "cu130", "cu130"),
        ("Linux", "aarch64", [nvidia("GH200", (9, 0), (580, 65))], "cu130", "GH200"),
        ("Linux", "x86_64", [RTX3060_OLD], "cu126", "552.22"),
        ("Windows", "AMD64", [RTX3060_OLD], "cu126", "552.22"),
        ("Linux", "x86_64", [nvidia("RTX 4090", (8, 9), (525, 60, 13))], "cu126", "RTX 4090"),
        ("Windows", "AMD64", [nvidia("RTX 4090", (8, 9), (527, 41))], None, "528.33"),
        ("Linux", "x86_64", [RTX5090], None, "cu130"),
        ("Windows", "AMD64", [RTX5090], "cu130", "12.0"),
        ("Windows", "AMD64", [nvidia("RTX 5090", (12, 0), (572, 16))], "cu128", "572.16"),
        ("Linux", "x86_64", [nvidia("RTX 2080", (7, 5), (470, 82))], "cpu", "525.60.13 or newer"),
        ("Linux", "x86_64", [nvidia("RTX 2080", None, (470, 82))], "cpu", "470.82"),
        ("Linux", "x86_64", [nvidia("GTX 780", (3, 5), (470, 82))], "cpu", "5.0 or newer"),
        ("Linux", "x86_64", [GTX1080, GTX1080, RTX5090], "cu126", "left out: RTX 5090"),
        ("Linux", "x86_64", [launch.Gpu("amd", "RX 7900", arch="gfx1100")], "rocm7.2", "RX 7900"),
        ("Linux", "x86_64", [launch.Gpu("amd", "AMD GPU")], "rocm7.2", "AMD"),
        ("Linux", "x86_64", [launch.Gpu("amd", "Ryzen", arch="gfx1036")], "cpu", "no kernels"),
        ("Windows", "AMD64", [launch.Gpu("amd", "AMD GPU")], None, "Linux x86_64 alone"),
    ],
)
def test_torch_index(system, machine, gpus, index, words):
    choice = launch.torch_index(system, machine, gpus)
    assert choice.index_url == (index and "https://download.pytorch.org/whl/" + index)
    assert words in choice.reason
    assert 0.3 < choice.download_gb < 8


def test_an_intel_mac_is_refused():
    with pytest.raises(launch.Stop, match="Intel Mac"):
        launch.torch_index("Darwin", "x86_64", [])


@posix
def test_nvidia_smi_is_read(tmp_path, capsys):
    def smi(script):
        file = tmp_path / "nvidia-smi"
        file.write_text("#!/bin/sh\n" + script)
        file.chmod(0o755)
        return launch.nvidia_gpus(str(file))

    assert smi('echo "NVIDIA GeForce RTX 3060, 580.65.06, 8.6"') == [nvidia("NVIDIA GeForce RTX 3060", (8, 6), (580, 65, 6))]
    old = 'case "$1" in *compute_cap*) echo "Field is not valid"; exit 2;; esac; echo "Quadro K2000, 470.82"'
    assert smi(old) == [nvidia("Quadro K2000", None, (470, 82))]
    assert smi('echo "Driver/library version mismatch"; exit 18') == []
    assert "Driver/library version mismatch" in capsys.readouterr().out
    assert launch.nvidia_gpus(None) == []


def test_amd_gpus_are_read_from_the_kernel(tmp_path):
    assert launch.amd_gpus(tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert launch.amd_gpus(tmp_path) == [launch.Gpu("amd", "AMD GPU")]
    for node, number in enumerate((0, 110000, 90010)):
        file = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{node}/properties"
        file.parent.mkdir(parents=True)
        file.write_text(f"cpu_cores_count 0\ngfx_target_version {number}\nvendor_id 4098\n")
    assert [gpu.arch for gpu in launch.amd_gpus(tmp_path)] == ["gfx1100", "gfx90a"]


def test_an_index_that_answers_is_kept_and_others_fall_back():
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/cpu/torch/" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    good = launch.Choice(url + "/cpu", "a reason", 0.6)
    assert launch.reachable(good, "Linux", "x86_64") is good
    assert not launch.index_answers(url + "/absent")
    server.shutdown()
    server.server_close()

    fallback = launch.reachable(good, "Linux", "x86_64")  # the port is closed now
    assert fallback.index_url is None and "does not answer" in fallback.reason and url in fallback.reason
    assert fallback.download_gb > 2, "pip's default build on Linux x86_64 is CUDA's, and its size has to be said"
    assert launch.reachable(good, "Windows", "AMD64").download_gb == launch.CPU_GB


def test_an_index_that_never_answers_is_given_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not launch.index_answers(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)


# ---- which Python, which environment ----------------------------------------------------------------------------------------------


def test_the_running_python_wins_if_it_fits_else_the_newest_that_does():
    versions = {"run": (3, 11), "new": (3, 13), "mid": (3, 12), "old": (3, 9), "too new": (3, 14), "32 bit": None}
    assert launch.find_python(["run", "new"], versions.get) == "run"
    assert launch.find_python(["old", "mid", "new", "too new", "32 bit"], versions.get) == "new"
    with pytest.raises(launch.Stop, match=r"3\.11, 3\.12 or 3\.13 is needed.*python\.org/downloads"):
        launch.find_python(["old", "too new", "32 bit"], versions.get)


@posix
def test_a_python_is_asked_for_its_version(tmp_path):
    fake = tmp_path / "python3.12"
    fake.write_text("#!/bin/sh\necho 3 12 True\n")
    fake.chmod(0o755)
    assert launch.ask_python(str(fake)) == (3, 12)
    fake.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2; exit 127\n")
    assert launch.ask_python(str(fake)) is None
    assert launch.ask_python(str(tmp_path / "absent")) is None


def test_the_windows_launcher_list_is_read():
    listed = " -V:3.13 *        C:\\Users\\A B\\Python313\\python.exe\n -3.9-64  C:\\Python39\\python.exe\nNo other\n"
    assert launch.parse_py_list(listed) == ["C:\\Users\\A B\\Python313\\python.exe", "C:\\Python39\\python.exe"]


@pytest.fixture(scope="module")
def real_venv(tmp_path_factory):
    """The one real environment of these tests (about 5 s), with nothing in it."""
    folder = tmp_path_factory.mktemp("real") / ".venv"
    launch.make_venv(getattr(sys, "_base_executable", sys.executable), folder)
    return folder


def test_a_broken_environment_is_recognised(real_venv):
    assert launch.venv_problem(real_venv) is None
    settings = real_venv / "pyvenv.cfg"
    good = settings.read_text()
    settings.write_text("home = /nowhere/at/all\nversion = 3.12.1\n")
    assert "is gone" in launch.venv_problem(real_venv)
    settings.write_text(f"home = {real_venv}\nversion = 3.9.2\n")
    assert "3.9.2" in launch.venv_problem(real_venv)
    settings.write_text(good)
    pip = next(real_venv.rglob("site-packages/pip"))
    pip.rename(pip.with_name("away"))
    assert "no pip" in launch.venv_problem(real_venv)
    pip.with_name("away").rename(pip)
    assert "Python is missing" in launch.venv_problem(real_venv / "absent")


def test_a_broken_environment_is_made_anew_saying_so(folder, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(launch, "active_environment", lambda: None)
    monkeypatch.setattr(launch, "make_venv", lambda python, where: made.append(where))
    (folder / ".venv").mkdir()
    assert launch.environment() == folder / ".venv"
    assert made == [folder / ".venv"]
    assert "anew: its Python is missing" in capsys.readouterr().out


@posix
@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("The virtual environment was not created: ensurepip is not available", "apt install python3.12-venv"),
        ("/usr/bin/python3: No module named venv", "apt install python3.12-venv"),
        ("Error: [Errno 13] Permission denied: '/x/.venv'", "no permission"),
        ("something else", "could not be made in .*: something else"),
    ],
)
def test_a_failing_venv_ends_in_a_sentence(tmp_path, said, sentence):
    fake = tmp_path / "python3.12"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo 3 12 True; else mkdir -p {tmp_path}/.venv; echo "{said}"; exit 1; fi\n')
    fake.chmod(0o755)
    with pytest.raises(launch.Stop, match=sentence):
        launch.make_venv(str(fake), tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists(), "half an environment would be taken for a whole one"


# ---- install ----------------------------------------------------------------------------------------------------------------------


def test_real_pip_failures_end_in_a_sentence(real_venv, monkeypatch):
    clean = {name: value for name, value in launch.CHILD_ENV.items() if not name.startswith("PIP_")}
    monkeypatch.setattr(launch, "CHILD_ENV", {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
    with pytest.raises(launch.Stop, match="check the network") as network:
        launch.pip_install(real_venv, "torch==2.13.0", "--index-url", url, "--retries", "1")
    assert network.value.kind == "network" and str(real_venv / "install.log") in str(network.value)
    with pytest.raises(launch.Stop, match="lacks a version") as version:  # the network's lines above stand in the same log
        launch.pip_install(real_venv, "torch==2.13.0", "--no-index")
    assert version.value.kind == "version"


@pytest.mark.parametrize(
    ("log", "kind", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk", "disk is full"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution found", "network", "network"),
        ("socket.gaierror\npip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.", "network", "network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "version", "torch==2.13.0"),
        ("ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied", "permission", "who owns it"),
        ("  Downloading unreachable-1.0.whl\nERROR: Failed building wheel for x", "other", "Failed building wheel for x"),
        ("", "other", "no message"),
    ],
)
def test_pip_failure(log, kind, words):
    found, sentence = launch.pip_failure(log)
    assert found == kind and words in sentence


def test_too_little_disk_is_said_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 2 * 10**9, 2 * 10**9))
    launch.check_disk(tmp_path, 0.6)
    with pytest.raises(launch.Stop, match=r"2\.0 GB free and the installation needs about 10\.5 GB"):
        launch.check_disk(tmp_path, 3.5)


@pytest.fixture
def installer(folder, monkeypatch):
    """install() with everything that leaves the folder recorded in place of done. `absent` holds what the index has not."""
    calls, absent, env = [], set(), folder / ".venv"
    env.mkdir()

    def pip_install(_, *arguments):
        calls.append(arguments)
        if arguments[0] in absent:
            raise launch.Stop("not there", kind="version")

    monkeypatch.setattr(launch, "pip_install", pip_install)
    monkeypatch.setattr(launch, "ask", lambda *command, **_: subprocess.CompletedProcess(command, 0, "torch==2.13.0+cpu\n", ""))
    monkeypatch.setattr(launch, "find_gpus", lambda: [])
    monkeypatch.setattr(launch, "index_answers", lambda *_: True)
    monkeypatch.setattr(launch, "check_disk", lambda *_: None)
    monkeypatch.setattr(launch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(launch.platform, "machine", lambda: "x86_64")

    def install(**wishes):
        calls.clear()
        launch.install(env, **wishes)
        return [call[0] for call in calls]

    install.calls, install.absent, install.env = calls, absent, env
    return install


def test_what_is_stamped_is_not_installed_again(installer, folder):
    project = f"-e {folder}".split()[0]
    assert installer() == ["torch==2.13.0", project]
    assert installer.calls[0] == ("torch==2.13.0", "--index-url", "https://download.pytorch.org/whl/cpu")
    assert installer.calls[1][1] == str(folder)
    assert installer() == []

    pyproject = folder / "pyproject.toml"
    pyproject.write_text(pyproject.read_text() + "\n# changed\n")
    assert installer() == [project]
    assert installer() == []
    assert installer(extras={"test"}) == [project]
    assert installer.calls[0][1] == f"{folder}[test]"
    assert installer() == installer(extras={"test"}) == []
    assert installer(again=True) == ["torch==2.13.0", project]
    assert "--force-reinstall" not in installer.calls[0] and installer.calls[1][1] == f"{folder}[test]"

    constraints = folder / "assets/constraints.txt"
    constraints.write_text(constraints.read_text().replace("torch==2.13.0", "torch==2.13.1"))
    assert installer() == ["torch==2.13.1", project]
    launch.stamp_file(installer.env).write_text('{"torch": ')
    assert installer() == ["torch==2.13.1", project]


def test_the_projects_own_install_keeps_the_build_of_torch(installer):
    installer()
    lines = Path(installer.calls[1][3]).read_text().splitlines()
    assert [line for line in lines if line.startswith("torch")] == ["torch==2.13.0+cpu"]
    assert "diffusers==0.42.1" in lines


def test_an_index_without_the_tested_version_may_give_another(installer, capsys):
    installer.absent.add("torch==2.13.0")
    assert installer()[:2] == ["torch==2.13.0", "torch>=2.10,<2.14"]
    assert "has no torch==2.13.0" in capsys.readouterr().out


def test_the_users_index_is_used_as_it_is_and_another_build_replaces_the_first(installer, monkeypatch, capsys):
    installer()
    monkeypatch.setattr(launch, "index_answers", lambda *_: pytest.fail("the user's index is not asked"))
    installer(index_url="https://mirror.example/whl")
    assert installer.calls[0] == ("torch==2.13.0", "--index-url", "https://mirror.example/whl", "--force-reinstall")
    assert installer(index_url="https://mirror.example/whl") == installer() == []
    assert "at least 0.6 GB" in capsys.readouterr().out


def test_an_environment_without_pip_or_rights_ends_in_a_sentence(installer, monkeypatch):
    monkeypatch.setattr(launch, "ask", lambda *command, **_: subprocess.CompletedProcess(command, 1, "", "No module named pip"))
    with pytest.raises(launch.Stop, match=r"no working pip.*ensurepip"):
        installer()
    monkeypatch.setattr(launch.os, "access", lambda *_: False)
    with pytest.raises(launch.Stop, match="no permission to write"):
        installer()


def test_torch_that_does_not_start_is_said_and_not_stamped(installer, monkeypatch):
    def ask(*command, **_):
        broken = launch.PROOF in command
        return subprocess.CompletedProcess(command, int(broken), "torch==2.13.0", "Traceback\nOSError: [WinError 126] c10.dll\n")

    monkeypatch.setattr(launch, "ask", ask)
    with pytest.raises(launch.Stop, match=r"does not start: OSError: \[WinError 126\] c10.dll"):
        installer()
    assert not launch.stamp_file(installer.env).exists()


def test_every_requirement_has_a_constraint_that_it_allows():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.version import Version

    pinned = dict(line.split("==") for line in launch.constraint_lines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        if requirement.name == "triton":
            continue  # torch's builds for CUDA say which one they take
        assert requirement.specifier.contains(Version(pinned[requirement.name])), text
    assert launch.torch_range() in project["dependencies"]


# ---- the commands -----------------------------------------------------------------------------------------------------------------


def started(folder, *arguments):
    """launch.py alone in a folder, run by a Python outside of any environment."""
    shutil.copy(ROOT / "launch.py", folder)
    python = getattr(sys, "_base_executable", sys.executable)
    env = {name: value for name, value in os.environ.items() if name not in ("CONDA_PREFIX", "VIRTUAL_ENV")}
    return subprocess.run([python, "launch.py", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_doctor_on_an_empty_folder(tmp_path):
    answer = started(tmp_path, "doctor")
    assert answer.returncode == 0 and answer.stderr == ""
    assert "not made yet" in answer.stdout and "Run `python launch.py demo`" in answer.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launch.py"], "doctor changes nothing"


def test_doctor_on_a_broken_environment(tmp_path):
    (tmp_path / ".venv").mkdir()
    answer = started(tmp_path, "doctor")
    assert answer.returncode == 1 and "is broken: its Python is missing" in answer.stderr


def test_an_unknown_command_is_refused(tmp_path):
    unknown = started(tmp_path, "trian")
    assert unknown.returncode == 2 and "invalid choice: 'trian'" in unknown.stderr and "Traceback" not in unknown.stderr
    extra = started(tmp_path, "doctor", "--all")
    assert extra.returncode == 2 and "doctor takes no arguments" in extra.stderr


def test_the_file_parses_on_an_old_python():
    ast.parse((ROOT / "launch.py").read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["train", "a.toml", "--help"], ["-m", "trainer", "train", "a.toml", "--help"]),
        (["demo", "--steps", "3"], ["-m", "trainer.demo.run", "--steps", "3"]),
        (["--index-url", "https://mirror.example", "train", "x"], ["-m", "trainer", "train", "x"]),
        ([], ["-m", "app"]),
        (["gui", "--port", "80"], ["-m", "app", "--port", "80"]),
        (["--port", "80"], ["-m", "app", "--port", "80"]),
        (["gui", "--listen", "--no-browser"], ["-m", "app", "--listen", "--no-browser"]),
    ],
)
def test_commands_pass_their_arguments_and_exit_code_on(folder, monkeypatch, command, expected):
    wishes = []
    monkeypatch.setattr(launch, "environment", lambda: folder / ".venv")
    monkeypatch.setattr(launch, "install", lambda env, url, extras, again: wishes.append(url))
    monkeypatch.setattr(launch, "run", lambda env, *arguments: 7 if list(arguments) == expected else 99)
    assert launch.main(command) == 7
    assert wishes == ["https://mirror.example" if "--index-url" in command else None]


def test_a_childs_exit_code_is_handed_on():
    here = Path(sys.prefix)
    assert launch.run(here, "-c", "import os; raise SystemExit(3 if os.environ['PYTHONUTF8'] == '1' else 4)") == 3
    if os.name == "posix":
        assert launch.run(here, "-c", "import os; os.kill(os.getpid(), 15)") == 128 + 15
        with pytest.raises(KeyboardInterrupt):
            launch.run(here, "-c", "import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)")


@posix
def test_ctrl_c_leaves_the_decision_to_the_child(tmp_path):
    """The child gets the same Ctrl-C and may save before it ends: here it takes 0.5 s and ends with 9."""
    child = "import time\ntry:\n print('up', flush=True); time.sleep(30)\nexcept KeyboardInterrupt:\n time.sleep(0.5); raise SystemExit(9)"
    code = f"import sys, launch; from pathlib import Path; sys.exit(launch.run(Path(sys.prefix), '-c', {child!r}))"
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests that run in the background inherit it as ignored
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True, preexec_fn=heard)
    assert parent.stdout.readline() == b"up\n"
    os.killpg(parent.pid, 2)
    assert parent.wait(timeout=20) == 9
    parent.stdout.close()


def test_the_test_command_fails_if_anything_does(folder, monkeypatch):
    ran, codes = [], {}

    def run(env, _, tool, *arguments, cwd):
        ran.append([tool, *arguments])
        return codes.get(tool, 0)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "browser", lambda env: "/usr/bin/some-browser")
    monkeypatch.setattr(launch, "CHILD_ENV", {})
    assert launch.test(folder, ["--full", "-x"]) == 0
    assert {"LORA_ATELIER_BROWSER": "/usr/bin/some-browser", "OMP_NUM_THREADS": str(launch.CORES // launch.WORKERS)} == launch.CHILD_ENV
    assert ran == [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pytest", "-m", "not gpu", *launch.PARALLEL, "-x"]]
    codes["pytest"] = 5  # no test found
    with pytest.raises(launch.Stop, match="Failed: pytest"):
        launch.test(folder, [])
    assert ran[-1][:3] == ["pytest", "-m", "not gpu and not slow"]


@pytest.fixture
def no_browser(tmp_path, monkeypatch):
    """A machine without a browser: nothing on PATH but what is put into `bin`, no usual place, no Playwright. Returns `bin`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("LORA_ATELIER_BROWSER", raising=False)
    for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(launch.platform, "system", lambda: "Windows")
    monkeypatch.setattr(launch, "python_of", lambda env: "no-python")
    return programs


def program(path, script="true"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@posix
def test_a_browser_is_found_on_path_in_its_usual_place_or_as_named(no_browser, tmp_path, monkeypatch):
    assert launch.find_browser(tmp_path) is None
    usual = program(tmp_path / "PROGRAMFILES(X86)/Microsoft/Edge/Application/msedge.exe")
    assert launch.find_browser(tmp_path) == usual
    on_path = program(no_browser / "chromium")
    assert launch.find_browser(tmp_path) == on_path
    monkeypatch.setattr(launch.platform, "system", lambda: "Darwin")
    Path(on_path).unlink()
    mac = program(tmp_path / "HOME/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    if not any(Path(f"/Applications/{name}.app").exists() for name in ("Google Chrome", "Chromium", "Microsoft Edge")):
        assert launch.find_browser(tmp_path) == mac
    monkeypatch.setenv("LORA_ATELIER_BROWSER", usual)
    assert launch.find_browser(tmp_path) == usual
    monkeypatch.setenv("LORA_ATELIER_BROWSER", "/nowhere/chrome")
    with pytest.raises(launch.Stop, match=r"LORA_ATELIER_BROWSER is '/nowhere/chrome', which is no program"):
        launch.find_browser(tmp_path)


@posix
def test_playwrights_own_browser_is_found_and_installed_where_there_is_none(no_browser, tmp_path, monkeypatch, capsys):
    chrome = tmp_path / "cache/chrome"
    install = f"mkdir -p {chrome.parent}; : > {chrome}; echo done"
    python = program(tmp_path / "python", f'PATH=/usr/bin:/bin; if [ "$2" = playwright ]; then {install}; else echo {chrome}; fi')
    monkeypatch.setattr(launch, "python_of", lambda env: python)
    assert launch.browser(tmp_path) == str(chrome)
    assert "installing Chromium" in capsys.readouterr().out
    assert launch.browser(tmp_path) == str(chrome)
    assert capsys.readouterr().out == "", "a browser that is there is not installed again"


@posix
def test_apt_installs_a_browser_for_root_and_a_failure_ends_in_a_sentence(no_browser, tmp_path, monkeypatch):
    apt = f'echo "$1" >> {tmp_path}/asked; if [ "$1" = install ]; then : > {no_browser}/chromium; /bin/chmod +x {no_browser}/chromium; fi'
    program(no_browser / "apt-get", apt)
    monkeypatch.setattr(launch.os, "geteuid", lambda: 1000)
    with pytest.raises(launch.Stop, match=r"No browser could be installed for the tests: .+ Install Chrome, Edge or Chromium yourself"):
        launch.browser(tmp_path)
    assert not (tmp_path / "asked").exists()
    monkeypatch.setattr(launch.os, "geteuid", lambda: 0)
    assert launch.browser(tmp_path) == f"{no_browser}/chromium"
    assert (tmp_path / "asked").read_text() == "update\ninstall\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (launch.Stop("A sentence."), 1, "A sentence."),
        (KeyboardInterrupt(), 130, "Stopped. Run the same command again to go on."),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/.venv"), 1, "no permission to write /x/.venv"),
    ],
)
def test_failures_end_in_a_sentence_and_a_code(monkeypatch, capsys, error, code, words):
    def main(_):
        raise error

    monkeypatch.setattr(launch, "main", main)
    assert launch.guarded([]) == code
    assert words in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_pull_that_fails_is_said(folder, capsys):
    launch.pull()
    assert "no git checkout" in capsys.readouterr().out
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    with pytest.raises(launch.Stop, match=r"git pull --ff-only` failed: .+ Settle that in"):
        launch.pull()


@pytest.mark.parametrize(("processes", "double_click"), [(1, True), (2, True), (3, False)])
def test_a_double_clicked_window_is_told_from_a_console(monkeypatch, processes, double_click):
    kernel32 = types.SimpleNamespace(GetConsoleProcessList=lambda buffer, size: processes)
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(launch, "WINDOWS", True)
    assert launch.opened_by_double_click() is double_click
    monkeypatch.setattr(launch, "WINDOWS", False)
    assert launch.opened_by_double_click() is False


def test_the_stamp_is_read_as_it_was_written(tmp_path):
    launch.stamp_file(tmp_path).write_text(json.dumps({"torch": "torch==2.13.0"}))
    assert launch.read_stamp(tmp_path) == {"torch": "torch==2.13.0"}
    assert launch.read_stamp(tmp_path / "absent") == {}
