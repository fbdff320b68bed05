import itertools
import math
import random
from collections import Counter

import pytest

from trainer import plan
from trainer.config.load import load
from trainer.data.scan import DataError

SIZES = [(64, 64), (96, 48), (48, 96), (120, 40), (80, 64), (33, 90), (500, 71)]


@pytest.fixture
def lay_out(configure, draw_pictures, tmp_path_factory):
    """lay_out(sizes, changes): the plan of a run on pictures of these sizes, and its configuration."""

    def make(sizes, changes=None, seed=0):
        folder = draw_pictures(tmp_path_factory.mktemp("pictures"), sizes, seed)
        config = configure({"data": [{"folder": str(folder), "trigger": "zorp"}], **(changes or {})})
        return plan.make(config, 128), config

    return make


def counts(laid):
    return Counter(row.image for rows in laid.steps for row in rows)


@pytest.mark.parametrize("seed", range(25))
def test_every_image_trains_as_often_as_asked_in_any_layout(seed, lay_out):
    rng = random.Random(seed)
    sizes = [rng.choice(SIZES[: rng.randint(1, len(SIZES))]) for _ in range(rng.randint(1, 14))]
    batch, visits = rng.randint(1, 6), rng.randint(1, 7)
    laid, _ = lay_out(sizes, {"train.batch_size": batch, "train.visits": visits, "train.seed": seed})
    assert counts(laid) == dict.fromkeys(range(len(sizes)), visits)
    by_bucket = {}
    for rows in laid.steps:
        (bucket,) = {laid.bucket(row.image) for row in rows}
        by_bucket.setdefault(bucket, []).append(len(rows))
    assert by_bucket.keys() == laid.buckets().keys()
    for bucket, members in laid.buckets().items():
        *full, last = by_bucket[bucket]
        assert set(full) <= {min(batch, members)}
        assert 1 <= last <= min(batch, members)


def test_a_bucket_smaller_than_the_batch_is_a_smaller_batch(lay_out):
    laid, _ = lay_out([(64, 64)] * 6 + [(120, 40)] * 2, {"train.batch_size": 4, "train.visits": 3})
    assert sorted(laid.buckets().values()) == [2, 6]
    sizes = Counter((laid.bucket(rows[0].image)[0] > 64, len(rows)) for rows in laid.steps)
    assert sizes == {(False, 4): 4, (False, 2): 1, (True, 2): 3}


