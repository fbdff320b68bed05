"""Trainer processes under the app: real ones on the demo base, that are killed, queued, stopped and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app import runner as module
from app import settings as app_settings
from app.errors import Problem
from app.paths import Home
from app.run_reader import last_event
from app.runner import LIVE, Runner, read_json
from trainer import events
from trainer.config.load import validate
from trainer.run_dir import Lock, RunDir

ROOT = Path(__file__).resolve().parents[2]
LONG = {"train.visits": 4000, "output.checkpoint_every": 2}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    app_settings.save(home, {"run_folders": [str(tmp_path / "elsewhere")]})
    return home


@pytest.fixture
def run_in(settings):
    """run_in(folder, changes): a run's folder as the app makes it."""

    def make(folder: Path, changes: dict | None = None) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(validate(settings(changes)).model_dump_json(), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def runner(home, monkeypatch):
    """A runner that is not watched by a thread: the tests call tick. Comparisons are left out."""
    monkeypatch.setattr(Runner, "_compare", lambda self, folder: None)
    runner = Runner(home)
    yield runner
    for folder in runner.folders():
        runner.kill(folder, grace=0)


def words(folder: Path, *more: str) -> list[str]:
    return ["train", "--run-dir", str(folder), *more]


def wait(runner: Runner, folder: Path, *states: str, seconds: float = 120) -> str:
    deadline = time.monotonic() + seconds
    while (state := runner.state(folder)) not in states:
        assert time.monotonic() < deadline, f"{folder.name} is {state}, not {states}; log:\n{(folder / 'log.txt').read_text()}"
        runner.tick()
        time.sleep(0.1)
    return state


def wait_step(runner: Runner, folder: Path, kind: str = "checkpoint") -> None:
    deadline = time.monotonic() + 120
    while not any(e["type"] == kind for e in events.read(folder / "events.jsonl")):
        assert time.monotonic() < deadline and runner.state(folder) in (*LIVE, "waiting"), (folder / "log.txt").read_text()
        runner.tick()
        time.sleep(0.1)


def kinds(folder: Path) -> list[str]:
    return [e["type"] for e in events.read(folder / "events.jsonl")]


@pytest.mark.slow
def test_two_runs_one_after_the_other_while_the_app_is_started_anew(home, runner, run_in):
    first, second = run_in(home.runs / "first", {"train.visits": 8}), run_in(home.runs / "second")
    assert runner.state(first) == "none"
    assert [runner.submit("train", f, words(f)) for f in (first, second)] == [0, 1]
    assert (runner.state(first), runner.state(second)) == ("waiting", "waiting")
    runner.tick()
    assert (runner.state(first), runner.state(second)) == ("starting", "waiting")
    launch = read_json(first / "launch.json")
    process = psutil.Process(launch["pid"])
    assert process.nice() >= 10 and process.pid == os.getpgid(process.pid)
    assert wait(runner, first, "running") == "running"

    again = Runner(home)  # the app's process was killed; this is its next life
    again.reconcile()
    again.tick()
    assert (again.state(first), again.state(second)) == ("running", "waiting")
    assert [folder for folder, _ in again.busy()] == [first]
    assert wait(again, second, "finished") == "finished"
    assert again.state(first) == "finished" and again.jobs.list() == [] and again.busy() == []
    ends = [list(events.read(f / "events.jsonl")) for f in (first, second)]
    assert ends[1][0]["time"] >= ends[0][-1]["time"]
    assert (first / "lora.safetensors").exists() and (second / "lora.safetensors").exists()
    assert not (second / "waiting.json").exists()
    assert "Finished" in (second / "log.txt").read_text(encoding="utf-8")
    deadline = time.monotonic() + 30
    while runner._children or again._children:  # reaped, not left behind as zombies
        assert time.monotonic() < deadline
        runner.tick()
        again.tick()
        time.sleep(0.1)
    assert not psutil.pid_exists(launch["pid"])


@pytest.mark.slow
def test_a_killed_trainer_is_interrupted_and_can_be_resumed(home, runner, run_in):
    run = run_in(home.runs / "killed", {"train.visits": 30, "output.checkpoint_every": 2})
    runner.submit("train", run, words(run))
    runner.tick()
    wait_step(runner, run)
    os.kill(read_json(run / "launch.json")["pid"], signal.SIGKILL)
    assert wait(runner, run, "interrupted", "finished") == "interrupted"
    assert "without a word" in runner.look(run).text
    assert Runner(home).state(run) == "interrupted"
    with pytest.raises(Problem, match="not running"):
        runner.request(run, "stop")

    runner.submit("train", run, words(run, "--resume"))
    assert runner.state(run) == "waiting"
    runner.tick()
    assert runner.state(run) in LIVE
    assert wait(runner, run, "finished", "failed") == "finished"
    assert kinds(run).count("resumed") == 1 and (run / "lora.safetensors").exists()


@pytest.mark.slow
def test_a_stop_asked_for_while_it_starts_is_heeded_also_when_it_resumes(home, runner, run_in):
    run = run_in(home.runs / "stopped", LONG)
    for more in ([], ["--resume"]):
        runner.submit("train", run, words(run, *more))
        runner.tick()
        assert runner.state(run) == "starting"
        runner.request(run, "stop")
        assert runner.pending(run) == ["stop"]
        assert wait(runner, run, "stopped", "finished", "failed") == "stopped"
        assert runner.pending(run) == []
    assert kinds(run).count("stopped") == 2


@pytest.mark.slow
def test_what_is_asked_of_a_running_one(home, runner, run_in):
    run = run_in(home.runs / "asked", LONG)
    runner.submit("train", run, words(run))
    runner.tick()
    wait_step(runner, run)
    with pytest.raises(Problem, match="is running"):
        runner.submit("train", run, words(run, "--resume"))
    with pytest.raises(Problem, match="prompts"):
        runner.request(run, "prompts", {"prompts": []})
    runner.request(run, "save")
    wait_step(runner, run, "exported")
    runner.cancel(run)
    assert wait(runner, run, "stopped", "finished") == "stopped"


def test_kill_ends_the_process_and_what_it_started(home, runner, run_in):
    run = run_in(home.runs / "ended", LONG)
    runner.submit("train", run, words(run))
    runner.tick()
    wait(runner, run, "running")
    pid = read_json(run / "launch.json")["pid"]
    began = time.monotonic()
    runner.kill(run, grace=0)
    assert time.monotonic() - began < 15 and not psutil.pid_exists(pid)
    assert runner.state(run) == "interrupted"


def test_a_command_line_run_blocks_the_queue_and_can_be_ended(home, runner, run_in, tmp_path):
    outside = run_in(tmp_path / "elsewhere" / "by-hand", LONG)
    by_hand = subprocess.Popen([sys.executable, "-m", "trainer", *words(outside)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (outside / "events.jsonl").exists() or not kinds(outside):
            assert by_hand.poll() is None
            time.sleep(0.05)
        run = run_in(home.runs / "waits")
        runner.submit("train", run, words(run))
        runner.tick()
        assert runner.state(run) == "waiting" and runner.busy() == [(outside, "train")]
        runner.kill(outside, grace=0)
        by_hand.wait(20)
        assert runner.state(outside) == "interrupted"
        runner.tick()
        assert runner.state(run) == "starting"
    finally:
        by_hand.kill()
        by_hand.wait(20)


def test_one_that_cannot_start_says_why(home, runner, run_in):
    run = run_in(home.runs / "wrong")
    (run / "config.json").write_text('{"adapter": {"rank": 0}}', encoding="utf-8")
    runner.submit("train", run, words(run))
    runner.tick()
    assert wait(runner, run, "failed", "interrupted") == "failed"
    assert "adapter.rank is 0" in runner.look(run).text and "Traceback" not in runner.look(run).text
    assert not (run / "events.jsonl").exists()


def test_a_program_that_is_missing_is_a_failed_job(home, runner, run_in, monkeypatch):
    run = run_in(home.runs / "missing")
    monkeypatch.setattr(module.sys, "executable", str(home.root / "no-such-python"))
    runner.submit("train", run, words(run))
    runner.tick()
    assert runner.state(run) == "failed" and "could not be started" in runner.look(run).text
    assert runner.jobs.list() == []


def test_a_stranger_with_the_same_process_number_is_not_taken_for_the_trainer(home, runner, run_in):
    run = run_in(home.runs / "reused")
    me = psutil.Process()
    launch = {"pid": me.pid, "created": me.create_time(), "time": 0, "kind": "train", "words": [], "last": None, "log": 0}
    (run / "launch.json").write_text(json.dumps(launch))
    assert runner.state(run) == "starting"
    (run / "launch.json").write_text(json.dumps(launch | {"created": me.create_time() - 1000}))
    assert runner.state(run) == "interrupted"
    runner.kill(run, grace=0)  # and it is certainly not ended


def test_the_lost_queue_is_found_again_in_the_folders(home, runner, run_in):
    with_lock = Lock(RunDir(run_in(home.runs / "busy")))
    with_lock.acquire()
    names = ["b", "a", "c"]
    for name in names:
        folder = run_in(home.runs / name)
        runner.submit("train", folder, words(folder))
    runner.unqueue(home.runs / "c")
    runner.tick()
    for file in home.root.glob("queue.sqlite*"):
        file.unlink()
    again = Runner(home)
    assert again.state(home.runs / "a") == "none"
    again.reconcile()
    again.tick()
    assert [job.folder.name for job in again.jobs.list()] == ["b", "a"]
    assert again.jobs.list()[1].words == tuple(words(home.runs / "a"))
    again.unqueue(home.runs / "a")
    again.unqueue(home.runs / "b")
    with_lock.release()
    assert again.state(home.runs / "a") == "none" and again.state(home.runs / "busy") in ("none", "interrupted")


def test_a_job_whose_folder_was_deleted_leaves_the_queue(home, runner, run_in):
    run = run_in(home.runs / "gone")
    runner.submit("train", run, words(run))
    for file in run.iterdir():
        file.unlink()
    run.rmdir()
    runner.tick()
    assert runner.jobs.list() == [] and not run.exists()


def test_many_looks_at_once_do_not_take_each_other_for_a_trainer(home, runner, run_in):
    from concurrent.futures import ThreadPoolExecutor

    run = run_in(home.runs / "quiet")
    (run / "lock").touch()

    def look(_):
        runner._settled.clear()
        return runner.state(run)

    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(look, range(400))) == {"none"}


def test_the_thread_starts_what_waits_and_a_finished_training_is_compared_once(home, run_in):
    run = run_in(home.runs / "compared")
    runner = Runner(home, every=0.1)
    runner.start()
    try:
        runner.submit("train", run, words(run))
        deadline = time.monotonic() + 120
        while not (run / "results").exists():
            assert time.monotonic() < deadline and runner.state(run) != "failed"
            time.sleep(0.1)
        assert runner.state(run) == "finished"
        while not (launched := read_json(run / "results" / "launch.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert launched["words"] == ["compare", str(run)]
        runner.kill(run / "results", grace=0)
        time.sleep(0.5)
        assert runner.jobs.list() == [] and runner.busy() == []
    finally:
        runner.close()
    again = Runner(home)
    again.reconcile()
    again.tick()
    assert again.jobs.list() == [] and again.busy() == []


def test_the_playground_makes_room_for_a_training(home, runner, run_in):
    playground = home.jobs / "playground"
    runner.launch("serve", playground, ["serve", "--run-dir", str(playground), "--idle", "300"])
    wait(runner, playground, "running")
    run = run_in(home.runs / "wants-it")
    runner.submit("train", run, words(run))
    runner.tick()
    assert runner.state(run) == "waiting"
    assert wait(runner, run, "starting", "running", "finished")
    assert runner.state(playground) == "stopped" and read_json(playground / "launch.json")["yielded"]


def test_tools_answer_or_say_what_went_wrong(runner):
    found = json.loads(runner.run_tool(["inspect", "--json", str(ROOT / "assets/demo/classifier.safetensors")], 60))
    assert isinstance(found, dict)
    with pytest.raises(Problem, match="does not exist"):
        runner.run_tool(["convert", str(ROOT / "none.safetensors"), "--to", "diffusers"], 60)
    with pytest.raises(Problem, match="took more than"):
        runner.run_tool(["probe"], 0.01)


def test_on_windows_the_trainer_leaves_the_apps_console_and_job(home, runner, monkeypatch):
    flags = {"CREATE_NEW_PROCESS_GROUP": 0x200, "CREATE_NO_WINDOW": 0x8000000, "CREATE_BREAKAWAY_FROM_JOB": 0x1000000}
    for name, value in flags.items():
        monkeypatch.setattr(subprocess, name, value, raising=False)
    asked = []

    def refuse_breakaway(words, **options):
        asked.append(options)
        if options["creationflags"] & 0x1000000:
            raise PermissionError(13, "Access is denied")
        return "process"

    monkeypatch.setattr(module, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "Popen", refuse_breakaway)
    assert Runner._spawn(["probe"], None) == "process"
    assert [o["creationflags"] for o in asked] == [0x9000200, 0x8000200]
    assert all(o["stdin"] == subprocess.DEVNULL and "start_new_session" not in o for o in asked)


def test_last_event_of_any_file(tmp_path):
    path = tmp_path / "events.jsonl"
    assert last_event(path) is None
    line = json.dumps({"seq": 0, "time": 1.0, "type": "warning", "text": "x" * 300_000}) + "\n"
    path.write_text(line)
    assert last_event(path)["type"] == "warning"
    path.write_text(line + '{"seq": 1, "time": 2.0, "type": "finished"}\n{"seq": 2, "ti')
    assert last_event(path)["seq"] == 1
