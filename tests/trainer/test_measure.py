import json

import pytest

from trainer import control, events
from trainer.__main__ import main
from trainer.measure import measure
from trainer.run_dir import RunDir, RunError, is_alive

pytestmark = pytest.mark.usefixtures("one_thread")
LOOKS = {
    "preview.enabled": True,
    "preview.every": 1,
    "validation.enabled": True,
    "validation.every": 1,
    "output.save_every": 1,
    "output.checkpoint_every": 1,
    "train.visits": 100,
}


def read(root):
    return list(events.read(root / "events.jsonl"))


def test_ten_steps_are_measured_and_no_weights_stay(settings, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(LOOKS)))
    for turn in (1, 2):  # again in the same folder
        assert main(["measure", str(config), "--run-dir", str(tmp_path)]) == 0
        seen = read(tmp_path)
        assert [e["type"] for e in seen].count("measured") == turn
    *_, found, finished = seen
    assert finished["type"] == "finished"
    assert [e["seq"] for e in seen] == list(range(len(seen)))
    assert found["type"] == "measured"
    assert 0 < found["seconds_per_step"] < 10
    assert found["images_per_s"] == pytest.approx(3.5 / found["seconds_per_step"], rel=0.3)  # batches of 4 and 3
    assert 0.1 < found["memory_gib"] < 100
    assert found["start_seconds"] > 0
    assert found["device"]
    assert "s a step" in capsys.readouterr().out
    inner = read(tmp_path / "run")
    assert [e["step"] for e in inner if e["type"] == "step"] == [1, 10]
    assert not [e for e in inner if e["type"] in ("preview", "validation")]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert json.loads(config.read_text())["train"]["visits"] == 100
    assert not is_alive(RunDir(tmp_path))


@pytest.mark.parametrize("visits", [1, 2])
def test_a_run_shorter_than_that_is_measured_whole(visits, configure, tmp_path):
    assert measure(configure({"train.visits": visits}), tmp_path) == "finished"
    found = read(tmp_path)[-2]
    assert found["seconds_per_step"] > 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_stop_request_ends_it(configure, tmp_path):
    def show(event):
        if event["type"] == "stage" and event["name"] == "training":
            control.send(RunDir(tmp_path), "stop")

    assert measure(configure({"train.visits": 500}), tmp_path, show) == "stopped"
    seen = read(tmp_path)
    assert seen[-1]["type"] == "stopped"
    assert not [e for e in seen if e["type"] == "measured"]
    assert max((e["step"] for e in read(tmp_path / "run") if e["type"] == "step"), default=0) < 5
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_wrong_is_said(configure, tmp_path):
    with pytest.raises(RunError, match=r"model\.source is '/nowhere/x', and there is no such file or folder"):
        measure(configure({"model.source": "/nowhere/x"}), tmp_path)
    *_, failed = read(tmp_path)
    assert failed["type"] == "failed"
    assert failed["text"].startswith("model.source is '/nowhere/x'")


def test_a_folder_of_somebody_else_is_left_alone(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "photo.png").write_bytes(b"x")
    with pytest.raises(RunError, match="holds something else than a measuring"):
        measure(configure(), tmp_path)
    assert (tmp_path / "run" / "photo.png").exists()


def test_the_computer_is_kept_awake_while_a_run_lasts_and_a_failure_of_that_is_none(train, monkeypatch):
    from contextlib import contextmanager

    import wakepy

    told = []

    @contextmanager
    def running(**options):
        told.append(options)
        yield
        told.append("over")

    monkeypatch.setattr(wakepy.keep, "running", running)
    train(show=lambda event: told.append(event["type"]) if event["type"] in ("step", "finished") else None)
    assert told == [{"on_fail": "pass"}, "step", "step", "finished", "over"]

    def broken(**options):
        raise OSError("no bus")

    monkeypatch.setattr(wakepy.keep, "running", broken)
    assert train().outcome == "finished"
