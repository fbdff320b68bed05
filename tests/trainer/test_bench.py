"""The bench: options that make no run, the figures' names, a whole comparison on the demo base, and what it says of an older one."""

from __future__ import annotations

import json

import pytest

from trainer import __main__ as cli
from trainer.bench import report
from trainer.bench.case import BenchError, Case, check, order, settings
from trainer.bench.models import make
from trainer.config.load import ConfigError

SIDE = {"first_step_s", "step_ms", "images_per_s", "gpu_busy_ms", "peak_device_gib", "peak_host_gib", "final_loss"}


@pytest.mark.parametrize(
    "case, said",
    [
        (Case(size=100), "--size is 100; for demo it must be a multiple of 8, such as 96 or 104"),
        (Case(model="sdxl", size=1000), "such as 960 or 1024"),
        (Case(batch=0), "--batch is 0; it must be at least 1"),
        (Case(assignments=("train.batch_size=2",)), "the bench sets this itself"),
    ],
    ids=str,
)
def test_options_that_make_no_run_are_told(case, said):
    with pytest.raises(BenchError) as error:
        check(case)
    assert said in str(error.value)


def test_settings_of_a_case_are_checked_before_anything_is_made():
    with pytest.raises(ConfigError):
        check(Case(rank=0))
    check(Case(model="sdxl", checkpointing=True, targets=("attention", "feed_forward"), assignments=("train.memory=4bit",)))


def test_both_sides_take_the_same_rows(pictures, tmp_path):
    from trainer.bench.case import draw_images

    case = Case(batch=2)
    draw_images(tmp_path / "images", case)
    config = settings(case, tmp_path, tmp_path / "images", "cpu", "fp32")
    rows = order(case, config)
    assert len(rows) >= sum(case.on("cpu")) and all(len(step) == 2 for step in rows)
    assert len({image for step in rows for image, _ in step}) == 12
    assert config.train.memory == "fast" and config.optimizer.beta2 == 0.999


def test_the_demo_base_is_the_projects_own(tmp_path):
    assert (make("demo", tmp_path) / "model_index.json").exists() and not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A comparison on the demo base, as the command writes it."""
    path = tmp_path_factory.mktemp("bench") / "new.json"
    arguments = ["bench", "--size", "64", "--steps", "4", "--device", "cpu", "--no-previews", "--json", str(path)]
    assert cli.main(arguments) == 0
    return path


@pytest.mark.slow
def test_a_comparison_has_all_figures_and_both_sides_learn_the_same(found, capsys):
    told = json.loads(found.read_text())
    for side in ("ours", "reference"):
        assert told[side].keys() >= SIDE and told[side]["step_ms"] > 0 and told[side]["first_step_s"] > 0
    assert told.keys() >= {"speedup", "share_of_limit", "versions", "device", "case"}
    assert told["speedup"] == pytest.approx(told["reference"]["step_ms"] / told["ours"]["step_ms"], rel=1e-4)
    assert told["ours"]["final_loss"] == pytest.approx(told["reference"]["final_loss"], rel=1e-3)
    assert told["ours"]["trained_norm"] == pytest.approx(told["reference"]["trained_norm"], rel=1e-3)
    assert told["limit"]["step_tflop"] > 0 and 0 < told["share_of_limit"] < 1
    assert "Note:" not in report.text(told)


@pytest.mark.slow
def test_an_older_file_is_compared_with(found, tmp_path):
    now = json.loads(found.read_text())
    old = json.loads(found.read_text())
    old["ours"]["step_ms"] *= 2
    old["device"] = "Another machine"
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    said = report.compare(now, report.read(path))
    assert "0.5 better" in said and "Note: device was Another machine" in said


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(BenchError, match="is not a file that bench --json has written"):
        report.read(path)
    with pytest.raises(BenchError, match="cannot be read"):
        report.read(tmp_path / "none.json")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    arguments = ["bench", "--processes", "2", "--size", "64", "--steps", "20", "--device", "cpu", "--no-previews", "--json", str(path)]
    assert cli.main(arguments) == 0
    told = json.loads(path.read_text())
    assert told["losses_apart"] < 1e-4 and told["norms_apart"] < 1e-4
    assert len(told["all"]["losses"]) == len(told["same"]["losses"]) > 3 and told["one"]["losses"] != told["same"]["losses"]
    assert told["scaling"] == pytest.approx(told["all"]["images_per_s"] / told["one"]["images_per_s"], rel=1e-4)
    assert "2 processes, 1 each a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--processes", "1"], "--processes is 1; it must be at least 2"),
        (["--processes", "2", "--only", "ours"], "--processes times no reference: leave --only out"),
    ],
)
def test_processes_that_make_no_comparison_are_told(arguments, said):
    args = cli.parser().parse_args(["bench", *arguments])
    with pytest.raises(ValueError, match=said):
        args.call(args)