def test_each_round_shows_every_image_once_before_any_comes_again(lay_out):
    laid, _ = lay_out([(64, 64)] * 5, {"train.batch_size": 1, "train.visits": 6})
    order = [rows[0].image for rows in laid.steps]
    rounds = [order[k : k + 5] for k in range(0, 30, 5)]
    assert all(sorted(r) == [0, 1, 2, 3, 4] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 3


def test_buckets_are_spread_over_the_run(lay_out):
    laid, _ = lay_out([(64, 64)] * 8 + [(120, 40)] * 4, {"train.batch_size": 2, "train.visits": 20})
    wide = [k for k, rows in enumerate(laid.steps) if laid.bucket(rows[0].image)[0] > 64]
    assert len(wide) == 40
    for third in range(3):
        assert 10 <= sum(40 * third <= k < 40 * (third + 1) for k in wide) <= 17


def test_visits_of_a_folder_count_for_its_images_alone(configure, draw_pictures, tmp_path):
    data = [
        {"folder": str(draw_pictures(tmp_path / "a", [(64, 64)] * 3, 1)), "visits": 7},
        {"folder": str(draw_pictures(tmp_path / "b", [(64, 64), (120, 40)], 2))},
        {"folder": str(draw_pictures(tmp_path / "c", [(64, 64)] * 2, 3)), "visits": 1, "weight": 3},
        {"folder": str(draw_pictures(tmp_path / "d", [(64, 64)] * 2, 4)), "kind": "validation"},
    ]
    config = configure({"data": data, "train.visits": 3})
    laid = plan.make(config, 128)
    assert counts(laid) == {0: 7, 1: 7, 2: 7, 3: 3, 4: 3, 5: 1, 6: 1}
    assert [i.source for i in laid.images] == [0, 0, 0, 1, 1, 2, 2]
    assert [i.path.parent.name for i in laid.held_out] == ["d", "d"]
    assert len(laid.held_out_placements) == 2
    assert [plan.visits(config, d) for d in config.data] == [7, 3, 1, 3]
    # those seen more rarely are spread over the rounds, not all at the start or the end
    at = [k for k, rows in enumerate(laid.steps) for row in rows if row.image == 3]
    assert at[-1] - at[0] > len(laid.steps) / 4


def test_weights_of_folders_reach_the_batches(configure, draw_pictures, tmp_path, one_thread):
    import torch

    from trainer import families
    from trainer.data.store import Store
    from trainer.families.sources import DEMO

    data = [
        {"folder": str(draw_pictures(tmp_path / "a", [(64, 64)] * 3, 1)), "weight": 4},
        {"folder": str(draw_pictures(tmp_path / "b", [(64, 64)] * 2, 2)), "weight": 0.5},
    ]
    config, family = configure({"data": data}), families.get("sd1")
    laid = plan.make(config, 128)
    models = family.load(DEMO, torch.float32, torch.device("cpu"))
    store = Store(config, laid, family, models, trained={"text_1"})
    for n, rows in enumerate(laid.steps):
        wanted = [(4, 0.5)[laid.images[row.image].source] for row in rows]
        assert store.batch(n).weight.tolist() == wanted
        assert store.total_weight[n] == sum(wanted)


def test_the_plan_depends_on_the_settings_alone_and_changes_with_the_seed(lay_out):
    options = {"dataset.shuffle_tags": True, "dataset.flip": True, "dataset.caption_dropout": 0.3, "train.visits": 6}
    sizes = [(64, 64)] * 4 + [(120, 40)] * 3
    one, again, other = (lay_out(sizes, {**options, "train.seed": seed})[0] for seed in (3, 3, 4))
    assert one.steps == again.steps
    assert one.captions == again.captions
    assert one.placements == again.placements
    assert one.steps != other.steps
    assert [[r.image for r in rows] for rows in one.steps] != [[r.image for r in rows] for rows in other.steps]
    assert one.captions != other.captions


def test_an_option_does_not_change_what_another_draws(lay_out):
    sizes = [(64, 64)] * 4 + [(120, 40)] * 3
    plain, _ = lay_out(sizes)
    flipped, _ = lay_out(sizes, {"dataset.flip": True})
    dropped, _ = lay_out(sizes, {"dataset.flip": True, "dataset.caption_dropout": 0.5})
    assert [[r.image for r in rows] for rows in plain.steps] == [[r.image for r in rows] for rows in dropped.steps]
    assert [[r.flip for r in rows] for rows in flipped.steps] == [[r.flip for r in rows] for rows in dropped.steps]
    assert not any(r.flip for rows in plain.steps for r in rows)
    assert {r.flip for rows in flipped.steps for r in rows} == {True, False}


def test_captions_are_listed_once_and_all_are_drawn(lay_out):
    laid, _ = lay_out([(64, 64)] * 5, {"dataset.shuffle_tags": True, "dataset.caption_dropout": 0.3, "train.visits": 12})
    assert len(set(laid.captions)) == len(laid.captions)
    assert {row.caption for rows in laid.steps for row in rows} == set(range(len(laid.captions)))
    assert "" in laid.captions
    assert len(laid.captions) > 6  # five images, some of them with their tags in more than one order
    for rows in laid.steps:
        for row in rows:
            drawn = laid.captions[row.caption]
            assert not drawn or sorted(drawn.split(", ")) == sorted(laid.images[row.image].caption.split(", "))
            assert not drawn or drawn.startswith("zorp, ")


def test_without_options_each_image_has_its_own_caption(lay_out):
    laid, _ = lay_out([(64, 64)] * 3)
    assert set(laid.captions) == {f"zorp, thing {k}, red, small" for k in range(3)}
    assert all(laid.captions[r.caption] == laid.images[r.image].caption for rows in laid.steps for r in rows)


def test_small_images_and_held_out_twins_are_said(configure, draw_pictures, tmp_path):
    folder = str(draw_pictures(tmp_path, [(40, 40), (300, 300)]))
    config = configure({"data": [{"folder": folder}, {"folder": folder, "kind": "validation"}], "dataset.resolution": 128})
    said = " ".join(plan.make(config, 128).warnings)
    assert "1 of 2 images are enlarged by more than 1.5 times (most: 00.png, 40x40, 3.2 times)" in said
    assert "2 images are both trained and held out" in said


def test_an_empty_folder_is_refused(configure, tmp_path):
    with pytest.raises(DataError, match="has no image"):
        plan.make(configure({"data": [{"folder": str(tmp_path)}]}), 128)


def test_the_bases_own_resolution_is_taken_where_none_is_set(lay_out):
    laid, _ = lay_out([(300, 300)], {"dataset.resolution": None})
    assert laid.resolution == 128
    assert laid.bucket(0) == (128, 128)


def factors(configure, total, **schedule):
    config = configure({f"schedule.{k}": v for k, v in schedule.items()})
    return [plan.factor(config, n, total) for n in range(total)]


def test_constant_and_linear_and_cosine_from_start_to_end(configure):
    total = 1000
    for kind, floor in (("constant", 0.1), ("linear", 0.1), ("linear", 0.0), ("cosine", 0.1), ("cosine", 0.0)):
        f = factors(configure, total, kind=kind, warmup=0, floor=floor)
        assert f[0] == 1
        assert f[-1] == pytest.approx(1 if kind == "constant" else floor, abs=0.002)
        assert f == sorted(f, reverse=True)
        assert all(0 < x <= 1 for x in f)
        middle = {"constant": 1, "linear": (1 + floor) / 2, "cosine": (1 + floor) / 2}[kind]
        assert f[500] == pytest.approx(middle)
    assert factors(configure, total, kind="cosine", warmup=0, floor=0)[250] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "cosine_restarts"])
