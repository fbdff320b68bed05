"""What a run will take: numbers of parameters by the real configurations, memory by what was measured on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import memory
from trainer.config.load import ROOT, validate

VARIANTS = ("sd1", "sd2", "sdxl", "sd3_medium", "sd35_medium", "sd35_large")
KINDS = ["attention", "feed_forward", "projections", "convolutions"]


def configured(kinds=3, text=(), rank=16, rows=1, **more):
    return validate(
        {
            "data": [{"folder": "."}],
            "adapter": {"rank": rank, "targets": KINDS[:kinds]},
            "part": {part: {"train": part in text} for part in ("text_1", "text_2")},
            "train": {"batch_size": rows},
            "preview": {"enabled": False},
        }
        | more
    )


# Captured steps on random weights: (table, kinds of layers, rows, side, mode, dtype, text encoders trained) -> most GiB of tensors
STEPS = {
    ("sd1", 1, 1, 512, "fast", "bf16", ()): 2.30,
    ("sd1", 1, 1, 512, "selective", "bf16", ()): 2.21,
    ("sd1", 1, 1, 512, "checkpointing", "bf16", ()): 1.97,
    ("sd1", 1, 1, 512, "8bit", "bf16", ()): 1.18,
    ("sd1", 1, 1, 512, "4bit", "bf16", ()): 0.76,
    ("sd1", 2, 1, 512, "fast", "bf16", ()): 2.49,
    ("sd1", 3, 1, 512, "fast", "bf16", ()): 2.55,
    ("sd1", 4, 1, 512, "fast", "bf16", ()): 2.82,
    ("sd1", 3, 1, 512, "selective", "bf16", ()): 2.32,
    ("sd1", 3, 1, 512, "checkpointing", "bf16", ()): 2.08,
    ("sd1", 3, 1, 512, "8bit", "bf16", ()): 1.32,
    ("sd1", 3, 1, 512, "4bit", "bf16", ()): 0.89,
    ("sd1", 3, 4, 512, "fast", "bf16", ()): 4.57,
    ("sd1", 3, 4, 512, "checkpointing", "bf16", ()): 2.68,
    ("sd1", 3, 1, 512, "fast", "fp32", ()): 4.79,
    ("sd1", 3, 1, 512, "checkpointing", "fp32", ()): 3.85,
    ("sd1", 3, 1, 256, "fast", "bf16", ()): 2.05,
    ("sd1", 3, 1, 512, "fast", "bf16", ("text_1",)): 2.87,
    ("sdxl", 1, 1, 1024, "fast", "bf16", ()): 9.34,
    ("sdxl", 1, 1, 1024, "selective", "bf16", ()): 8.17,
    ("sdxl", 1, 1, 1024, "checkpointing", "bf16", ()): 5.74,
    ("sdxl", 1, 1, 1024, "8bit", "bf16", ()): 3.51,
    ("sdxl", 1, 1, 1024, "4bit", "bf16", ()): 2.25,
    ("sdxl", 2, 1, 1024, "fast", "bf16", ()): 10.88,
    ("sdxl", 3, 1, 1024, "fast", "bf16", ()): 10.97,
    ("sdxl", 4, 1, 1024, "fast", "bf16", ()): 11.42,
    ("sdxl", 3, 1, 1024, "selective", "bf16", ()): 8.62,
    ("sdxl", 3, 1, 1024, "checkpointing", "bf16", ()): 6.36,
    ("sdxl", 3, 1, 1024, "8bit", "bf16", ()): 4.07,
    ("sdxl", 3, 1, 1024, "4bit", "bf16", ()): 2.78,
    ("sdxl", 3, 4, 1024, "fast", "bf16", ()): 26.39,
    ("sdxl", 3, 4, 1024, "checkpointing", "bf16", ()): 7.95,
    ("sdxl", 3, 1, 1024, "fast", "fp32", ()): 20.68,
    ("sdxl", 3, 1, 1024, "checkpointing", "fp32", ()): 11.46,
    ("sdxl", 3, 1, 512, "fast", "bf16", ()): 7.13,
    ("sdxl", 3, 1, 1024, "fast", "bf16", ("text_1",)): 11.28,
    ("sd35_medium", 1, 1, 1024, "fast", "bf16", ()): 12.03,
    ("sd35_medium", 1, 1, 1024, "selective", "bf16", ()): 11.20,
    ("sd35_medium", 1, 1, 1024, "checkpointing", "bf16", ()): 5.55,
    ("sd35_medium", 1, 1, 1024, "8bit", "bf16", ()): 3.62,
    ("sd35_medium", 1, 1, 1024, "4bit", "bf16", ()): 2.52,
    ("sd35_medium", 2, 1, 1024, "fast", "bf16", ()): 13.65,
    ("sd35_medium", 3, 1, 1024, "fast", "bf16", ()): 15.13,
    ("sd35_medium", 3, 1, 1024, "selective", "bf16", ()): 12.87,
    ("sd35_medium", 3, 2, 1024, "fast", "bf16", ()): 24.99,
    ("sd35_medium", 3, 4, 1024, "checkpointing", "bf16", ()): 8.05,
    ("sd35_medium", 3, 1, 1024, "fast", "fp32", ()): 25.29,
    ("sd35_medium", 3, 1, 512, "fast", "bf16", ()): 7.95,
    ("sd2", 1, 1, 768, "fast", "bf16", ()): 2.95,
    ("sd2", 1, 1, 768, "selective", "bf16", ()): 2.65,
    ("sd2", 1, 1, 768, "checkpointing", "bf16", ()): 2.11,
    ("sd2", 1, 1, 768, "8bit", "bf16", ()): 1.38,
    ("sd2", 1, 1, 768, "4bit", "bf16", ()): 0.95,
    ("sd2", 3, 1, 768, "fast", "bf16", ()): 3.34,
    ("sd2", 4, 1, 768, "fast", "bf16", ()): 3.70,
    ("sd2", 3, 4, 768, "checkpointing", "bf16", ()): 3.58,
    ("sd2", 3, 4, 768, "fast", "bf16", ()): 7.81,
    ("sd3_medium", 1, 1, 1024, "fast", "bf16", ()): 7.80,
}  # fmt: skip
# (side, images in a batch) -> most GiB beside its weights that the VAE took, in fp32
VAE = {(512, 2): (1.51, 1.22), (768, 1): (1.70, 2.67), (1024, 1): (3.02, 4.77), (1536, 1): (6.78, 10.69)}


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_training_is_what_was_measured(case):
    table, kinds, rows, side, mode, dtype, text = case
    need = memory.Need(table, side * side, dtype, rows)
    told = memory.training(configured(kinds, text, rows=rows), need, memory.Choice(mode, 1)) - memory.CONTEXT
    assert told == pytest.approx(STEPS[case], rel=0.08)


@pytest.mark.parametrize("size", VAE, ids=str)
def test_the_vae_is_what_was_measured(size):
    (side, count), (encoding, decoding) = size, VAE[size]
    assert memory.ENCODING * max(memory.ENCODED_AT_ONCE, side * side) == pytest.approx(encoding, rel=0.05) and count * side**2 >= 2**19
    assert memory.DECODING * max(memory.DECODED_AT_ONCE, side * side) == pytest.approx(decoding, rel=0.05)


def stages(config, table, mode="fast", parked=False, **more):
    return memory.stages(config, memory.Need(table, 2**20, "bf16", 1, **more), memory.Choice(mode, 1, parked))


def test_a_text_encoder_that_reads_along_is_held_and_t5_by_its_precision():
    plain, t5 = stages(configured(), "sd35_medium"), stages(configured(), "sd35_medium", t5=True)
    eight = stages(configured(model={"t5": "8bit"}), "sd35_medium", t5=True)
    assert t5["encoding"] - plain["encoding"] == pytest.approx(8.87, abs=0.01) and t5["training"] == plain["training"]
    assert eight["encoding"] - plain["encoding"] == pytest.approx(8.87 / 2, abs=0.01)
    packed = stages(configured(), "sd35_medium", "4bit", parked=True, t5=True)
    assert packed["encoding"] < 5 and packed["training"] < 4
    sampled = configured(preview={"enabled": True, "width": 512, "height": 512})
    found = stages(sampled, "sdxl")
    assert found["previews"] < found["encoding"] < found["training"]
    assert stages(sampled, "sdxl", parked=True)["encoding"] < found["encoding"] - 4


@pytest.mark.parametrize("table", VARIANTS)
def test_the_share_that_is_packed_is_that_of_the_real_configurations(table):
    from trainer.formats import single_file
    from trainer.lean import narrow

    source, parts = ROOT / "assets" / "models" / table, memory.TABLES[table].parameters
    wanted = {"unet": memory.TABLES[table].packed, "text_3": memory.PACKED_T5}
    models = {"unet": single_file.blank(source, ["unet"])["unet"]}
    if table == "sd35_medium":
        models["text_3"] = single_file._model("T5EncoderModel", source / "text_encoder_3")
    for part, model in models.items():
        packed = sum(m.weight.numel() for path, m in model.named_modules() if narrow._large(path, m))
        assert packed / parts[part] == pytest.approx(wanted[part], abs=0.01)


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


def test_the_help_page_has_the_table_by_card_as_it_is_calculated():
    text = (ROOT / "assets" / "help" / "speed.md").read_text(encoding="utf-8")
    assert memory.table_of_cards() in text
    for table in ("sd1", "sdxl", "sd35_medium"):
        assert all(f"{cost:.2f} x" in text for cost in memory.TABLES[table].cost[1:])
