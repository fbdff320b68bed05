"""What prior preservation keeps, on the demo base: the table of assets/help/example.md, made again from one seed."""

import json

import pytest

from trainer.demo import prior
from trainer.demo.run import DEMO, UNRELATED


def test_the_two_ways_differ_in_the_weight_alone():
    without, with_it = (prior.configuration(weight, 3).model_dump() for weight in prior.WEIGHTS)
    assert (without["loss"].pop("prior_weight"), with_it["loss"].pop("prior_weight")) == (0.0, 1.0)
    assert without == with_it and without["train"]["seed"] == 3 and without["data"][0]["class_word"] == prior.CLASS
    assert all(prior.CLASS in prompt for prompt in prior.OF_CLASS) and not any(prior.CLASS in prompt for prompt in UNRELATED)


def test_the_help_says_what_was_measured():
    rows = json.loads((DEMO / "prior.json").read_text(encoding="utf-8"))
    assert prior.table(rows) in (DEMO.parent / "help" / "example.md").read_text(encoding="utf-8")
    captioner = json.loads((DEMO / "captioner.json").read_text(encoding="utf-8"))
    page = (DEMO.parent / "help" / "example.md").read_text(encoding="utf-8")
    for key in ("subject", "colour", "ground", "all"):
        assert f"{captioner[key]:.1%}" in page, key


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_class_drifts_less_with_prior_preservation(tmp_path):
    without, with_it = prior.compare_weights(tmp_path, 1)
    assert without["prior_weight"] == 0 and with_it["class"] < without["class"] / 2
    assert with_it["loss"] < with_it["loss_before"] / 2  # and zorp is learnt nonetheless
