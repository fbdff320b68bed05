"""The lock that says that a run is alive, under the eyes of many who look."""

import threading
import time

import pytest

from trainer.run_dir import Lock, RunDir, RunError, is_alive


@pytest.fixture
def folder(tmp_path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    return run


@pytest.fixture
def watched(folder):
    """Six threads that look at the folder without a pause; (when a look began, the state that it saw) of each."""
    end, seen = threading.Event(), []

    def watch() -> None:
        while not end.is_set():
            began = time.monotonic()
            seen.append((began, is_alive(folder)))

    threads = [threading.Thread(target=watch) for _ in range(6)]
    for thread in threads:
        thread.start()
    yield seen
    end.set()
    for thread in threads:
        thread.join()


def looks(seen: list[tuple[float, bool]], count: int) -> list[bool]:
    """What the next `count` looks saw that begin from now on."""
    now, start = time.monotonic(), len(seen)
    while len(found := [alive for began, alive in seen[start:] if began > now]) < count:
        time.sleep(0.001)
    return found[:count]


def test_those_who_look_do_not_take_each_other_for_a_trainer(folder, watched):
    folder.lock.touch()
    assert not any(looks(watched, 2000))


def test_a_trainer_starts_under_many_eyes_and_holds_the_folder(folder, watched):
    for _ in range(20):
        lock = Lock(folder)
        lock.acquire()
        assert all(looks(watched, 100))
        lock.release()
    lock.acquire()
    with pytest.raises(RunError, match="Another process is training"):
        Lock(folder).acquire()
    lock.release()
    assert not is_alive(folder)


def test_looking_leaves_no_trace_and_needs_no_right_to_write(folder):
    assert not is_alive(folder) and not folder.lock.exists()
    lock = Lock(folder)
    lock.acquire()
    folder.lock.chmod(0o444)
    before = folder.lock.stat()
    assert is_alive(folder)
    assert folder.lock.stat().st_mtime_ns == before.st_mtime_ns
    lock.release()
    assert not is_alive(folder)