def test_warmup_rises_evenly_to_the_full_rate(kind, configure):
    f = factors(configure, 200, kind=kind, warmup=0.1)
    assert f[:20] == pytest.approx([(k + 1) / 21 for k in range(20)])
    assert f[20] == 1
    assert min(f) > 0


def test_cosine_restarts_as_often_as_asked(configure):
    f = factors(configure, 300, kind="cosine_restarts", warmup=0, restarts=3, floor=0.2)
    assert [k for k in range(300) if f[k] == 1] == [0, 100, 200]
    assert f[99] == f[199] == pytest.approx(0.2, abs=0.001)
    assert f[:100] == pytest.approx(f[100:200])


def test_a_run_of_one_step_has_a_rate(configure):
    for kind in ("constant", "linear", "cosine", "cosine_restarts"):
        assert factors(configure, 1, kind=kind) == [1.0]


def test_stop_step():
    assert plan.stop_step(1.0, 10) == 10
    assert plan.stop_step(0.5, 10) == 5
    assert plan.stop_step(0.24, 10) == 2
    assert plan.stop_step(0.001, 10) == 1
    assert plan.stop_step(0.999, 10) == 10


def prompts(configure, draw_pictures, folder, captions, **changes):
    draw_pictures(folder, [(64, 64)] * len(captions))
    for k, text in enumerate(captions):
        (folder / f"{k:02}.txt").write_text(text)
    data = {"folder": str(folder), **{k: v for k, v in changes.items() if k != "prompts"}}
    config = configure({"data": [data], "preview.prompts": changes.get("prompts", [])})
    return plan.preview_prompts(config, plan.make(config, 128).images)


