import json
import signal

import pytest

from trainer import control, events, run
from trainer.run_dir import Lock, RunDir, RunError, is_alive

STEPS = 8
RATES_1 = {"part.unet.learning_rate": 1.0, "part.text_1.learning_rate": 1.0}
DRAWN = {
    "adapter.dropout": 0.2,
    "dataset.flip": True,
    "dataset.shuffle_tags": True,
    "dataset.tag_dropout": 0.3,
    "dataset.caption_dropout": 0.3,
    "loss.noise_offset": 0.1,
}
CASES = {
    "text encoder stopped before the interruption": {"part.text_1.stop": 0.25},
    "text encoder stops after the interruption": {"part.text_1.stop": 0.75},
    "text encoder stops at the interruption": {"part.text_1.stop": 0.5},
    "text encoder frozen": {"part.text_1.train": False},
    "everything that is drawn": DRAWN,
    "accumulation": {"train.accumulation": 2, "adapter.dropout": 0.2},
    "v prediction without clipping": {"model.prediction": "v_prediction", "train.max_grad_norm": None},
    "constant": {"schedule.kind": "constant"},
    "linear": {"schedule.kind": "linear", "schedule.warmup": 0.6},
    "cosine": {"schedule.kind": "cosine", "schedule.warmup": 0.6},
    "cosine_restarts": {"schedule.kind": "cosine_restarts", "schedule.restarts": 2},
    "prodigy": {"optimizer.kind": "prodigy", **RATES_1},
    "prodigy, text encoder stopped": {"optimizer.kind": "prodigy", "part.text_1.stop": 0.25, **RATES_1},
}
LONG = {"train.visits": 40, "train.batch_size": 4, "adapter.dropout": 0.1, "output.checkpoint_every": 7, "output.save_every": 0}  # 80 steps


@pytest.fixture(scope="module")
def uninterrupted(train):
    return train(LONG)


def assert_equal_ends(same, one, other):
    assert one.events("finished")[-1]["step"] == other.events("finished")[-1]["step"]
    assert same(one.lora(), other.lora())
    (tensors, metadata), (tensors_2, metadata_2) = one.state(), other.state()
    assert same(tensors, tensors_2)
    assert {"adapter", "optimizer"} <= {k.partition("/")[0] for k in tensors}
    assert json.loads(metadata["state"]) == json.loads(metadata_2["state"])
    assert metadata["step"] == metadata_2["step"]


QUICK = ("text encoder stops at the interruption", "everything that is drawn", "prodigy")


