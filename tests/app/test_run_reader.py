"""A run's folder as the page sees it: read piece by piece, whatever state its files are in."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from app import run_reader
from app.errors import Problem
from app.paths import Home
from app.run_reader import Run, Tail
from app.runner import Look
from app.settings import Settings
from trainer.events import Writer

RUNNING = Look("running")


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def folder(home):
    folder = home.runs / "20260101-120000-zorp"
    folder.mkdir()
    config = {"output": {"name": "zorp"}, "model": {"source": "/models/dream.safetensors"}, "train": {"visits": 100}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def begin(write: Writer, total: int = 100) -> None:
    write("stage", name="loading")
    start = {"images": 7, "buckets": [[64, 64, 7]], "device": "CPU", "dtype": "fp32", "reasons": ["no GPU"]}
    write("started", name="zorp", total=total, **start, visits=100)
    write("stage", name="training")


def step(write: Writer, n: int, loss: float | None = None) -> None:
    more = {"rate": {"unet": 1e-3, "text_1": 5e-4}, "images_per_s": 3.0, "eta_s": 9.5, "epoch": n / 10}
    write("step", step=n, loss=loss if loss is not None else 1 / (n + 1), **more)


def view(run: Run, since: int | None = None, look: Look = RUNNING) -> dict:
    run.refresh()
    return run.view(look, None, since)


def test_a_run_grows_and_only_what_is_new_is_told(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    begin(write)
    for n in (10, 20):
        step(write, n)
    write("preview", step=0, images=["step-000000-1.png"], prompts=["a zorp"])
    write("validation", step=20, train=0.5, held_out=None)
    first = view(run)
    assert first["reset"] and first["seq"] == 6
    assert first["points"]["loss"] == [[10, 1 / 11], [20, 1 / 21]]
    assert first["points"]["validation"] == [[20, 0.5, None]]
    assert first["points"]["rate"]["text_1"] == [[10, 5e-4], [20, 5e-4]]
    told = first["run"]
    assert (told["step"], told["total"], told["percent"], told["stage"], told["eta_s"]) == (20, 100, 20, "training", 9.5)
    assert (told["name"], told["model"], told["visits"], told["epoch"]) == ("zorp", "dream.safetensors", 100, 2.0)
    assert told["thumb"] == "/api/runs/zorp/previews/step-000000-1.png?size=128"

    nothing = view(run, since=6)
    assert not nothing["reset"] and nothing["points"] == {"loss": [], "validation": [], "rate": {"unet": [], "text_1": []}}
    assert nothing["previews"] == [] and nothing["run"]["loss"] == 1 / 21
    step(write, 30)
    more = view(run, since=6)
    assert more["points"]["loss"] == [[30, 1 / 31]] and not more["reset"]
    assert view(run, since=99)["reset"]  # another file than the page had seen


def test_how_far_the_encoding_is_stands_in_the_view_while_it_lasts(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    write("stage", name="encoding")
    assert view(run)["run"]["encoded"] is None
    write("progress", what="images", done=3, total=20, eta_s=8.5)
    assert view(run)["run"]["encoded"] == {"what": "images", "done": 3, "total": 20, "eta_s": 8.5}
    assert view(run, look=Look("interrupted"))["run"]["encoded"] is None
    write("stage", name="training")
    write("progress", what="captions", done=1, total=2, eta_s=1.0)  # a longer run reads more captions; that is not a stage
    assert view(run)["run"]["encoded"] is None


def test_a_torn_line_waits_for_its_end(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    begin(write)
    step(write, 10)
    line = (json.dumps({"v": 1, "seq": 4, "time": 1.0, "type": "warning", "text": "größer"}, ensure_ascii=False) + "\n").encode()
    with (folder / "events.jsonl").open("ab") as file:
        for part in (line[:40], line[40:-1]):
            file.write(part)
            file.flush()
            assert view(run)["seq"] == 3
        file.write(line[-1:])
    assert view(run)["run"]["warnings"] == ["größer"]


def test_a_resumed_run_takes_back_what_came_after(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    begin(write)
    for n in (10, 20, 30):
        step(write, n)
        write("preview", step=n, images=[f"step-{n:06d}-1.png"], prompts=["p"])
        name = f"zorp-{n:06d}.safetensors"
        (folder / name).touch()
        write("exported", step=n, file=name, bytes=1, modules={}, final=False)
    seen = view(run)["seq"]
    write("stage", name="loading")
    write("resumed", step=20)
    step(write, 25)
    again = view(run, since=seen)
    assert again["reset"] and [p[0] for p in again["points"]["loss"]] == [10, 20, 25]
    assert [p["step"] for p in again["previews"]] == [10, 20] and [e["step"] for e in again["exports"]] == [10, 20]
    after = again["seq"]
    step(write, 30)
    assert view(run, since=after)["points"]["loss"] == [[30, 1 / 31]]
    write("resumed", step=30)  # at its very end: nothing is taken back, so nothing is sent again
    assert not view(run, since=after)["reset"]


def test_a_changed_length_and_prompts_show(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    begin(write)
    step(write, 50)
    assert view(run)["run"]["percent"] == 50
    write("changed", step=50, visits=200, total=200)
    write("changed", step=50, prompts=["a blue zorp"])
    told = view(run)["run"]
    assert (told["total"], told["percent"], told["visits"], told["prompts"]) == (200, 25, 200, ["a blue zorp"])


def test_a_run_that_ended_between_two_step_events_is_at_its_last_step(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    begin(write)
    step(write, 10)
    write("stopped", step=13, seconds=1.0)
    told = view(run, look=Look("stopped", ""))["run"]
    assert (told["step"], told["percent"]) == (13, 13)


def test_a_run_started_anew_in_its_folder_is_read_anew(folder):
    path = folder / "events.jsonl"
    write, run = Writer(path), Run("zorp", folder)
    begin(write)
    write("failed", step=0, seconds=1.0, text="no disk")
    assert view(run)["seq"] == 3
    write.close()
    path.unlink()
    assert view(run)["seq"] == -1 and run.started == {}
    time.sleep(0.01)
    write = Writer(path)
    begin(write)
    step(write, 10)
    step(write, 20)
    told = view(run, since=3)
    assert told["seq"] == 4 and [p[0] for p in view(run)["points"]["loss"]] == [10, 20]


def test_long_curves_are_thinned_and_keep_their_extremes():
    points = [[n, 1.0] for n in range(20_000)]
    points[777][1], points[15_003][1] = 9.0, -3.0
    thin = run_reader.thin(points)
    assert len(thin) <= 400 and thin[0] == points[0] and thin[-1] == points[-1]
    assert points[777] in thin and points[15_003] in thin
    assert [p[0] for p in thin] == sorted({p[0] for p in thin})
    assert run_reader.thin(points[:400]) == points[:400]
    assert run_reader.thin([]) == []


def test_a_command_line_run_without_anything_else(home, tmp_path):
    folder = tmp_path / "elsewhere" / "hand"
    folder.mkdir(parents=True)
    write = Writer(folder / "events.jsonl")
    begin(write)
    write("failed", step=0, seconds=0.1, text="It broke.")
    found = run_reader.folders(home, Settings(run_folders=(str(tmp_path / "elsewhere"), str(tmp_path / "nowhere"))))
    assert found == {"hand": folder}
    told = view(Run("hand", folder), look=Look("failed", "It broke."))["run"]
    assert (told["name"], told["state"], told["text"], told["model"]) == ("zorp", "failed", "It broke.", "demo")
    assert "resume" in told["actions"]


def test_ids_are_looked_up_and_never_joined(home, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    (home.root / "config.json").write_text("{}")
    (home.runs / "link").symlink_to(secret)
    settings = Settings(run_folders=())
    assert run_reader.find(home, settings, folder.name) == folder
    for id in ("..", ".", "", "../../secret", str(secret), "link", f"{folder.name}/", f"{folder.name}\0", "%2e%2e"):
        with pytest.raises(Problem) as told:
            run_reader.find(home, settings, id)
        assert told.value.status == 404
    for name in ("..", "../config.json", "config.json", str(folder / "config.json"), ".hidden.png", "a.png"):
        with pytest.raises(Problem):
            run_reader.inside(folder, name, ".png")


def test_two_folders_of_one_name_are_two_runs(home, folder, tmp_path):
    other = tmp_path / "elsewhere" / folder.name
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    found = run_reader.folders(home, Settings(run_folders=(str(other.parent),)))
    assert found == {folder.name: folder, f"{folder.name}~2": other}


def test_the_tag_changes_with_everything_that_shows(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)

    def tag(look=RUNNING, position=None, pending=()):
        run.refresh()
        return run.tag(look, position, pending)

    begin(write)
    tags = [tag(), tag(Look("interrupted")), tag(position=1), tag(pending=["stop"])]
    assert tag() == tags[0]
    step(write, 10)
    tags.append(tag())
    (folder / "config.json").write_text('{"output": {"name": "other"}}')
    tags.append(tag())
    assert len(set(tags)) == len(tags)


def test_the_log_is_told_by_bytes_and_letters_stay_whole(folder):
    (folder / "log.txt").write_bytes("größe\n".encode()[:3])
    assert run_reader.log_text(folder, 0) == ("gr", 2)
    (folder / "log.txt").write_bytes("größe\n".encode())
    assert run_reader.log_text(folder, 2) == ("öße\n", 8)
    assert run_reader.log_text(folder, 8) == ("", 8)
    assert run_reader.log_text(folder, 99)[1] == 8
    assert run_reader.log_tail(folder) == "größe"


def test_thumbnails_are_small_and_follow_the_picture(home, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (300, 200), "red").save(path)
    small = run_reader.picture(home, path, 128)
    with Image.open(small) as image:
        assert image.size == (128, 85) and image.format == "WEBP"
    assert run_reader.picture(home, path, None) == path
    time.sleep(0.01)
    Image.new("RGB", (300, 200), "blue").save(path)
    with Image.open(run_reader.picture(home, path, 128)) as image:
        red, _, blue = image.convert("RGB").getpixel((5, 5))
        assert blue > red
    with pytest.raises(Problem, match="size is 5000"):
        run_reader.picture(home, path, 5000)


def test_looking_at_an_unchanged_run_is_cheap_also_from_ten_threads(folder):
    write, run = Writer(folder / "events.jsonl"), Run("zorp", folder)
    begin(write, total=20_000)
    for n in range(10, 20_001, 10):
        step(write, n)
    assert len(view(run)["points"]["loss"]) <= 400

    def look(_):
        began = time.perf_counter()
        with run.lock:
            run.refresh()
            run.tag(RUNNING, None)
            told = run.view(RUNNING, None, run.seq)
        assert told["run"]["step"] == 20_000
        return time.perf_counter() - began

    times = sorted(look(k) for k in range(100))
    assert times[50] < 0.005, f"{times[50] * 1000:.1f} ms"
    with ThreadPoolExecutor(10) as pool:
        assert len(list(pool.map(look, range(200)))) == 200


def test_a_tail_passes_over_what_is_no_event(tmp_path):
    seen = []
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'nonsense\n[1]\n{"seq": 0, "time": 1, "type": "x"}\n{"type": "y"}\n')
    Tail(path, seen.append, lambda: None).read()
    assert [e["type"] for e in seen] == ["x"]
