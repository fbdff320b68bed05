"""Trainer processes: start them detached, see how they fare, end them, and start what waits. The only subprocess and psutil in the app.

Every job has a folder that follows trainer/run_dir.py's protocol; the app adds two files to it:

waiting.json   {kind, words, time}: it waits; the order stands in app/jobs.py
launch.json    {pid, created (the process' own start time), time, kind, words, last, log, compared}: its last start by the app.
               last: [seq, time] of the last event before it, log: bytes of log.txt before it, so that what came after can be told

The state is derived from these, the lock and the events each time, so any process may die at any moment:

running        a trainer holds the lock (command-line runs too)
waiting        it stands in the queue
starting       the launched process lives and holds no lock yet
finished | stopped | failed   the last event says so; failed also where the process ended before its first event, with the log's words
interrupted    none of these: the process ended without a word
none           nothing was ever started here

One job at a time has the device. Captionings, trainings, comparisons and measurements wait in one queue for it; the playground
(`serve`) is asked to stop when one of them waits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from app import run_reader, settings
from app.errors import Problem
from app.jobs import Job, Jobs
from app.paths import ROOT, Home
from trainer import control, events, run_dir
from trainer.run_dir import RunDir

WINDOWS = os.name == "nt"
LIVE = ("starting", "running")
SERVE = "serve"
INTERRUPTED = "The process ended without a word: a power cut, a full memory, or somebody ended it."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What a folder says now: `state` (see above), and for failed and interrupted jobs `text`, a sentence."""

    state: str
    text: str = ""


