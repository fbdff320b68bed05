"""The frame of the jobs beside training (caption, compare, serve): a folder that follows the protocol of a run's (trainer/run_dir.py).

config.json says what was asked, the lock that the job lives, events.jsonl what happened (as in trainer/events.py; each job's
module names its own events). The last event is `finished`, `stopped` or `failed`, each with `seconds`; `failed` with `text`.
A job that is started again in its folder goes on counting the events there.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import control, events
from trainer.run_dir import Lock, RunDir, RunError, write_json

Show = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """Raised by Job.check: the user asked the job to end."""


class Job:
    """A job that holds its folder's lock. `emit(type, **fields)` writes an event; `stopping()` says whether it shall end."""

    def __init__(self, run: RunDir, emit: Callable[..., None]) -> None:
        self.run, self.emit = run, emit
        self.asked = False

    def stopping(self) -> bool:
        """Whether a stop request or a signal came in; other requests are answered as not known here."""
        for request in control.take(self.run):
            if request.kind == "stop":
                self.asked = True
            detail = "" if request.kind == "stop" else f"{request.kind!r} is no request to this job; it knows stop."
            self.emit("answered", request=request.kind, id=request.id, detail=detail)
        return self.asked

    def wait(self, call: Callable[[], Any]) -> Any:
        """What `call` returns or raises; a stop is heeded meanwhile, by leaving the call behind in its thread (downloads last long).

        A process that was stopped so should end by `leave`, since Python waits for the threads of a download.
        """
        done: list[Any] = []

        def run() -> None:
            try:
                done.extend((call(), None))
            except BaseException as error:  # raised again below, in the thread that waits
                done.extend((None, error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if thread.is_alive():
                self.check()
        value, error = done
        if error is not None:
            raise error
        return value

    def check(self) -> None:
        """Raise Stopped if the job shall end."""
        if self.stopping():
            raise Stopped


def work(root: Path, asked: dict[str, Any], body: Callable[[Job], dict[str, Any] | None], show: Show = lambda event: None) -> str:
    """Do `body` in the folder `root`; returns "finished" or "stopped" (the body raised Stopped). `show` sees every event.

    Args:
        asked: what config.json shall say.
        body: the work; what it returns becomes fields of the `finished` event.

    Raises ValueError with a sentence for what the user can mend; it stands in the `failed` event too. The folder's lock being held
    by another process, or a folder that cannot be written to, raises RunError before there is any event.
    """
    run, started = RunDir(root), time.time()
    try:
        run.control.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"The job's folder {run.root} cannot be made: {error.strerror}. Choose another with --run-dir.") from None
    lock = Lock(run)
    lock.acquire()
    restore: Callable[[], None] = lambda: None  # noqa: E731
    try:
        write_json(run.config, asked)
        writer = events.Writer(run.events)
        writing = threading.Lock()

        def emit(type: str, **fields: Any) -> None:
            with writing:  # a download speaks from its own thread
                if not writer.file.closed:
                    show(writer(type, **fields))

        job = Job(run, emit)
        restore = _on_signal(job)
        _drop_old_requests(run)

        def end(type: str, **fields: Any) -> None:
            for request in control.take(run):
                job.emit("answered", request=request.kind, id=request.id, detail="too late: the job had ended")
            job.emit(type, seconds=round(time.time() - started, 1), **fields)
            writer.close()

        try:
            found = body(job) or {}
        except Stopped:
            end("stopped")
            return "stopped"
        except Exception as error:
            text = explain(error)
            end("failed", text=text or f"{type(error).__name__}: {error}")
            if text:
                raise RunError(text) from error
            raise
        end("finished", **found)
        return "finished"
    finally:
        restore()
        lock.release()


def leave(code: int) -> None:
    """End this process now, whatever threads are still at work: every file of a job that has ended is complete."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain(error: Exception) -> str | None:
    """A sentence for an error that the user can mend, None for one that is ours."""
    if type(error) is ValueError or (isinstance(error, ValueError) and type(error).__module__.startswith("trainer")):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full. Free some space, then start again."
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename} cannot be written or read: {error.strerror}. Make it writable for you, then start again."
    torch = sys.modules.get("torch")  # a job that failed before it needed torch had no such error
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "The GPU's memory is full. Close other programs that use it, or choose a smaller picture or batch, then start again."
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "The computer's memory is full. Close other programs, then start again."
    return None


def _drop_old_requests(run: RunDir) -> None:
    """Remove what was asked of an earlier job in this folder that died; what came since this process began stays.

    Two seconds of slack: the system tells a process's start to a second.
    """
    import psutil

    began = psutil.Process().create_time() - 2
    for path in run.control.glob("*.json"):
        if path.stat().st_mtime < began:
            path.unlink()


def _on_signal(job: Job) -> Callable[[], None]:
    """Ctrl-C and a polite kill ask the job to end; a second one ends it at once. Returns what puts the old handlers back."""
    before = {}

    def handle(number: int, frame: Any) -> None:
        if job.asked:
            raise KeyboardInterrupt
        job.asked = True

    for kind in (signal.SIGINT, signal.SIGTERM):
        try:
            before[kind] = signal.signal(kind, handle)
        except ValueError:  # not in the main thread: the caller handles signals
            break
    return lambda: [signal.signal(kind, handler) for kind, handler in before.items()] and None
