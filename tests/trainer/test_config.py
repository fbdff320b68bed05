import json
import tomllib
from pathlib import Path

import pytest

from trainer.config import TrainConfig
from trainer.config.load import PRESETS, ConfigError, load, overlays, parse_set, presets, read_preset

DATA = {"data": [{"folder": "x"}]}


def errors(changes, **more) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(values={**DATA, **changes}, **more)
    assert str(caught.value) == "\n".join(caught.value.errors.values())
    return caught.value.errors


def test_presets_are_found():
    assert len(presets()) >= 3
    assert "sd1/balanced" in presets()
    over = {f"{family}/with/{name}.toml" for family in ("sd1", "sd2", "sdxl", "sd3") for name in overlays(family)}
    assert {p.relative_to(PRESETS).as_posix() for p in PRESETS.rglob("*.toml")} == {f"{name}.toml" for name in presets()} | over


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_is_valid_and_says_what_it_is(name):
    raw = tomllib.loads(presets()[name].read_text(encoding="utf-8"))
    assert {"title", "why", "source"} == raw["about"].keys()
    assert all(isinstance(v, str) and v.strip() for v in raw["about"].values())
    assert isinstance(load(values=DATA, preset=name), TrainConfig)
    assert "data" not in raw


def test_a_misspelt_key_is_refused_with_the_likely_one():
    assert errors({"adapter": {"rnak": 4}}) == {"adapter.rnak": "adapter.rnak is not a known setting. Did you mean rank?"}
    assert errors({"trian": {}}) == {"trian": "trian is not a known setting. Did you mean train?"}
    assert errors({"part": {"unett": {}}}) == {"part.unett": "part.unett is not a known setting. Did you mean unet?"}
    assert errors({"part": {"unet": {"lerning_rate": 1}}})["part.unet.lerning_rate"].endswith("Did you mean learning_rate?")
    assert errors({"data": [{"folder": "x", "wieght": 1}]})["data.1.wieght"].endswith("Did you mean weight?")


def test_an_unlikely_key_is_refused_with_the_known_ones():
    assert errors({"schedule": {"q": 1}})["schedule.q"] == "schedule.q is not a known setting. Known here: kind, warmup, floor, restarts."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter": {"alpha": 0}}, "adapter.alpha is 0; it must be greater than 0."),
        ({"adapter": {"rank": 0}}, "adapter.rank is 0; it must be at least 1."),
        ({"adapter": {"rank": "many"}}, "adapter.rank is 'many': input should be a valid integer, unable to parse string as an integer."),
        ({"adapter": {"targets": []}}, "adapter.targets is []: "),
        ({"train": {"batch_size": 2.5}}, "train.batch_size is 2.5: "),
        ({"train": {"dtype": "fp8"}}, "train.dtype is 'fp8'; it must be one of 'auto', 'fp32', 'bf16' or 'fp16'."),
        ({"train": {"device": "tpu"}}, "train.device is 'tpu': "),
        ({"loss": {"noise_offset": 2}}, "loss.noise_offset is 2; it must be at most 1."),
        ({"part": {"unet": {"learning_rate": float("nan")}}}, "part.unet.learning_rate is nan; it must be "),
        ({"preview": {"width": 100}}, "preview.width is 100; it must be a multiple of 8."),
        ({"output": {"name": "a/b"}}, "output.name is 'a/b'; it must be a file name without any of"),
        ({"dataset": {"background": "white"}}, "dataset.background is 'white'; it must be a colour like #ffffff."),
        ({"dataset": {"bucket_step": 12}}, "dataset.bucket_step is 12; it must be a multiple of 8 from 8 to 256."),
        ({"data": []}, "data is []: "),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(changes, sentence):
    ((_, said),) = errors(changes).items()
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    ("value", "nearest"), [(500, 504), (1, 64), (5000, 2048), (516, 520), (515, 512), (517, 520), (2044, 2048), (2047, 2048)]
)
def test_the_nearest_resolution_is_named(value, nearest):
    said = errors({"dataset": {"resolution": value}})["dataset.resolution"]
    assert said == f"dataset.resolution is {value}; it must be a multiple of 8 from 64 to 2048. Nearest: {nearest}."


def test_all_errors_come_at_once():
    found = errors(
        {
            "adapter": {"rank": 0, "alhpa": 1},
            "train": {"seed": -1},
            "dataset": {"resolution": 500},
            "optimizer": {"kind": "adamw", "beta1": 2},
        }
    )
    assert set(found) == {"adapter.rank", "adapter.alhpa", "train.seed", "dataset.resolution", "optimizer.beta1"}
    assert all(text.startswith(field) for field, text in found.items())


def test_data_is_needed():
    with pytest.raises(ConfigError, match=r"data is missing; name at least one folder of images in \[\[data\]\]\."):
        load(values={})
    assert errors({"data": [{"folder": "x", "kind": "validation"}]})[""].startswith("no [[data]] folder has kind = train")


def test_prodigy_wants_one_rate():
    rates = {"unet": {"learning_rate": 1.0}, "text_1": {"learning_rate": 0.5}}
    (said,) = errors({"optimizer": {"kind": "prodigy"}, "part": rates}).values()
    assert said == "The learning rates of the trained parts differ; Prodigy needs one rate for all. Set each to 1."
    rates["text_1"]["train"] = False
    assert load(values={**DATA, "optimizer": {"kind": "prodigy"}, "part": rates}).optimizer.d_coef == 1
    assert load(values={**DATA, "part": rates}).optimizer.kind == "adamw"