class Runner:
    """The jobs of one data folder. Every method may be called from any thread; `start` begins to watch the queue."""

    def __init__(self, home: Home, every: float = 1.0) -> None:
        home.create()
        self.home, self.every = home, every
        self.jobs = Jobs(home.queue)
        self._children: list[subprocess.Popen] = []  # of this app process, to be reaped
        self._watched: set[Path] = set()  # trainings that were seen alive, to be compared when they have finished
        self._settled: dict[Path, tuple[int, Look]] = {}
        self._pending: list[tuple[Path, str, dict[str, Any]]] = []
        self._lock, self._locks = threading.RLock(), threading.Lock()
        self._wake, self._closing, self._thread = threading.Event(), threading.Event(), None

    # The watching thread

    def start(self) -> None:
        """Take up what an earlier app process left, then look after the queue each second, in a daemon thread."""
        self.reconcile()
        self._closing.clear()
        self._thread = threading.Thread(target=self._watch, name="runner", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching. The jobs go on."""
        self._closing.set()
        self._wake.set()
        if self._thread:
            self._thread.join(10)

    def _watch(self) -> None:
        while not self._closing.is_set():
            try:
                self.tick()
            except Exception:  # the queue must go on; a full disk, for one, may be mended
                log.exception("The queue met an error; it is looked after again in a while.")
                self._closing.wait(10)
            self._wake.wait(self.every)
            self._wake.clear()

    def reconcile(self) -> None:
        """Find the jobs whose place in the queue was lost, and the trainings that finished while no app ran."""
        known = {job.folder for job in self.jobs.list()}
        lost = []
        for folder in self.folders():
            waits = read_json(folder / "waiting.json")
            if waits and folder not in known:
                lost.append((waits["time"], folder, waits))
            launch = read_json(folder / "launch.json")
            if launch and launch["kind"] == "train" and not launch.get("compared"):
                self._watched.add(folder)
        for _, folder, waits in sorted(lost, key=lambda entry: entry[0]):
            self.jobs.add(folder, waits["kind"], waits["words"])

    def tick(self) -> None:
        """One look after everything: reap, pass requests on, compare what finished, start what waits."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]
            self._deliver()
            for folder in list(self._watched):
                state = self._look(folder).state
                if state not in LIVE:
                    self._watched.discard(folder)
                if state == "finished":
                    self._compare(folder)
            if self.jobs.list():
                while self.jobs.take(self._next):
                    pass

    def _next(self, queue: list[Job]) -> Job | None:
        """Start the first job if the device is free. A job that is gone, or that runs already, is handed back too: it waits no more."""
        for job in queue:
            if not job.folder.is_dir() or self._look(job.folder).state in LIVE:
                (job.folder / "waiting.json").unlink(missing_ok=True)
                return job
        if not queue:
            return None
        holders = self.busy()
        for folder, kind in holders:
            if kind == SERVE:
                self._yield(folder)
        if holders:
            return None
        self.launch(queue[0].kind, queue[0].folder, queue[0].words)
        return queue[0]

    def _yield(self, folder: Path) -> None:
        launch = read_json(folder / "launch.json")
        if launch and not launch.get("yielded"):
            run_dir.write_json(folder / "launch.json", launch | {"yielded": True})
            self._ask(folder, "stop", {})

    def _compare(self, folder: Path) -> None:
        launch = read_json(folder / "launch.json")
        if launch and launch["kind"] == "train" and not launch.get("compared"):
            self.compare(folder)
            run_dir.write_json(folder / "launch.json", launch | {"compared": True})

    # What waits

    def submit(self, kind: str, folder: Path, words: Sequence[str], first: bool = False) -> int:
        """Put `python -m trainer *words` in the queue; returns its place from 0. Raises Problem when the folder's job is alive.

        It starts within a second when the device is free (at once with `tick`).
        """
        folder = Path(folder).resolve()
        if self.look(folder).state in LIVE:
            raise Problem(f"{folder.name} is running. Wait until it ends, or stop it.", 409)
        folder.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(folder / "waiting.json", {"kind": kind, "words": list(words), "time": time.time()})
        place = self.jobs.add(folder, kind, words, first)
        self._wake.set()
        return place

    def compare(self, folder: Path) -> None:
        """Have a run's comparison made, before what else waits: it takes a minute, and somebody looks at the run now."""
        if self.look(folder / "results").state not in (*LIVE, "waiting"):
            self.submit("compare", folder / "results", ["compare", str(folder)], first=True)

    def unqueue(self, folder: Path) -> bool:
        """Take a job out of the queue; whether it waited."""
        (folder / "waiting.json").unlink(missing_ok=True)
        return self.jobs.remove(folder)

    def cancel(self, folder: Path) -> None:
        """Take a waiting job out of the queue, ask a running one to stop. Raises Problem for any other."""
        if not self.unqueue(folder):
            self.request(folder, "stop")

    # Processes

    def tool(self, folder: Path, words: Sequence[str]) -> None:
        """Start a tool that works on files alone: as `launch`, but what it prints goes to the folder's answer.txt, its complaints to log.txt.

        Tools need no device and wait for nothing; `folder` lies outside of the data folder's jobs, so that nothing waits for them. They
        write no events: `look` says of one that has ended failed or interrupted, and the caller knows by its result whether it succeeded.
        """
        self.launch("tool", folder, words, answer=folder / "answer.txt")

    def launch(self, kind: str, folder: Path, words: Sequence[str], answer: Path | None = None) -> None:
        """Start `python -m trainer *words` detached, its output appended to the folder's log.txt. Where that fails, the folder says so.

        `answer`: a file that takes what it prints, so that the log has its errors alone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        last = run_reader.last_event(folder / "events.jsonl")
        facts = {"pid": None, "created": None, "time": time.time(), "kind": kind, "words": list(words)}
        facts |= {"last": [last["seq"], last["time"]] if last else None, "compared": False}
        with (folder / "log.txt").open("ab") as out, answer.open("wb") if answer else contextlib.nullcontext(out) as printed:
            facts["log"] = out.seek(0, os.SEEK_END)
            try:
                child = self._spawn(words, printed, out)
            except OSError as error:
                facts["error"] = f"The trainer could not be started: {error.strerror or error}."
            else:
                self._children.append(child)
                facts["pid"] = child.pid
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(child.pid)
                    facts["created"] = process.create_time()
                    process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if WINDOWS else max(10, psutil.Process().nice()))
        run_dir.write_json(folder / "launch.json", facts)
        (folder / "waiting.json").unlink(missing_ok=True)
        if kind == "train":
            self._watched.add(folder)

    @staticmethod
    def _spawn(words: Sequence[str], out: Any, errors: Any = subprocess.STDOUT) -> subprocess.Popen:
        options: list[dict[str, Any]] = [{"start_new_session": True}]
        if WINDOWS:  # out of the app's console and job, so that closing either leaves the trainer alone; not every job lets go
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            options = [{"creationflags": flags | subprocess.CREATE_BREAKAWAY_FROM_JOB}, {"creationflags": flags}]
        for k, more in enumerate(options):
            try:
                return subprocess.Popen(
                    [sys.executable, "-m", "trainer", *words],
                    cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=errors, **more,
                )  # fmt: skip
            except PermissionError:
                if k == len(options) - 1:
                    raise
        raise AssertionError("no way to start a process")

    def request(self, folder: Path, kind: str, payload: dict[str, Any] | None = None) -> None:
        """Ask a running job for something, see trainer/control.py. Raises Problem when it does not run or the payload is wrong."""
        if self.look(folder).state not in LIVE:
            raise Problem(f"{folder.name} is not running, so it cannot be asked for this: {kind}.", 409)
        if text := control.wrong(control.Request("", kind, payload or {})):
            raise Problem(text)
        self._ask(folder, kind, payload or {})

    def _ask(self, folder: Path, kind: str, payload: dict[str, Any]) -> None:
        with self._lock:
            self._pending.append((folder, kind, payload))
            self._deliver()

    def _deliver(self) -> None:
        """Hand requests on to those that can take them: a training takes what lies there before its first event for an earlier life's."""
        waiting, self._pending = self._pending, []
        for folder, kind, payload in waiting:
            look = self._look(folder)
            launch = read_json(folder / "launch.json")
            job = launch is not None and launch["kind"] != "train"  # the other jobs tell by the time what is old
            fresh = job or _fresh(launch, run_reader.last_event(folder / "events.jsonl"))
            if look.state == "running" and fresh:
                control.send(RunDir(folder), kind, payload)
            elif look.state in LIVE:
                self._pending.append((folder, kind, payload))

    def pending(self, folder: Path) -> list[str]:
        """The kinds of the requests that the folder's job has not taken yet."""
        with self._lock:
            kinds = [kind for f, kind, _ in self._pending if f == folder]
        found = (read_json(path) for path in (folder / "control").glob("*.json"))
        return sorted(kinds + [str(request.get("kind")) for request in found if request])

    def kill(self, folder: Path, grace: float = 5.0) -> None:
        """End a job, with everything it started: politely, then after `grace` seconds at once. Raises Problem when it will not end."""
        self.unqueue(folder)
        if self.look(folder).state not in LIVE:
            return
        with contextlib.suppress(Problem):
            self.request(folder, "stop")
        if self._ended(folder, grace):
            return
        for process in self._processes(folder):
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                for member in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                psutil.wait_procs(family, timeout=5)
        if not self._ended(folder, 5):
            raise Problem(f"The process that works in {folder} could not be ended. End it by hand, then try again.", 409)

    def _ended(self, folder: Path, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._look(folder).state in LIVE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
            with self._lock:
                self._children = [child for child in self._children if child.poll() is None]
                self._deliver()
        return True

    def _processes(self, folder: Path) -> Iterator[psutil.Process]:
        """The launched process, and the one that holds the lock where that is another (a command-line run)."""
        launch = read_json(folder / "launch.json")
        if launch and (process := _process(launch)):
            yield process
        holder = read_json(folder / "process.json")
        if holder and self._locked(folder) and holder["host"] == platform.node():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(holder["pid"])
                if process.create_time() <= holder["start"] + 2:  # else another process got its number
                    yield process

    def run_tool(self, words: Sequence[str], timeout: float) -> str:
        """What `python -m trainer *words` prints, for short tools. Raises Problem when it fails or takes more than `timeout` seconds."""
        try:
            done = subprocess.run(
                [sys.executable, "-m", "trainer", *words],
                cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Problem(f"`python -m trainer {words[0]}` took more than {timeout:g} seconds and was ended.", 500) from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing."]
            raise Problem(f"`python -m trainer {words[0]}` failed: {said[-1].removeprefix('Error: ')}", 500)
        return done.stdout

    def open_folder(self, folder: Path) -> None:
        """Show a folder in this machine's file manager. Raises Problem where there is none."""
        words = ["explorer", str(folder)] if WINDOWS else ["open" if sys.platform == "darwin" else "xdg-open", str(folder)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            child = subprocess.Popen(words, **quiet, start_new_session=not WINDOWS)
        except OSError:
            raise Problem(
                f"This machine has no file manager that could be opened ({words[0]} is missing). The folder is {folder}", 409
            ) from None
        with self._lock:
            self._children.append(child)

    # States

    def state(self, folder: Path) -> str:
        return self.look(folder).state

    def progress(self, folder: Path, kind: str, counts: Sequence[str]) -> dict[str, Any]:
        """How far a job is that emits `started`, events of `kind` and `finished` with some of `counts`: "state", "text" and the counts."""
        look = self.look(folder)
        state = "lost" if look.state in ("interrupted", "none") else look.state
        view = {"state": state, "text": look.text, **dict.fromkeys(counts, 0)}
        for event in events.read(folder / "events.jsonl"):
            if event["type"] == "started":
                view |= dict.fromkeys(counts, 0)
            if event["type"] in ("started", kind, "finished"):
                view |= {k: event[k] for k in counts if k in event}
            if event["type"] == "stage" and state in ("starting", "running"):
                view["text"] = event.get("text", "")
        return view

    def look(self, folder: Path, queue: Sequence[Job] | None = None) -> Look:
        """The state of a job's folder; `queue` (from `jobs.list()`) saves reading it for each of many."""
        folder = Path(folder)
        found = self._look(folder)
        if found.state not in LIVE and any(job.folder == folder for job in (self.jobs.list() if queue is None else queue)):
            return Look("waiting")
        return found

    def _look(self, folder: Path) -> Look:
        # A job that has ended can only live again by a file put into its folder, which changes the folder's own time: this makes
        # looking at a long history each second cheap.
        try:
            mark = folder.stat().st_mtime_ns
        except OSError:
            return Look("none")
        kept = self._settled.get(folder)
        if kept and kept[0] == mark:
            return kept[1]
        found = self._derive(folder)
        if found.state not in LIVE:
            self._settled[folder] = (mark, found)
        return found

    def _derive(self, folder: Path) -> Look:
        if self._locked(folder):
            return Look("running")
        launch = read_json(folder / "launch.json")
        last = run_reader.last_event(folder / "events.jsonl")
        fresh = _fresh(launch, last)
        if fresh and last["type"] in events.TERMINAL:
            return Look(last["type"], last.get("text", ""))
        if launch and _process(launch):
            return Look("running" if fresh else "starting")
        if not launch and not last:
            return Look("none")
        if launch and not fresh and (said := launch.get("error") or _complaint(folder / "log.txt", launch["log"])):
            return Look("failed", said)
        return Look("interrupted", INTERRUPTED)

    def _locked(self, folder: Path) -> bool:
        with self._locks:  # on Windows a look takes the lock for a moment: two at once would take each other for a trainer
            try:
                return run_dir.is_alive(_run(folder))
            except OSError:  # the folder was deleted meanwhile, or may not be written to
                return False

    def folders(self) -> Iterator[Path]:
        """Every folder that a job may work in."""
        for folder in run_reader.folders(self.home, settings.load(self.home)).values():
            yield folder
            if (folder / "results").is_dir():
                yield folder / "results"
        with contextlib.suppress(FileNotFoundError), os.scandir(self.home.jobs) as entries:
            yield from (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))

    def busy(self) -> list[tuple[Path, str]]:
        """(folder, kind) of every job that has the device now, the app's own and the command line's."""
        found = []
        for folder in self.folders():
            if self._look(folder).state in LIVE:
                launch = read_json(folder / "launch.json")
                found.append((folder, launch["kind"] if launch else "train"))
        return found


@functools.lru_cache(maxsize=4096)
def _run(folder: Path) -> RunDir:
    return RunDir(folder)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file of ours, or None where it is missing (they are written whole or not at all)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _fresh(launch: dict[str, Any] | None, last: dict[str, Any] | None) -> bool:
    """Whether the last event came after the last launch. By its identity: clocks are set back now and then."""
    return last is not None and (launch is None or [last["seq"], last["time"]] != launch["last"])


def _process(launch: dict[str, Any]) -> psutil.Process | None:
    """The launched process while it lives; the time it was created tells it from another that got its number since."""
    if launch["pid"] is None:
        return None
    try:
        process = psutil.Process(launch["pid"])
        same = launch["created"] is not None and abs(process.create_time() - launch["created"]) < 5
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _complaint(path: Path, start: int) -> str:
    """What a process that ended before its first event said: its error, or nothing where it said none."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - 20_000))
            said = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    for word in ("\nError: ", " error: "):
        if (place := f"\n{said}".rfind(word)) >= 0:
            return f"\n{said}"[place + len(word) :].strip()[:1000]
    return said.strip().splitlines()[-1] if "Traceback (most recent call last)" in said else ""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def memory() -> tuple[float, float]:
    """(all, free) memory of this machine in GiB; free is what can be had without swapping."""
    found = psutil.virtual_memory()
    return found.total / 2**30, found.available / 2**30