@pytest.mark.parametrize("changes", [pytest.param(c, id=n, marks=() if n in QUICK else pytest.mark.slow) for n, c in CASES.items()])
def test_a_stopped_and_resumed_run_ends_like_an_uninterrupted_one(changes, train, same):
    if changes.get("optimizer.kind") == "prodigy":
        pytest.importorskip("prodigyopt")
    whole = train(changes)
    part = train(changes, stop_at=STEPS // 2)
    assert part.outcome == "stopped"
    assert part.events("stopped")[-1]["step"] == STEPS // 2
    assert not same(part.state()[0], whole.state()[0])
    assert not (part.root / "lora.safetensors").exists()
    part = train(changes, root=part.root, resume=True)
    assert part.outcome == "finished"
    assert [e["step"] for e in part.events("resumed")] == [STEPS // 2]
    assert_equal_ends(same, whole, part)


@pytest.mark.slow
def test_every_step_can_be_the_one_after_which_a_run_stops(train, same):
    whole = train(DRAWN)
    part = train(DRAWN, stop_at=0)
    for k in range(1, STEPS):
        assert part.events("stopped")[-1]["step"] == k - 1
        part = train(DRAWN, root=part.root, resume=True, stop_at=k)
    part = train(DRAWN, root=part.root, resume=True)
    assert [e["step"] for e in part.events("resumed")] == list(range(STEPS))
    assert [e["seq"] for e in part.events()] == list(range(len(part.events())))
    assert_equal_ends(same, whole, part)


def test_a_finished_run_says_so_and_how_to_go_on(train):
    whole = train()
    before = {p: p.read_bytes() for p in whole.root.rglob("*") if p.is_file() and p.name != "process.json"}
    with pytest.raises(RunError, match=r"is finished: it has made its 4 visits\. To train it further, .* --resume --visits 6\."):
        train(root=whole.root, resume=True)
    assert {p: p.read_bytes() for p in before} == before


def test_a_finished_run_that_lost_its_lora_makes_it_again(train, same):
    whole = train()
    before = whole.lora()
    (whole.root / "lora.safetensors").unlink()
    again = train(root=whole.root, resume=True)
    assert again.outcome == "finished"
    assert [e["step"] for e in again.events("resumed")] == [STEPS]
    assert same(before, again.lora())


def test_what_a_resumed_run_learns_depends_on_its_checkpoint(train, same):
    """Guards the tests above: a checkpoint of another run must end in other weights."""
    one, other = (train({"train.seed": s}, stop_at=STEPS // 2) for s in (0, 1))
    (one.root / "checkpoints" / "step-000004.safetensors").write_bytes(
        (other.root / "checkpoints" / "step-000004.safetensors").read_bytes()
    )
    assert not same(train(root=one.root, resume=True).lora(), train().lora())


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_resume_goes_on(command, wait_for, uninterrupted, same, tmp_path):
    process = command(tmp_path, LONG)
    wait_for(process, tmp_path, "step")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "--resume" in said
    *_, last = events.read(tmp_path / "events.jsonl")
    assert last["type"] == "stopped"
    assert 0 < last["step"] < 80
    assert RunDir(tmp_path).last_checkpoint()[0] == last["step"]

    process = command(tmp_path, None, "--resume")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert [e["step"] for e in events.read(tmp_path / "events.jsonl") if e["type"] == "resumed"] == [last["step"]]
    assert_equal_ends(same, uninterrupted, type(uninterrupted)("finished", tmp_path))


@pytest.fixture(scope="module")
def killed(command, wait_for, configure, tmp_path_factory):
    """A run of 80 steps that died by kill -9 after step 14 or later, and what a second process on its folder was told."""
    folder = RunDir(tmp_path_factory.mktemp("killed"))
    process = command(folder.root, LONG)
    wait_for(process, folder.root, "step")
    alive = is_alive(folder)
    with pytest.raises(RunError) as refused:
        run.train(configure(LONG), folder.root, resume=True)
    wait_for(process, folder.root, "checkpoint", 14)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return folder, alive, str(refused.value)


def test_a_second_process_is_refused_while_the_first_lives(killed):
    folder, alive, refused = killed
    assert alive
    assert refused.startswith(f"Another process is training in {folder.root}")
    assert not is_alive(folder)
    lock = Lock(folder)
    lock.acquire()
    assert json.loads(folder.process.read_text())["pid"] > 0
    lock.release()
    assert not any(e["type"] == "failed" for e in events.read(folder.events))


@pytest.mark.slow
def test_after_kill_9_only_the_steps_since_the_last_checkpoint_are_lost(killed, train, uninterrupted, same):
    folder = killed[0]
    step, _ = folder.last_checkpoint()
    written = list(events.read(folder.events))
    assert step >= 14
    assert step % 7 == 0
    assert max(e["step"] for e in written if "step" in e) < step + 7 + 7
    with folder.events.open("a") as file:
        file.write('{"v": 1, "seq": 99, "type": "st')
    ended = train(LONG, root=folder.root, resume=True)
    after = ended.events()
    assert after[: len(written)] == written
    assert [e["seq"] for e in after] == list(range(len(after)))
    assert [e["step"] for e in after if e["type"] == "resumed"] == [step]
    assert all(e["step"] > step for e in after[len(written) :] if e["type"] == "step")
    assert_equal_ends(same, uninterrupted, ended)


def test_a_stop_request_is_answered_before_the_run_ends(train):
    stopped = train(stop_at=2)
    (answer,) = stopped.events("answered")
    assert (answer["request"], answer["step"], answer["detail"]) == ("stop", 2, "done")
    assert stopped.events()[-1]["type"] == "stopped"
    assert list(RunDir(stopped.root).control.iterdir()) == []


def test_a_second_stop_request_is_answered_and_does_not_stop_the_resumed_run(train):
    """As when somebody clicks twice: the second request comes in while the run is ending."""

    def again(event):
        if event["type"] == "stage" and event["name"] == "exporting":
            control.send(folder, "stop")

    first = train(stop_at=0)
    folder = RunDir(first.root)
    stopped = train(root=folder.root, resume=True, stop_at=2, show=again)
    assert [e["detail"] for e in stopped.events("answered")] == ["done", "done", "too late: the run was ending or had ended"]
    assert train(root=folder.root, resume=True).outcome == "finished"


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once_and_the_run_can_be_resumed(command, wait_for, train, uninterrupted, same, tmp_path):
    process = command(tmp_path, LONG | {"output.checkpoint_every": 2})
    wait_for(process, tmp_path, "checkpoint", 6)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    ended = train(LONG, root=tmp_path, resume=True)
    assert_equal_ends(same, uninterrupted, ended)


@pytest.mark.slow
@pytest.mark.parametrize("after", [8, 29])
def test_kill_9_at_any_time(after, command, wait_for, train, uninterrupted, same, tmp_path):
    """Killed as soon as a step is seen: in the midst of a step, a checkpoint or an event."""
    process = command(tmp_path, LONG | {"output.checkpoint_every": 1})
    wait_for(process, tmp_path, "checkpoint", after)
    process.kill()
    assert process.wait() != 0
    process.stdout.close()
    ended = train(LONG | {"output.checkpoint_every": 1}, root=tmp_path, resume=True)
    assert ended.events("resumed")[-1]["step"] >= after
    assert_equal_ends(same, uninterrupted, ended)


def test_resume_says_what_is_missing(configure, tmp_path):
    with pytest.raises(RunError, match=r"no run to resume in .*config\.json is missing. Start it without --resume\."):
        run.train(configure(), tmp_path, resume=True)