def test_something_must_be_trained_to_the_end():
    (said,) = errors({"part": {"unet": {"train": False}, "text_1": {"train": False}}}).values()
    assert said.startswith("no part is trained; set part.unet.train")
    for parts in (
        {"unet": {"stop": 0.5}, "text_1": {"stop": 0.9}},
        {"unet": {"train": False}, "text_1": {"stop": 0.5}},
        {"unet": {"stop": 0.5}, "text_1": {"train": False}},
    ):
        (said,) = errors({"part": parts}).values()
        assert said.startswith("no part is trained to the end of the run")
    assert load(values={**DATA, "part": {"unet": {"stop": 0.5}}}).part.unet.stop == 0.5


def test_an_optimizer_without_a_kind_is_adamw():
    assert load(values=DATA, assignments=["optimizer.weight_decay=0.5"]).optimizer.weight_decay == 0.5
    assert load(values=DATA).optimizer.kind == "adamw"
    assert "must have kind = one of 'adamw', 'adamw8bit', 'prodigy'" in errors({"optimizer": {"kind": "sgd"}})["optimizer"]
    assert "not a known setting" in errors({"optimizer": {"kind": "adamw", "d_coef": 1}})["optimizer.d_coef"]


def test_assignments_are_toml_or_plain_text():
    assert parse_set(["a.b=1", "a.c = 2.5", "a.d=true", "a.e=hello", 'a.f="x y"', "g=[1, 2]", "a.h=1e-4", "a.i=", "a.j=b=c", "a.k=00"]) == {
        "a": {"b": 1, "c": 2.5, "d": True, "e": "hello", "f": "x y", "h": 1e-4, "i": "", "j": "b=c", "k": "00"},
        "g": [1, 2],
    }


@pytest.mark.parametrize("item", ["adapter.rank", "", "=3"])
def test_an_assignment_without_key_or_value_is_refused(item):
    with pytest.raises(ConfigError, match=r"has no value; write it as section\.name=value"):
        parse_set([item])


def test_an_assignment_into_a_value_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"'adapter\.rank=4' sets a value inside adapter, to which another --set gives 3"):
        load(values=DATA, assignments=["adapter=3", "adapter.rank=4"])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_and_json_say_the_same(tmp_path):
    toml = write(tmp_path / "a.toml", '[[data]]\nfolder = "pics"\n[adapter]\nrank = 3\n')
    js = write(tmp_path / "a.json", json.dumps({"data": [{"folder": "pics"}], "adapter": {"rank": 3}}))
    assert load(toml) == load(js)
    assert load(toml).adapter.rank == 3


def test_folders_are_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub" / "a.toml", '[[data]]\nfolder = "../pics"\n[[data]]\nfolder = "/abs"\n[[data]]\nfolder = "~/x"\n')
    folders = [d.folder for d in load(path).data]
    assert folders[0].resolve() == (tmp_path / "pics").resolve()
    assert folders[1:] == [Path("/abs"), home / "x"]


def test_a_windows_editors_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b'\xef\xbb\xbf[[data]]\nfolder = "x"\n')
    assert len(load(path).data) == 1


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "rank = = 3", r"a\.toml is not valid TOML: .*line 1"),
        ("a.json", "{", r"a\.json is not valid JSON: "),
        ("b.toml", None, r"There is no configuration file .*b\.toml\. Give the path of a \.toml or \.json file\."),
    ],
)
def test_a_file_that_cannot_be_read(name, text, sentence, tmp_path):
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=sentence):
        load(tmp_path / name)


def test_later_sources_win(tmp_path):
    name = sorted(presets())[0]
    settings = read_preset(name)
    preset_rank = settings.get("adapter", {}).get("rank", 16)
    path = write(tmp_path / "a.toml", f'preset = "{name}"\n[[data]]\nfolder = "x"\n[train]\nseed = 5\nvisits = 6\n')
    assert load(path).adapter.rank == preset_rank
    config = load(path, assignments=["train.seed=7", "adapter.rank=77"])
    assert (config.adapter.rank, config.train.seed, config.train.visits) == (77, 7, 6)


def test_an_unknown_preset_is_refused_with_the_likely_one(tmp_path):
    with pytest.raises(ConfigError, match=r"preset is 'sd1/balancd', which does not exist\. Did you mean sd1/balanced\?"):
        load(values=DATA, preset="sd1/balancd")
    with pytest.raises(ConfigError, match=r"preset is 'qqqqqq', which does not exist\. There are: .*sd1/balanced"):
        load(write(tmp_path / "a.toml", 'preset = "qqqqqq"\n'))


def test_a_configuration_is_frozen_and_survives_json():
    config = load(values=DATA, assignments=["adapter.rank=3", "preview.prompts=['a', 'b']", "optimizer.kind=adamw8bit"])
    with pytest.raises(ValueError, match="frozen"):
        config.adapter.rank = 4
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_one_setting_of_a_section_leaves_its_other_defaults():
    """A default that stands on the field holds whatever else of the section is set; one on the section's object would be lost."""
    plain = load(values=DATA)
    for section in ("model", "dataset", "adapter", "schedule", "loss", "train", "preview", "validation", "output"):
        for name, value in getattr(plain, section).model_dump(mode="json").items():
            if value is not None:
                assert load(values=DATA | {section: {name: value}}) == plain, f"{section}.{name}"
    for part in ("unet", "text_1"):
        for name, value in getattr(plain.part, part).model_dump().items():
            assert load(values=DATA | {"part": {part: {name: value}}}) == plain, f"part.{part}.{name}"
