"""Every field of the configuration is shown or hidden with a reason, and every control does something."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

from app import forms
from trainer import plan
from trainer.config.load import ConfigError, validate
from trainer.formats.metadata import read_header

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {f["key"]: f for s in forms.form()["sections"] for f in s["fields"]}


def test_every_field_is_shown_or_hidden_with_a_reason():
    assert len(forms.leaves()) > 60
    assert FIELDS.keys() == {k for k in forms.leaves() if not forms.hidden(k)}
    for key, why in forms.HIDDEN.items():
        assert len(why) > 10, key
        assert key in forms.leaves() or any(k.startswith(f"{key}.") for k in forms.leaves()), f"{key} is no field any more"


def test_every_shown_field_has_a_label_of_its_own_and_a_help():
    assert set(forms.LABELS) == set(FIELDS), "labels for fields that are not there, or fields without one"
    labels = [f["label"] for f in FIELDS.values()]
    assert len(set(labels)) == len(labels)
    for f in FIELDS.values():
        assert f["help"].endswith(".") and len(f["help"]) > 15, f["key"]
    assert {s["title"] for s in forms.form()["sections"]} == set(forms.SECTIONS.values())
    json.dumps(forms.form())


@pytest.mark.parametrize("key", FIELDS)
def test_a_default_fits_its_control(key):
    f, value = FIELDS[key], FIELDS[key]["default"]
    if value is None:
        assert f["optional"] and f["empty"]
        return
    types = {
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "choice": str,
        "choices": list,
        "text": str,
        "lines": list,
        "color": str,
    }
    assert isinstance(value, types[f["kind"]]) and isinstance(value, bool) == (f["kind"] == "boolean")
    if f["kind"] in ("integer", "number"):
        assert f.get("min", value) <= value <= f.get("max", value)
    if f["kind"] in ("choice", "choices"):
        words = {c for c, _ in f["choices"]}
        assert len(words) > 1 and set(value if isinstance(value, list) else [value]) <= words
        assert all(label for _, label in f["choices"])


def test_what_a_field_waits_for_is_a_field_with_that_value():
    waiting = {k: f["when"] for k, f in FIELDS.items() if "when" in f}
    assert waiting["optimizer.eps"] == {"optimizer.kind": ["adamw", "adamw8bit"]}
    assert waiting["optimizer.d_coef"] == {"optimizer.kind": ["prodigy"]}
    for key, when in waiting.items():
        for other, allowed in when.items():
            choices = {c for c, _ in FIELDS[other].get("choices", [])} | ({True, False} if FIELDS[other]["kind"] == "boolean" else set())
            assert set(allowed) <= choices, key
    assert forms.applies("optimizer.eps", {"optimizer.kind": "adamw"}, "sd1")
    assert not forms.applies("optimizer.eps", {"optimizer.kind": "prodigy"}, "sd1")
    assert forms.applies("optimizer.beta1", {"optimizer.kind": "prodigy"}, "sd3") and forms.applies(
        "adapter.rank", {"adapter.kind": "lora"}, "sd1"
    )


SHOWN = {
    # for each family, the fields that not all have
    "sd1": {"model.clip_skip", "model.prediction", "model.zero_terminal_snr", "loss.min_snr_gamma", "loss.noise_offset", "adapter.conv_rank", "adapter.conv_alpha"},
    "sd2": {"model.prediction", "model.zero_terminal_snr", "loss.min_snr_gamma", "loss.noise_offset", "adapter.conv_rank", "adapter.conv_alpha"},
    "sdxl": {"model.prediction", "model.zero_terminal_snr", "loss.min_snr_gamma", "loss.noise_offset", "adapter.conv_rank", "adapter.conv_alpha",
             "part.text_2.train", "part.text_2.learning_rate", "part.text_2.stop"},
    "sd3": {"model.text_encoders", "model.t5", "loss.timesteps", "loss.logit_mean", "loss.logit_std", "loss.shift",
            "part.text_2.train", "part.text_2.learning_rate", "part.text_2.stop"},
}  # fmt: skip


@pytest.mark.parametrize("family", SHOWN)
def test_only_what_applies_to_the_family_is_shown(family):
    assert forms.families() == tuple(SHOWN)
    special = {key for key, f in FIELDS.items() if f["families"]}
    assert special == set().union(*SHOWN.values())
    assert {key for key in special if family in FIELDS[key]["families"]} == SHOWN[family]
    assert {key for key in FIELDS if forms.applies(key, {}, family)} & special == SHOWN[family]


def test_sentences_have_labels_and_not_names():
    said = forms.in_words("adapter.alpha is 0; lower dataset.bucket_step. Not my.adapter.rank, adapter.ranks or adapter.")
    assert said == "Alpha is 0; lower Bucket step. Not my.adapter.rank, adapter.ranks or adapter."


def test_bounds_are_those_of_the_configuration():
    assert (FIELDS["adapter.rank"]["min"], FIELDS["adapter.rank"]["max"]) == (1, 1024)
    for key, f in FIELDS.items():
        for bound, sign in (("min", -1), ("max", 1)):
            if bound in f:
                with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
                    kind = next(iter(f.get("when", {}).get("optimizer.kind", [])), None)
                    section, _, name = key.rpartition(".")
                    outside = {name: f[bound] + sign * f.get("step", 1)} | ({"kind": kind} if kind else {})
                    for table in reversed(section.split(".")):
                        outside = {table: outside}
                    validate({"data": [{"folder": "."}]} | outside)


# ---- every control does something ---------------------------------------------------------------------------------------------

BASE = {"dataset.resolution": 64, "train.visits": 2}
# Field -> (another value, what must be set for it to matter). What is laid out before any model is loaded:
PLAN = {
    "train.visits": (3, {}), "train.batch_size": (3, {}), "train.seed": (1, {}),
    "dataset.resolution": (96, {}), "dataset.bucket_step": (32, {}), "dataset.max_aspect": (1.0, {}),
    "dataset.max_upscale": (4.0, {"dataset.resolution": 128}), "dataset.flip": (True, {}),
    "dataset.shuffle_tags": (True, {}), "dataset.keep_tags": (3, {"dataset.shuffle_tags": True}),
    "dataset.keep_separator": (", red", {"dataset.shuffle_tags": True}), "dataset.hold_out": (1, {}),
    "dataset.caption_dropout": (0.5, {}), "dataset.tag_dropout": (0.5, {}),
    "schedule.kind": ("linear", {}), "schedule.warmup": (0.5, {}), "schedule.floor": (0.5, {}),
    "schedule.restarts": (5, {"schedule.kind": "cosine_restarts"}),
    "preview.every": (7, {"preview.enabled": True}), "preview.enabled": (True, {}), "preview.prompts": (["a zorp"], {}),
    "preview.quality": ("masterpiece", {}),
    "validation.every": (7, {"validation.enabled": True}), "validation.enabled": (True, {"validation.every": 7}),
    "output.save_every": (7, {}), "output.checkpoint_every": (7, {}),
}  # fmt: skip
# What shows in the trained weights after four steps on the demo base:
WEIGHTS = {
    "adapter.rank": (1, {}), "adapter.alpha": (8.0, {}), "adapter.dropout": (0.5, {}), "adapter.targets": (["feed_forward"], {}),
    "part.unet.train": (False, {}), "part.unet.learning_rate": (1e-2, {}), "part.unet.stop": (0.25, {}),
    "part.text_1.train": (False, {}), "part.text_1.learning_rate": (1e-2, {}), "part.text_1.stop": (0.25, {}),
    "optimizer.beta1": (0.5, {}), "optimizer.beta2": (0.5, {}), "optimizer.eps": (1.0, {}), "optimizer.weight_decay": (5.0, {}),
    "loss.min_snr_gamma": (None, {}), "loss.noise_offset": (1.0, {}),
    "train.max_grad_norm": (1e-6, {"optimizer.eps": 1e-3}), "train.accumulation": (4, {}), "train.dtype": ("bf16", {}),
    "adapter.conv_rank": (1, {"adapter.targets": ["convolutions"]}), "adapter.conv_alpha": (8.0, {"adapter.targets": ["convolutions"]}),
    "dataset.background": ("#000000", {}), "model.prediction": ("v_prediction", {}),
}  # fmt: skip
# What shows in the file's header, in the sample images, or in an event:
FILE = {
    "output.naming": ("peft", {}), "output.dtype": ("bf16", {}), "output.title": ("T", {}), "output.author": ("A", {}),
    "output.description": ("D", {}), "output.license": ("L", {}),
}  # fmt: skip
SHOW = {"preview.enabled": True, "preview.steps": 1, "preview.prompts": ["a zorp"], "preview.width": 64, "preview.height": 64}
PREVIEW = {
    "preview.negative": ("grass", {}), "preview.steps": (2, {}), "preview.guidance": (1.0, {}), "preview.seed": (2, {}),
    "preview.width": (72, {}), "preview.height": (72, {}),
}  # fmt: skip
EVENTS = {"validation.images": (1, {"validation.enabled": True}), "validation.draws": (1, {"validation.enabled": True})}
# What needs a GPU, a package or another machine: the test that shows it.
ELSEWHERE = {
    "model.family": "tests/trainer/test_sources.py::test_the_family_is_read_from_the_files",
    "adapter.start": "tests/trainer/test_start.py::test_training_starts_from_exactly_what_the_file_does",
    "model.zero_terminal_snr": "tests/trainer/test_families.py::test_zero_terminal_snr",
    "model.clip_skip": "tests/trainer/test_families.py::test_clip_skip",
    "model.text_encoders": "tests/trainer/test_load.py::test_sd3_takes_its_text_encoders_from_a_folder",
    "model.t5": "tests/trainer/test_load.py::test_t5_in_8_bits",
    "dataset.text_windows": "tests/trainer/test_families.py::test_text_windows",
    "dataset.wildcards": "tests/trainer/data/test_captions.py::test_choices_are_drawn_from_the_innermost_out_and_only_when_asked_for",
    "dataset.masks": "tests/trainer/test_step.py::test_a_mask_weighs_the_loss_and_its_area_does_not",
    "dataset.unmasked_weight": "tests/trainer/test_step.py::test_a_mask_weighs_the_loss_and_its_area_does_not",
    "loss.prior_weight": "tests/trainer/test_step.py::test_prior_preservation_equals_its_formula_and_does_nothing_at_the_start",
    "dataset.prompt_weights": "tests/trainer/test_families.py::test_prompt_weights",
    "part.text_2.train": "tests/trainer/test_families.py::test_text_2",
    "part.text_2.learning_rate": "tests/trainer/test_families.py::test_text_2",
    "part.text_2.stop": "tests/trainer/test_families.py::test_text_2",
    "loss.timesteps": "tests/trainer/test_families.py::test_timesteps",
    "loss.logit_mean": "tests/trainer/test_families.py::test_timesteps",
    "loss.logit_std": "tests/trainer/test_families.py::test_timesteps",
    "loss.shift": "tests/trainer/test_families.py::test_shift",
    "output.thumbnail": "tests/trainer/test_families.py::test_pictures_of_a_lora_on_request",
    "output.sidecars": "tests/trainer/test_families.py::test_pictures_of_a_lora_on_request",
    "optimizer.kind": "tests/trainer/test_optimizers.py::test_it_lowers_a_loss_and_resumes_to_the_last_bit",
    "optimizer.d_coef": "tests/trainer/test_optimizers.py::test_options_reach_the_optimizer",
    "train.memory": "tests/trainer/test_room.py::test_each_mode_trains_every_layer",
    "train.device": "tests/trainer/test_hardware.py::test_impossible_wishes_are_refused",
    "train.attention": "tests/trainer/test_hardware.py::test_xformers_must_be_installed",
    "train.reproducible": "tests/trainer/test_cuda.py::test_a_resumed_run_is_bit_equal_when_reproducible",
    "output.keep_checkpoints": "tests/trainer/test_run_folder.py::test_checkpoints_are_pruned_and_exported_loras_never",
}
# What stands in the configuration file alone:
FILE_ONLY = {
    "adapter.blocks": "tests/trainer/test_blocks.py::test_a_run_moves_blocks_by_their_rates",
    "model.merge": "tests/trainer/test_families.py::test_merge",
}
RUN = WEIGHTS | FILE | PREVIEW | EVENTS


def test_every_shown_field_is_shown_to_do_something():
    proven = [*PLAN, *RUN, *ELSEWHERE]
    assert len(set(proven)) == len(proven) and set(proven) == set(FIELDS)
    assert FILE_ONLY.keys() == set(forms.KEPT) and all(forms.hidden(key) for key in forms.KEPT)


@pytest.mark.parametrize("key", [*ELSEWHERE, *FILE_ONLY])
def test_the_named_test_is_there(key):
    path, _, name = (ELSEWHERE | FILE_ONLY)[key].partition("::")
    functions = [n for n in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
    assert name in {f.name for f in functions}


def on_paper(config) -> tuple:
    laid = plan.make(config, 128)
    due = plan.due(config, 40)
    curve = [plan.factor(config, n, 40) for n in range(40)]
    times = tuple(tuple(n for n in range(41) if n in when) for when in (due.validation, due.preview, due.save, due.checkpoint))
    return laid.steps, laid.captions, laid.placements, laid.warnings, times, curve, plan.preview_prompts(config, laid.images)


@pytest.mark.parametrize("key", PLAN)
def test_it_changes_the_plan(key, configure):
    value, setup = PLAN[key]
    assert on_paper(configure(BASE | setup | {key: value})) != on_paper(configure(BASE | setup))


@pytest.fixture(scope="module")
def transparent(draw_pictures, tmp_path_factory) -> Path:
    folder = draw_pictures(tmp_path_factory.mktemp("transparent"), [(64, 64)] * 4)
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            whole = image.convert("RGBA")
        whole.putalpha(128)
        whole.save(path)
    return folder


@pytest.fixture(scope="module")
def small_run(train, transparent):
    """small_run(changes): a run of four steps on four half transparent pictures; the same changes are run once."""
    known = {}

    def go(changes: dict):
        name = json.dumps(changes, sort_keys=True)
        if name not in known:
            data = [{"folder": str(transparent), "trigger": "zorp"}]
            known[name] = train({"data": data, "train.visits": 4, "output.checkpoint_every": 0, **changes})
        return known[name]

    return go


def kept(run, key: str) -> object:
    """What the user keeps of a run that this field is about."""
    if key in WEIGHTS:
        return {k: t.tolist() for k, t in run.lora().items()}
    if key in FILE:
        metadata, tensors = read_header(run.root / "lora.safetensors")
        shown = ("modelspec.title", "modelspec.author", "modelspec.description", "modelspec.license")
        return {k: metadata.get(k) for k in shown}, tensors
    if key in PREVIEW:
        with Image.open(sorted((run.root / "previews").iterdir())[-1]) as image:
            return image.size, image.tobytes()
    return [(e["train"], e["step"]) for e in run.events("validation")]


@pytest.mark.slow
@pytest.mark.parametrize("key", RUN)
def test_it_changes_what_a_run_leaves(key, small_run):
    value, setup = RUN[key]
    setup = (SHOW | {"train.visits": 1} if key in PREVIEW else {}) | setup
    changed = small_run(setup | {key: value})
    assert changed.outcome == "finished"
    assert kept(changed, key) != kept(small_run(setup), key)
