import socket
import time

import psutil
import pytest

import trainer.loop
from trainer import events

DRAWN = {"adapter.dropout": 0.2, "dataset.flip": True, "dataset.caption_dropout": 0.2}  # all that a stray draw could disturb
PREVIEWS = {
    "preview.enabled": True,
    "preview.every": 3,
    "preview.steps": 2,
    "preview.guidance": 3.0,
    "preview.prompts": ["zorp", "a cat"],
}
VALIDATION = {"validation.enabled": True, "validation.every": 3, "validation.draws": 1}

ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@pytest.fixture
def each_loss(monkeypatch):
    """Have the loop say the loss of every step."""
    monkeypatch.setattr(trainer.loop, "EVENTS_EVERY", 1)


def losses(trained):
    return {e["step"]: e["loss"] for e in trained.events("step")}


def assert_close(one, other):
    """Adapters that differ by rounding alone: by less than a thousandth of what was learnt (0.00006 seen; another seed: 20).

    Not element by element, since Adam makes a whole step of a gradient that is rounding alone.
    """
    a, b = ({k: v.double() for k, v in t.state()[0].items() if k.startswith("adapter/")} for t in (one, other))
    assert a.keys() == b.keys()
    apart = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5
    learnt = sum(float(a[k].square().sum()) for k in a if k.endswith(".up")) ** 0.5  # these start at 0
    assert learnt > 0
    assert apart < 1e-3 * learnt


@pytest.fixture(scope="module")
def plain(train):
    return train(DRAWN)


def test_the_same_settings_give_the_same_weights(train, plain, same):
    assert same(plain.lora(), train(DRAWN).lora())


@pytest.mark.parametrize("changes", [PREVIEWS, VALIDATION, PREVIEWS | VALIDATION], ids=["previews", "validation", "both"])
@pytest.mark.parametrize("text", [{}, {"part.text_1.train": False}], ids=["text encoder trained", "text encoder frozen"])
def test_looking_at_a_run_does_not_change_it(changes, text, train, plain, same):
    plain = train(DRAWN | text) if text else plain
    looked = train(DRAWN | text | changes)
    seen = {"preview": [0, 3, 6, 8], "validation": [0, 3, 6, 8]}
    for kind, steps in seen.items():
        wanted = steps if f"{kind}.enabled" in changes else []
        assert [e["step"] for e in looked.events(kind)] == wanted
    assert same(looked.lora(), plain.lora())
    assert losses(looked) == losses(plain)


@pytest.mark.slow
def test_validation_starts_from_the_base_and_falls(train):
    measured = train(VALIDATION | {"validation.draws": 4, "train.visits": 24}).events("validation")
    assert measured[-1]["train"] < measured[0]["train"] - 0.01


def test_another_seed_gives_other_weights_and_losses(train, plain, same, each_loss):
    other, again = train(DRAWN | {"train.seed": 1}), train(DRAWN)
    assert not same(other.lora(), again.lora())
    assert not set(losses(other).values()) & set(losses(again).values())


@pytest.mark.parametrize("limit", [pytest.param(0.01, id="clipped"), pytest.param(None, id="unclipped", marks=pytest.mark.slow)])
def test_accumulation_changes_nothing_but_rounding(limit, train, each_loss):
    options = {"loss.min_snr_gamma": 1, "train.max_grad_norm": limit}
    whole = train(options)
    assert len(losses(whole)) == 8
    for accumulation in (2, 4):
        cut = train(options | {"train.accumulation": accumulation})  # 3 rows in 2 or 4 parts leave empty slots
        assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
        assert_close(cut, whole)


def test_weights_of_folders_count_over_the_whole_batch(train, draw_pictures, tmp_path, each_loss):
    """Rows of weight 1 and 5 in one batch: a mean over each part of it would be something else."""
    folders = [
        {"folder": str(draw_pictures(tmp_path / "a", [(64, 64)] * 3, seed=1)), "weight": 5},
        {"folder": str(draw_pictures(tmp_path / "b", [(64, 64)] * 2, seed=2)), "visits": 8},
    ]
    whole, cut = (train({"data": folders, "train.accumulation": k}) for k in (1, 2))
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(cut, whole)