def test_default_prompts_with_a_trigger(configure, draw_pictures, tmp_path):
    found = prompts(configure, draw_pictures, tmp_path, ["zorp in snow", "zorp on a very red rock"], trigger="zorp", class_word="robot")
    assert found == ("zorp on a very red rock", "zorp robot on a beach", "a drawing of zorp robot", "robot on a beach")


def test_default_prompts_with_a_trigger_but_no_class_word(configure, draw_pictures, tmp_path):
    found = prompts(configure, draw_pictures, tmp_path, ["a rock"], trigger="zorp")
    assert found[:3] == ("zorp, a rock", "zorp on a beach", "a drawing of zorp")
    assert len(found) == 4
    assert "zorp" not in found[3]


def test_default_prompts_without_a_trigger(configure, draw_pictures, tmp_path):
    found = prompts(configure, draw_pictures, tmp_path, ["a rock", "a green tree", "a sea"])
    assert found[0] == "a green tree"
    assert found[1] in ("a rock", "a sea")
    assert len(found) == len(set(found)) == 4


def test_prompts_of_the_user_are_taken_as_they_are(configure, draw_pictures, tmp_path):
    assert prompts(configure, draw_pictures, tmp_path, ["a rock"], trigger="zorp", prompts=["x", "y"]) == ("x", "y")


def test_copies_of_an_image_are_named(draw_pictures, tmp_path):
    folder = draw_pictures(tmp_path / "data", [(64, 64)] * 3)
    (folder / "copy.png").write_bytes((folder / "01.png").read_bytes())
    made = plan.make(load(values={"data": [{"folder": str(folder)}]}), 64)
    assert [w for w in made.warnings if "01.png, copy.png" in w]
    (folder / "copy.png").unlink()
    assert not [w for w in plan.make(load(values={"data": [{"folder": str(folder)}]}), 64).warnings if "more than once" in w]


def asked(configure, every):
    return configure({"preview.enabled": True, "validation.enabled": True} | dict.fromkeys(EVERY, every))


EVERY = ("preview.every", "output.save_every", "validation.every", "output.checkpoint_every")


