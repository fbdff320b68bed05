"""The waiting line: its order, and that a job is started once however many look at it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.jobs import Job, Jobs

ROOT = Path(__file__).resolve().parents[2]


def folders(jobs: Jobs) -> list[str]:
    return [job.folder.name for job in jobs.list()]


def filled(tmp_path: Path, names: str) -> Jobs:
    jobs = Jobs(tmp_path / "queue.sqlite")
    for name in names:
        jobs.add(tmp_path / name, "train", ["train", "--run-dir", str(tmp_path / name)])
    return jobs


def test_jobs_keep_their_order_and_words(tmp_path):
    jobs = filled(tmp_path, "abc")
    assert jobs.add(tmp_path / "d", "compare", ["compare", 'a "b" é'], first=True) == 0
    assert jobs.add(tmp_path / "e", "train", []) == 4
    again = Jobs(tmp_path / "queue.sqlite")
    assert folders(again) == ["d", "a", "b", "c", "e"]
    assert again.list()[0] == Job(tmp_path / "d", "compare", ("compare", 'a "b" é'))


def test_moving_and_removing(tmp_path):
    jobs = filled(tmp_path, "abcd")
    assert jobs.move(tmp_path / "d", 1)
    assert folders(jobs) == ["a", "d", "b", "c"]
    assert jobs.move(tmp_path / "a", 99)
    assert folders(jobs) == ["d", "b", "c", "a"]
    assert jobs.move(tmp_path / "c", 0)
    assert folders(jobs) == ["c", "d", "b", "a"]
    assert jobs.remove(tmp_path / "d")
    assert not jobs.remove(tmp_path / "d")
    assert not jobs.move(tmp_path / "d", 0)
    assert folders(jobs) == ["c", "b", "a"]


def test_a_job_added_again_keeps_its_place_and_takes_the_new_words(tmp_path):
    jobs = filled(tmp_path, "ab")
    assert jobs.add(tmp_path / "a", "train", ["train", "--resume"]) == 0
    assert jobs.list()[0].words == ("train", "--resume")


def test_a_start_that_fails_leaves_the_queue_as_it_was(tmp_path):
    jobs = filled(tmp_path, "ab")

    def fail(queue):
        raise OSError("no process")

    with pytest.raises(OSError, match="no process"):
        jobs.take(fail)
    assert folders(jobs) == ["a", "b"]
    assert jobs.take(lambda queue: None) is None
    assert folders(jobs) == ["a", "b"]


TAKER = """
import sys
from pathlib import Path
from app.jobs import Jobs
jobs = Jobs(Path(sys.argv[1]))
while job := jobs.take(lambda queue: queue[0] if queue else None):
    print(job.folder.name, flush=True)
"""


def test_threads_and_processes_never_take_one_job_twice(tmp_path):
    names = [f"job{k}" for k in range(60)]
    jobs = filled(tmp_path, names)
    others = [
        subprocess.Popen([sys.executable, "-c", TAKER, str(tmp_path / "queue.sqlite")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    taken: list[str] = []

    def work():
        while job := jobs.take(lambda queue: queue[0] if queue else None):
            taken.append(job.folder.name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for other in others:
        taken += other.communicate(timeout=60)[0].split()
        assert other.returncode == 0
    assert sorted(taken) == sorted(names)


def test_a_waiting_job_can_be_changed_while_nobody_can_start_it(tmp_path):
    jobs = filled(tmp_path, "a")
    said = []
    assert jobs.holds(tmp_path / "a", lambda: said.append("changed"))
    assert not jobs.holds(tmp_path / "b", lambda: said.append("never"))
    assert said == ["changed"]


def test_a_damaged_or_deleted_file_is_begun_anew(tmp_path):
    path = tmp_path / "queue.sqlite"
    path.write_bytes(b"this is no database" * 100)
    jobs = Jobs(path)
    jobs.add(tmp_path / "a", "train", [])
    assert folders(jobs) == ["a"]
    assert (tmp_path / "queue.sqlite.damaged").exists()
    for old in tmp_path.glob("queue.sqlite*"):
        old.unlink()
    assert jobs.list() == []
    jobs.add(tmp_path / "b", "train", [])
    assert folders(jobs) == ["b"]
