"""What a run will take: numbers of parameters by the real configurations, memory by what was measured on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import memory
from trainer.config.load import ROOT, validate

VARIANTS = ("sd1", "sd2", "sdxl", "sd3_medium", "sd35_medium", "sd35_large")
KINDS = ["attention", "feed_forward", "projections", "convolutions"]


def configured(kinds=3, text=(), rank=16, batch=1, checkpointing=False, parts=1, **more):
    return validate(
        {
            "data": [{"folder": "."}],
            "adapter": {"rank": rank, "targets": KINDS[:kinds]},
            "part": {part: {"train": part in text} for part in ("text_1", "text_2")},
            "train": {"batch_size": batch, "accumulation": parts, "checkpointing": checkpointing},
            "preview": {"enabled": False},
        }
        | more
    )


# Whole runs of SD1: (batch, side, text encoder, checkpointing, dtype, kinds of layers, rank, parts) -> most GiB that torch held
RUNS = {
    (1, 512, True, False, "bf16", 3, 16, 1): 3.72, (2, 512, True, False, "bf16", 3, 16, 1): 4.88, (4, 512, True, False, "bf16", 3, 16, 1): 7.71,
    (4, 512, False, False, "bf16", 3, 16, 1): 7.25, (1, 512, False, False, "bf16", 3, 16, 1): 3.74, (1, 512, True, True, "bf16", 3, 16, 1): 3.74,
    (4, 512, True, True, "bf16", 3, 16, 1): 3.76, (1, 768, True, False, "bf16", 3, 16, 1): 5.18, (2, 768, True, False, "bf16", 3, 16, 1): 8.32,
    (4, 768, True, True, "bf16", 3, 16, 1): 5.68, (1, 512, True, False, "fp32", 3, 16, 1): 5.79, (4, 512, True, False, "fp32", 3, 16, 1): 11.45,
    (4, 512, True, True, "fp32", 3, 16, 1): 5.91, (1, 512, True, False, "fp16", 3, 16, 1): 3.74, (1, 512, True, False, "bf16", 1, 16, 1): 3.74,
    (1, 512, True, False, "bf16", 4, 16, 1): 3.84, (1, 512, True, False, "bf16", 3, 128, 1): 4.58, (4, 512, True, False, "bf16", 3, 16, 4): 3.74,
    (4, 256, True, False, "bf16", 3, 16, 1): 3.63,
}  # fmt: skip
# Steps of the others on random weights: (table, kinds, batch, side, checkpointing, dtype, text encoders trained) -> most GiB
STEPS = {
    ("sd1", 3, 1, 512, False, "bf16", ()): 3.15,
    ("sdxl", 1, 1, 1024, False, "bf16", ()): 12.70, ("sdxl", 2, 1, 1024, False, "bf16", ()): 14.94, ("sdxl", 3, 1, 1024, False, "bf16", ()): 15.12,
    ("sdxl", 3, 2, 1024, False, "bf16", ()): 24.68, ("sdxl", 4, 1, 1024, False, "bf16", ()): 16.17, ("sdxl", 3, 1, 1024, True, "bf16", ()): 6.39,
    ("sdxl", 3, 4, 1024, True, "bf16", ()): 8.81, ("sdxl", 3, 1, 1024, False, "fp32", ()): 23.16, ("sdxl", 3, 1, 1024, True, "fp32", ()): 11.60,
    ("sdxl", 3, 1, 512, False, "bf16", ()): 8.07, ("sdxl", 3, 1, 1024, False, "bf16", ("text_1",)): 15.44,
    ("sdxl", 3, 1, 1024, False, "bf16", ("text_1", "text_2")): 17.20,
    ("sd2", 1, 1, 768, False, "bf16", ()): 3.96, ("sd2", 2, 1, 768, False, "bf16", ()): 4.55, ("sd2", 3, 1, 768, False, "bf16", ()): 4.76,
    ("sd2", 3, 2, 768, False, "bf16", ()): 7.67, ("sd2", 4, 1, 768, False, "bf16", ()): 5.43, ("sd2", 3, 1, 768, True, "bf16", ()): 2.58,
    ("sd2", 3, 1, 768, False, "bf16", ("text_1",)): 5.60, ("sd2", 3, 1, 512, False, "bf16", ()): 3.11,
    ("sd35_medium", 1, 1, 1024, False, "bf16", ()): 14.78, ("sd35_medium", 2, 1, 1024, False, "bf16", ()): 17.92,
    ("sd35_medium", 3, 1, 1024, False, "bf16", ()): 19.36, ("sd35_medium", 3, 2, 1024, False, "bf16", ()): 33.56,
    ("sd35_medium", 3, 1, 1024, True, "bf16", ()): 6.14, ("sd35_medium", 3, 4, 1024, True, "bf16", ()): 9.11,
    ("sd35_medium", 3, 1, 1024, False, "fp32", ()): 25.29, ("sd35_medium", 3, 1, 1024, True, "fp32", ()): 11.04,
    ("sd35_medium", 3, 1, 512, False, "bf16", ()): 9.02, ("sd35_medium", 3, 1, 1024, False, "bf16", ("text_1",)): 19.68,
    ("sd35_medium", 3, 1, 1024, False, "bf16", ("text_1", "text_2")): 21.31,
    ("sd3_medium", 1, 1, 1024, False, "bf16", ()): 9.51, ("sd3_medium", 3, 1, 1024, False, "bf16", ()): 13.93,
    ("sd3_medium", 3, 1, 1024, True, "bf16", ()): 5.23, ("sd3_medium", 3, 4, 1024, True, "bf16", ()): 7.67,
    ("sd35_large", 1, 1, 1024, False, "bf16", ()): 33.81, ("sd35_large", 2, 1, 1024, False, "bf16", ()): 41.63,
    ("sd35_large", 3, 1, 1024, False, "bf16", ()): 44.86, ("sd35_large", 3, 1, 1024, True, "bf16", ()): 18.33,
    ("sd35_large", 3, 4, 1024, True, "bf16", ()): 23.32,
}  # fmt: skip
# (side, images in a batch) -> most GiB beside its weights that the VAE took, in fp32
VAE = {(512, 2): (1.51, 1.22), (768, 1): (1.70, 2.67), (1024, 1): (3.02, 4.77), (1536, 1): (6.78, 10.69)}


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_a_whole_run_is_what_was_measured(case):
    batch, side, text, checkpointing, dtype, kinds, rank, parts = case
    config = configured(kinds, ("text_1",) if text else (), rank, batch, checkpointing, parts)
    need = memory.peak(config, "sd1", pixels=side * side, dtype=dtype, rows=batch) - memory.CONTEXT
    assert need == pytest.approx(RUNS[case], rel=0.05)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_training_is_what_was_measured(case):
    table, kinds, batch, side, checkpointing, dtype, text = case
    config = configured(kinds, text, batch=batch, checkpointing=checkpointing)
    need = memory.stages(config, table, pixels=side * side, dtype=dtype, rows=batch)["training"] - memory.CONTEXT
    assert need == pytest.approx(STEPS[case], rel=0.05)


@pytest.mark.parametrize("size", VAE, ids=str)
def test_the_vae_is_what_was_measured(size):
    (side, count), (encoding, decoding) = size, VAE[size]
    assert memory.ENCODING * max(memory.ENCODED_AT_ONCE, side * side) == pytest.approx(encoding, rel=0.05) and count * side**2 >= 2**19
    assert memory.DECODING * max(memory.DECODED_AT_ONCE, side * side) == pytest.approx(decoding, rel=0.05)


def test_a_text_encoder_that_reads_along_is_held_and_t5_by_its_precision():
    plain = memory.stages(configured(), "sd35_medium", pixels=2**20, dtype="bf16", rows=1)
    t5 = memory.stages(configured(), "sd35_medium", pixels=2**20, dtype="bf16", rows=1, t5=True)
    eight = memory.stages(configured(model={"t5": "8bit"}), "sd35_medium", pixels=2**20, dtype="bf16", rows=1, t5=True)
    assert t5["encoding"] - plain["encoding"] == pytest.approx(8.87, abs=0.01) and t5["training"] == plain["training"]
    assert eight["encoding"] - plain["encoding"] == pytest.approx(8.87 / 2, abs=0.01)
    sampled = configured(preview={"enabled": True, "width": 512, "height": 512})
    stages = memory.stages(sampled, "sdxl", pixels=2**20, dtype="bf16", rows=1)
    assert stages["previews"] < stages["encoding"] < stages["training"]


def counted(source: Path, variant: str, config) -> int:
    from trainer import families

    found = families.get("sd3" if variant.startswith("sd3") else variant).count(source, config.adapter)
    return sum(n for part, (_, n) in found.items() if getattr(config.part, part).train)


@pytest.mark.parametrize("table", [*VARIANTS, "demo"])
def test_the_size_of_a_lora_is_that_of_the_base(table):
    source = ROOT / "assets" / ("demo/base" if table == "demo" else f"models/{table}")
    family = "sd1" if table == "demo" else table
    for kinds in (["attention"], ["feed_forward", "projections"], ["attention", "convolutions"]):
        adapter = {"rank": 8, "conv_rank": 4, "targets": kinds}
        config = configured(text=("text_1", "text_2"), adapter=adapter)
        if table in ("sd1", "sd2", "demo"):
            config = configured(text=("text_1",), adapter=adapter)
        assert memory.lora_parameters(config, table) == counted(source, family, config)
        assert memory.lora_bytes(config, table) == 2 * memory.lora_parameters(config, table)


@pytest.mark.parametrize("table", [*VARIANTS, "demo"])
def test_numbers_of_parameters_are_those_of_the_real_configurations(table):
    from trainer.formats import single_file

    source = ROOT / "assets" / ("demo/base" if table == "demo" else f"models/{table}")
    names = {"unet": "unet", "text_1": "text_encoder", "text_2": "text_encoder_2", "text_3": "text_encoder_3", "vae": "vae"}
    family = "sd3" if table.startswith("sd3") else "sd1" if table == "demo" else table
    classes = single_file.COMPONENTS[family]
    for part, count in memory.TABLES[table].parameters.items():
        name = next(iter(classes)) if part == "unet" else names[part]
        model = single_file._model(classes[name], source / name)
        buffers = sum(b.numel() for b in model.buffers()) if part == "unet" else 0
        assert sum(p.numel() for p in model.parameters()) + buffers == count