@pytest.mark.parametrize("total", [1, 4, 9, 10, 39, 40, 41, 81, 266, 1400, 99_999])
def test_automatic_looks_and_files_are_spread_over_the_run(total, configure):
    due = plan.due(configure({"preview.enabled": True}), total)
    assert due.preview == due.save
    steps = [0, *due.save, total]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert len(gaps) == (8 if total >= 40 else max(1, total // 5))
    assert max(gaps) - min(gaps) <= 1
    assert total < 5 or min(gaps) >= 5  # the last of them too is not next to the end


def test_intervals_that_are_set_are_kept_and_0_is_never(configure):
    every_3 = plan.due(asked(configure, 3), 10)
    never = plan.due(asked(configure, 0), 10)
    for kind in ("preview", "save", "validation", "checkpoint"):
        assert [n for n in range(12) if n in getattr(every_3, kind)] == [3, 6, 9], kind
        assert not list(getattr(never, kind)), kind
    assert 9 not in plan.due(asked(configure, 3), 9).save  # the end is not along the way
    off = plan.due(configure({"preview.every": 3}), 10)
    assert not list(off.preview)


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_that_is_relaid_goes_on_as_the_new_one(seed, lay_out):
    rng = random.Random(seed)
    sizes = [rng.choice(SIZES[:3]) for _ in range(rng.randint(1, 9))]
    laid, config = lay_out(sizes, {"train.batch_size": rng.randint(1, 4), "train.visits": 4, "dataset.shuffle_tags": True})
    new_config = plan.with_visits(config, 9)
    new = plan.make(new_config, 128)
    n = rng.randint(0, len(laid.steps))
    both = plan.relaid(laid, new_config, n)
    assert plan.length(laid, new_config) == len(new.steps) == len(both.steps)

    def seen(one, steps):
        return [[(row.image, row.flip, one.captions[row.caption]) for row in rows] for rows in steps]

    assert seen(both, both.steps) == seen(laid, laid.steps[:n]) + seen(new, new.steps[n:])
    assert both.captions[: len(laid.captions)] == laid.captions
    assert plan.relaid(both, new_config, n) == both


def test_a_plan_that_would_be_over_names_the_least_length(lay_out):
    laid, config = lay_out([(64, 64)] * 5, {"train.batch_size": 2, "train.visits": 4})  # 2.5 steps a visit
    for n, least in ((2, 1), (3, 2), (7, 3), (8, 4)):
        assert len(plan.relaid(laid, plan.with_visits(config, least), n).steps) > n
        if least > 1:
            with pytest.raises(plan.TooShort, match=f"visits is {least - 1}, .* it must be at least {least} now"):
                plan.relaid(laid, plan.with_visits(config, least - 1), n)


def test_folders_with_visits_of_their_own_keep_their_proportion(configure, pictures):
    folders = [{"folder": str(pictures)}, {"folder": str(pictures), "visits": 2}, {"folder": str(pictures), "visits": 10}]
    config = configure({"data": folders, "train.visits": 4})
    longer = plan.with_visits(config, 10)
    assert [plan.visits(longer, d) for d in longer.data] == [10, 5, 25]
    assert [plan.visits(c, d) for c in [plan.with_visits(config, 1)] for d in c.data] == [1, 1, 2]
    assert plan.with_visits(config, 4) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part.unet.learning_rate": 1e-4, "part.text_1.train": False}, "cosine from 1e-4 to 10 % after 2 % warm-up"),
        (
            {"part.text_1.stop": 0.67, "schedule.kind": "linear", "schedule.floor": 0},
            "linear from 1e-3 (UNet), 5e-4 until 67 % of the run (text encoder) to 0 % after 2 % warm-up",
        ),
        ({"part.unet.learning_rate": 5e-4, "schedule.kind": "constant", "schedule.warmup": 0}, "constant at 5e-4"),
        (
            {"part.unet.learning_rate": 1.0, "part.text_1.learning_rate": 1.0, "schedule.kind": "cosine_restarts"},
            "3 cosine cycles from 1 to 10 % after 2 % warm-up",
        ),
        ({"part.unet.learning_rate": 7.5e-5, "part.text_1.train": False, "schedule.warmup": 0}, "cosine from 7.5e-5 to 10 %"),
    ],
)
def test_the_schedule_in_words(changes, said, configure):
    assert plan.describe_schedule(configure(changes)) == said


def test_the_schedule_names_the_parts_of_the_family(configure):
    config = configure(
        {"part.unet.learning_rate": 1e-4, "part.text_1.learning_rate": 2e-5, "part.text_2.train": True, "part.text_2.stop": 0.5}
    )
    assert "1e-4 (UNet), 2e-5 (text encoder), 5e-5 until 50 % of the run (second text encoder)" in plan.describe_schedule(config, "sdxl")
    assert "1e-4 (transformer), 2e-5 (text encoder)" in plan.describe_schedule(config, "sd3")


def test_the_bucket_step_is_one_of_the_family(configure, pictures):
    data = {"data": [{"folder": str(pictures)}], "dataset.resolution": 512, "dataset.bucket_step": 32}
    assert plan.make(configure(data), 512, "sdxl").buckets() and plan.make(configure(data), 512).buckets()
    with pytest.raises(ValueError, match=r"dataset.bucket_step is 32.*multiples of 64"):
        plan.make(configure(data), 512, "sd1")
    assert {
        w % 16 or h % 16 for w, h in plan.make(configure(data | {"dataset.resolution": 64, "dataset.bucket_step": ""}), 64, "sd3").buckets()
    } == {0}


