"""Steps that are played against the same steps computed by modules and autograd."""

import pytest
import torch
from test_step import build  # noqa: F401 (a fixture)

from trainer import tape
from trainer.plan import factor
from trainer.tape import LONG, RESTS, Recorder, Taped, Threads, why_not

pytestmark = pytest.mark.usefixtures("one_thread")


def run(made, runner, steps: int = 4, micro: int = 1) -> list[torch.Tensor]:
    """The adapter and the sum of losses after some steps, each batch in `micro` parts."""
    total = len(made.plan.steps)
    for n in range(min(steps, total)):
        rows = len(made.plan.steps[n])
        slots = [(index, torch.ones(len(index))) for index in torch.arange(rows).tensor_split(min(micro, rows))]
        runner.run(n, made.store.batch(n), slots, made.store.total_weight[n], factor(made.config, n, total))
    return [*(p.detach().clone() for part in made.step.stops for p in made.adapter.parameters(part)), made.step.total.clone()]


def masked(draw_pictures, folder) -> dict:
    import PIL.Image

    draw_pictures(folder, [(64, 64)] * 4)
    left = PIL.Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    left.save(folder / "01-masklabel.png")
    return {"data": [{"folder": str(folder), "trigger": "zorp", "class_word": "owl"}], "loss.prior_weight": 0.5}


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({"train.batch_size": 2}, {}),
        ({"train.batch_size": 2, "adapter.targets": ["attention"], "part.text_1.train": False}, {}),
        ({"train.batch_size": 2, "loss.min_snr_gamma": None, "loss.noise_offset": 0.1, "dataset.flip": True}, {"text_1": 2}),
        ("masked", {}),
    ],
    ids=["all layers", "attention alone", "a part that stops", "masks and the class"],
)
def test_what_is_played_equals_what_is_computed_to_the_last_bit(changes, stops, build, draw_pictures, tmp_path):  # noqa: F811
    changes = masked(draw_pictures, tmp_path / "a") if changes == "masked" else changes
    computed, played = build(changes, stops), build(changes, stops)
    assert why_not(played.step, LONG) is None
    want = run(computed, computed.step, micro=2)
    runner = Taped(played.step)
    got = run(played, runner, micro=2)
    assert runner.plays >= 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
def test_the_rows_of_a_batch_are_shared_among_threads_and_add_up(build):  # noqa: F811
    def play(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        made = build({"train.batch_size": 4, "dataset.bucket_step": 64})
        runner = Taped(made.step)
        assert torch.get_num_threads() == threads
        run(made, runner, steps=1)
        assert torch.get_num_threads() == threads and runner.plays == threads
        return [made.step.weights.grad.clone(), made.step.total.clone()]

    try:
        one, two, again = play(1), play(2), play(2)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(two, one, strict=True))


@pytest.mark.slow  # two threads wait for each other while other tests run
def test_threads_come_and_go_without_a_trace(build, monkeypatch, request):  # noqa: F811
    torch.set_num_threads(2)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    computed, played = build({"train.batch_size": 1}), build({"train.batch_size": 1})
    used = []

    def one_and_all(choice: Threads) -> int:
        used.append(list(choice._took)[len(used) % len(choice._took)])
        return used[-1]

    monkeypatch.setattr(Threads, "pick", one_and_all)
    want, got = run(computed, computed.step), run(played, Taped(played.step))
    assert torch.get_num_threads() == 2 and len(used) == 4 and 2 in used
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("depends", "numbers"), [(False, [2, 1]), (True, [2])], ids=["the same", "another"])
def test_one_thread_plays_only_where_it_gives_the_same(depends, numbers, build, monkeypatch):  # noqa: F811
    def play(self, player, tape, piece, threads):
        self.step.loss += threads * depends

    monkeypatch.setattr(Taped, "_play_one", play)
    made = build({"train.batch_size": 1})
    runner = Taped(made.step)
    runner.threads = 2  # as if there were: none of them plays here
    run(made, runner, steps=1)
    torch.set_num_threads(1)
    assert [list(choice._took) for choice in runner._choices.values()] == [numbers]


def take(choice: Threads, seconds, plays: int) -> list[int]:
    """The numbers of threads of so many plays, each of which takes `seconds(threads)`."""
    taken = []
    for _ in range(plays):
        taken.append(choice.pick())
        choice.tell(taken[-1], seconds(taken[-1]))
    return taken


def test_the_quicker_number_is_taken_and_the_other_seldom_tried():
    choice = Threads([4, 1])
    idle, busy = {4: 0.03, 1: 0.05}.get, {4: 0.3, 1: 0.05}.get
    first = take(choice, idle, 1000)
    assert set(first) == {4, 1} and first.count(1) < 10 and first[:2] == [4, 1]
    assert take(choice, busy, 20).count(4) <= 3
    assert take(choice, busy, 2 * RESTS[1]).count(4) <= 6
    later = take(choice, idle, 2 * RESTS[1])
    assert later[-RESTS[1] // 2 :].count(1) <= 5
    assert set(take(Threads([4]), idle, 600)) == {4}


def test_the_choice_is_not_misled_by_one_play_that_took_long():
    choice, idle = Threads([4, 1]), {4: 0.03, 1: 0.05}.get
    take(choice, idle, 10)
    choice.tell(4, 9.0)
    assert take(choice, idle, 3) == [4, 4, 4]


def test_weights_that_are_loaded_afterwards_are_the_ones_that_play(build):  # noqa: F811
    made = build()
    runner = Taped(made.step)
    begun = {k: t.clone() for k, t in made.adapter.state().items()}
    first = run(made, runner, steps=1)
    run(made, runner, steps=3)
    made.adapter.load(begun)
    made.optimizer.state.clear()
    made.step.total.zero_()
    assert all(torch.equal(a, b) for a, b in zip(run(made, runner, steps=1), first, strict=True))


def test_dropout_and_other_dtypes_are_not_for_tapes(build):  # noqa: F811
    assert "dropout" in why_not(build({"adapter.dropout": 0.2}).step, LONG)
    made = build()
    made.models.parts["unet"].bfloat16()
    assert "float32" in why_not(made.step, LONG) and "fewer than" in why_not(made.step, LONG - 1)


@pytest.mark.parametrize(
    "function",
    [lambda x: x * x.sum().item(), lambda x: x.nonzero() + 1, lambda x: x[x > 0].sum(), lambda x: x.view(torch.int32) + 1],
    ids=["read by Python", "as many as there are", "by a mask", "read as another dtype"],
)
def test_what_depends_on_the_data_has_no_tape(function):
    x = torch.randn(4, 4)
    with Recorder([x]) as recorder:
        function(x)
    assert recorder.tape() is None and recorder.why


def test_where_there_is_no_tape_the_step_is_computed(build, monkeypatch):  # noqa: F811
    computed, other = build(), build()
    want = run(computed, computed.step, steps=2)
    spread = other.step.family.weight
    monkeypatch.setattr(
        type(other.step.family), "weight", lambda self, models, t, gamma: spread(models, t, gamma) * (1 + 0 * t.sum().item())
    )
    runner = Taped(other.step)
    got = run(other, runner, steps=2)
    assert runner.plays == 0 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_long_run_is_played_and_ends_the_same(train, same, monkeypatch):
    computed, plays = train({"train.visits": 3}), []
    play = Taped._play
    monkeypatch.setattr(tape, "LONG", 1)
    monkeypatch.setattr(Taped, "_play", lambda self, *pieces: plays.append(1) or play(self, *pieces))
    played = train({"train.visits": 3})
    assert plays and same(computed.lora(), played.lora())
