"""The order of waiting jobs: the only sqlite3 in the app. What a job is and how it went stands in its folder, so losing this
file loses the order alone (app/runner.py writes waiting.json into a folder that waits and finds it again)."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = "CREATE TABLE IF NOT EXISTS waiting (folder TEXT PRIMARY KEY, kind TEXT NOT NULL, words TEXT NOT NULL, place INTEGER NOT NULL)"


@dataclass(frozen=True)
class Job:
    """`python -m trainer *words`, to be run in `folder`; `kind` is train, caption, compare or measure."""

    folder: Path
    kind: str
    words: tuple[str, ...]


class Jobs:
    """The waiting jobs, first to start first. Any number of threads and processes may use one file at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self._open():
                pass
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # not a database any more: the order is lost, the folders are not
            path.replace(path.with_name(path.name + ".damaged"))
            for ending in ("-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
            with self._open():
                pass

    @contextlib.contextmanager
    def _open(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        # A connection for each use: threads share none, and a file that was deleted meanwhile is made anew.
        base = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            if base.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                base.execute("PRAGMA journal_mode = WAL")
            base.execute(TABLE)
            if write:
                base.execute("BEGIN IMMEDIATE")
            yield base
            if base.in_transaction:
                base.execute("COMMIT")
        except BaseException:
            if base.in_transaction:
                base.execute("ROLLBACK")
            raise
        finally:
            base.close()

    def list(self) -> list[Job]:
        with self._open() as base:
            return _jobs(base)

    def add(self, folder: Path, kind: str, words: Sequence[str], first: bool = False) -> int:
        """Put a job at the queue's end, or at its beginning; a folder that waits already keeps its place. Returns the place from 0."""
        with self._open(write=True) as base:
            place = "(SELECT coalesce(min(place), 0) - 1 FROM waiting)" if first else "(SELECT coalesce(max(place), 0) + 1 FROM waiting)"
            base.execute(
                f"INSERT INTO waiting VALUES (?, ?, ?, {place}) ON CONFLICT (folder) DO UPDATE SET kind = excluded.kind, words = excluded.words",
                (str(folder), kind, json.dumps(list(words))),
            )
            return [job.folder for job in _jobs(base)].index(folder)

    def remove(self, folder: Path) -> bool:
        """Take a job out; whether it was there."""
        with self._open(write=True) as base:
            return base.execute("DELETE FROM waiting WHERE folder = ?", (str(folder),)).rowcount > 0

    def move(self, folder: Path, to: int) -> bool:
        """Give a job the place `to`, counted from 0 (past the end: the last); whether it was there."""
        with self._open(write=True) as base:
            order = [job.folder for job in _jobs(base)]
            if folder not in order:
                return False
            order.remove(folder)
            order.insert(max(0, to), folder)
            base.executemany("UPDATE waiting SET place = ? WHERE folder = ?", [(k, str(f)) for k, f in enumerate(order)])
            return True

    def take(self, start: Callable[[list[Job]], Job | None]) -> Job | None:
        """Let `start` start one of the waiting jobs, and take out the one it returns.

        The file is locked while `start` runs, so that of several app processes one alone starts a job; `start` must be quick.
        When it raises, the queue stays as it was.
        """
        with self._open(write=True) as base:
            job = start(_jobs(base))
            if job is not None:
                base.execute("DELETE FROM waiting WHERE folder = ?", (str(job.folder),))
            return job

    def holds(self, folder: Path, change: Callable[[], None]) -> bool:
        """Call `change` while nobody can start the job of `folder`; False, and no call, where it does not wait."""
        with self._open(write=True) as base:
            waits = any(job.folder == folder for job in _jobs(base))
            if waits:
                change()
            return waits


def _jobs(base: sqlite3.Connection) -> list[Job]:
    rows = base.execute("SELECT folder, kind, words FROM waiting ORDER BY place").fetchall()
    return [Job(Path(folder), kind, tuple(json.loads(words))) for folder, kind, words in rows]