# What the desk adds: the class beside the subject, images that are held out, the point that stays in sight


def test_images_of_the_class_are_seen_as_often_as_the_subject_and_without_its_trigger(configure, draw_pictures, tmp_path):
    folders = [
        {"folder": str(draw_pictures(tmp_path / "a", [(64, 64)] * 4, 1)), "trigger": "zorp", "class_word": "owl"},
        {"folder": str(draw_pictures(tmp_path / "b", [(64, 64)] * 3, 2)), "kind": "prior", "trigger": "zorp", "weight": 0.5},
    ]
    for path in (tmp_path / "b").glob("*.txt"):
        path.write_text("an owl", encoding="utf-8")
    config = configure({"data": folders, "train.visits": 6})
    laid = plan.make(config, 128)
    seen = counts(laid)
    assert [seen[k] for k in range(4)] == [6] * 4 and [seen[k] for k in range(4, 7)] == [8] * 3
    assert {laid.captions[r.caption] for rows in laid.steps for r in rows if r.image >= 4} == {"an owl"}
    assert len(laid.steps) == plan.length(laid, config)


def test_images_are_held_out_when_asked_for_or_from_twenty_on_and_never_trained(configure, draw_pictures, tmp_path):
    few, many = draw_pictures(tmp_path / "few", [(64, 64)] * 19, 1), draw_pictures(tmp_path / "many", [(64, 64)] * 45, 2)

    def laid(folder, **changes):
        return plan.make(configure({"data": [{"folder": str(folder)}], **changes}), 128)

    on = {"validation.enabled": True}
    assert not laid(few, **on).held_out and not laid(many).held_out
    assert len(laid(many, **on).held_out) == 2 and len(laid(few, **on, **{"dataset.hold_out": 3}).held_out) == 3
    found = laid(many, **on)
    assert not {i.digest for i in found.images} & {i.digest for i in found.held_out} and len(found.images) == 43
    assert [i.path for i in laid(many, **on).held_out] == [i.path for i in found.held_out]
    with pytest.raises(ValueError, match=r"dataset\.hold_out is 19; 19 images are there"):
        laid(few, **{"dataset.hold_out": 19})
    for path in sorted(few.glob("*.png"))[1:]:
        path.write_bytes((few / "00.png").read_bytes())
    with pytest.raises(ValueError, match="Lower it"):
        laid(few, **{"dataset.hold_out": 1})  # copies are not held out


def test_prior_preservation_needs_a_class_word(configure, pictures):
    with pytest.raises(ValueError, match=r"data\.1 has none"):
        plan.make(configure({"loss.prior_weight": 1.0}), 128)


def test_a_step_says_what_it_sees(configure, draw_pictures, tmp_path):
    folder = draw_pictures(tmp_path / "a", [(64, 64), (128, 64)])
    data = [{"folder": str(folder), "trigger": "zorp", "class_word": "owl"}]
    config = configure({"data": data, "loss.prior_weight": 1.0, "dataset.max_aspect": 1.0, "train.batch_size": 2, "dataset.flip": True})
    (folder / "crops.json").write_text('{"01.png": [0.9, 0.5]}')
    laid = plan.make(config, 128)
    rows = {r["file"].name: r for r in plan.seen(laid, config, 1)}
    assert rows["01.png"]["crop"] == [0.5, 0, 0.5, 1] and rows["00.png"]["crop"] == [0, 0, 1, 1]
    assert rows["00.png"]["caption"] == "zorp, thing 0, red, small" and rows["00.png"]["prior"] == "owl, thing 0, red, small"
    assert [r["mirrored"] for r in plan.seen(laid, config, 1)] == [r.flip for r in laid.steps[0]]
    with pytest.raises(ValueError, match="step is 0; this run has steps 1 to"):
        plan.seen(laid, config, 0)