@pytest.mark.slow
def test_two_processes_equal_one(train, command, draw_pictures, tmp_path):
    """By accelerate on the CPU (gloo). Batches of 4 and of 3 rows: in the latter one process has an empty slot."""
    folders = [
        {"folder": str(draw_pictures(tmp_path / "a", [(64, 64)] * 3, seed=1)), "weight": 5},
        {"folder": str(draw_pictures(tmp_path / "b", [(64, 64), (96, 48), (96, 48), (96, 48)], seed=2))},
    ]
    changes = {"data": folders, "train.accumulation": 2, "output.checkpoint_every": 4} | VALIDATION | PREVIEWS
    alone = train(changes)
    process = command(tmp_path / "run", changes, launcher=ACCELERATE)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    both = type(alone)("finished", tmp_path / "run")
    assert [e["seq"] for e in both.events()] == list(range(len(both.events())))
    assert [(e["type"], e.get("step")) for e in both.events()] == [(e["type"], e.get("step")) for e in alone.events()]
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    for one, two in zip(alone.events("validation"), both.events("validation"), strict=True):
        assert two["train"] == pytest.approx(one["train"], rel=1e-4)
    assert_close(both, alone)
    assert {p.name for p in both.root.rglob("*")} == {p.name for p in alone.root.rglob("*")}


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_which_one_resumes(train, command, wait_for, tmp_path):
    changes = {"train.visits": 40, "output.checkpoint_every": 4, "output.save_every": 0}
    process = command(tmp_path, changes, launcher=ACCELERATE)
    wait_for(process, tmp_path, "checkpoint", 8)
    ranks = {c.environ().get("RANK"): c for c in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    last = list(events.read(tmp_path / "events.jsonl"))[-1]
    assert last["type"] == "failed" and last["text"].startswith("Another process of this run ended")
    alone, resumed = train(changes), train(changes, root=tmp_path, resume=True)
    assert resumed.outcome == "finished" and resumed.events("resumed")[0]["step"] >= 8
    assert_close(resumed, alone)


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_hangs_ends_when_it_is_told_to(command, wait_for, tmp_path):
    """Its main thread is within the sum, where no signal handler of Python's runs (with NCCL it is there for ever)."""
    process = command(tmp_path, {"train.visits": 400, "output.checkpoint_every": 4, "output.save_every": 0}, launcher=ACCELERATE)
    wait_for(process, tmp_path, "checkpoint", 8)
    ranks = {c.environ().get("RANK"): c for c in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].suspend()
    time.sleep(2)
    ranks["0"].terminate()
    ranks["0"].wait(timeout=25)
    ranks["1"].kill()
    process.communicate(timeout=120)
    last = list(events.read(tmp_path / "events.jsonl"))[-1]
    assert last["type"] == "failed" and last["text"].startswith("This run was told to end and could not")


@pytest.mark.slow
def test_three_processes_equal_one_and_are_resumed_by_one(train, command, tmp_path):
    changes = {"part.text_1.stop": 0.5, "output.checkpoint_every": 4}
    alone = train(changes)
    process = command(tmp_path / "run", changes, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    all_three = type(alone)("finished", tmp_path / "run")
    assert_close(all_three, alone)
    all_three.checkpoints()[-1].unlink()
    (tmp_path / "run" / "lora.safetensors").unlink()
    resumed = train(changes, root=tmp_path / "run", resume=True)
    assert [e["step"] for e in resumed.events("resumed")] == [4]
    assert_close(resumed, alone)


@pytest.mark.slow
def test_two_machines_that_share_no_disk_equal_one_and_do_not_resume_apart(train, command, tmp_path):
    def run(*more):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        nodes = ("-m", "torch.distributed.run", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port))
        machines = [command(tmp_path / f"{k}", {}, *more, launcher=(*nodes, "--node_rank", f"{k}")) for k in range(2)]
        return [(m.communicate(timeout=300)[0], m.returncode) for m in machines]

    ended = run()
    assert [code for _, code in ended] == [0, 0], ended
    assert not (tmp_path / "1").exists()
    alone = train({})
    assert_close(type(alone)("finished", tmp_path / "0"), alone)
    for said, code in run("--resume", "--visits", "6"):  # the second finds no checkpoint: it would start anew
        assert code == 1 and "The checkpoints of this run's 2 processes are not the same" in said
