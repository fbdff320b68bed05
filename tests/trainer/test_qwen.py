"""Qwen's vision-language models of random weights, against transformers' own processors."""

import json
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image
from small_captioners import make_qwen

from trainer.captioners import files, qwen

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory, one_thread):
    return make_qwen(tmp_path_factory.mktemp("qwen") / "model", request.param)


@pytest.fixture(scope="module")
def images(draw_pictures, tmp_path_factory):
    folder = draw_pictures(tmp_path_factory.mktemp("pictures"), [(64, 64), (96, 48), (30, 80)])
    return [Image.open(p).convert("RGB") for p in sorted(folder.glob("*.png"))]


def reference(folder, images, prompt: str, change=lambda model: model) -> list[str]:
    """The captions of each image alone. transformers' processors cannot be made without torchvision, so their methods are called."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cls = dict(zip(KINDS, (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor), strict=True))[files.peek(str(folder))[1]]
    tokenizer, prepare = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = change(AutoModelForImageTextToText.from_pretrained(folder).eval())
    said = []
    for image in images:
        seen = prepare([image], return_tensors="pt")
        places = cls.replace_image_token(SimpleNamespace(image_processor=prepare, image_token=qwen.IMAGE), seen, 0)
        text = f"<|im_start|>user\n<|vision_start|>{places}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
        words = tokenizer(text, return_tensors="pt")
        types = (words.input_ids == 5).int()
        tokens = model.generate(**words, **seen, mm_token_type_ids=types, max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(tokens[0, words.input_ids.shape[1] :], skip_special_tokens=True).strip())
    return said


def test_the_captions_are_those_of_transformers_and_hang_on_the_prompt(model, images):
    notes, found = [], set()
    for prompt in ("Describe a cat", "What is the house on the grass with a red dog of"):
        write = qwen.build(qwen.Config(prompt=prompt, max_tokens=12), model, "cpu", "fp32", notes.append)
        texts = write(images)
        assert texts == reference(model, images, prompt) and len(set(texts)) > 1
        found.add(tuple(texts))
    assert len(found) == 2 and "The captioner is kept in fp32" in notes[0]


def test_layers_in_four_bits_say_what_their_rounded_weights_say(model, images, monkeypatch):
    import torch

    from trainer.lean.narrow import NarrowLinear, pack

    def rounded(model):
        for path, module in model.named_modules():
            if type(module) is torch.nn.Linear and "layers" in path.split("."):
                module.weight.data = pack(module.weight.data, 4).wide()
        return model

    made = []
    real = NarrowLinear.__init__
    monkeypatch.setattr(NarrowLinear, "__init__", lambda self, *a: made.append(self) or real(self, *a))
    monkeypatch.setattr(qwen, "choose", lambda *_: ("fp32", True, "In 4 bits."))
    texts = qwen.build(qwen.Config(prompt="Describe a cat", max_tokens=12), model, "cpu", "fp32", print)(images)
    assert texts == reference(model, images, "Describe a cat", rounded) != reference(model, images, "Describe a cat")
    assert len(made) == 2 * 7  # of two layers: q, k, v, o, gate, up, down; none of the eyes


def test_a_large_picture_is_made_smaller_first(model):
    write = qwen.build(qwen.Config(max_tokens=1), model, "cpu", "fp32", print)
    assert len(write([Image.new("RGB", (4000, 3000), "red")])) == 1


def test_the_chat_template_may_lie_in_a_file_of_its_own(model, images, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = qwen.Config(max_tokens=6)
    with pytest.raises(ValueError, match="no chat template"):
        qwen.build(config, folder, "cpu", "fp32", print)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    texts = [qwen.build(config, source, "cpu", "fp32", print)(images) for source in (folder, model)]
    assert texts[0] == texts[1]


def test_bits_are_chosen_by_the_free_memory_with_a_reason(tmp_path):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    layer, eyes = torch.zeros(2**10, 2**10), torch.zeros(2**10, 2**9)
    save_file({"model.layers.0.mlp.up_proj.weight": layer, "model.visual.blocks.0.mlp.weight": eyes}, folder / "model.safetensors")
    m = 1 / 1024  # GiB of 2**20 numbers of one byte
    room = qwen.ROOM
    fits = room + 2 * 1.5 * m
    dtype, packed, reason = qwen.choose(folder, "cuda", "bf16", fits)
    assert (dtype, packed) == ("bf16", False) and "1.5 GiB of the GPU's memory are free" in reason
    small = room + (4.25 / 8 + 2 * 0.5) * m
    for free in (fits - 1e-6, small):
        dtype, packed, reason = qwen.choose(folder, "cuda:1", "fp16", free)
        assert (dtype, packed) == ("bf16", True) and "4 bits" in reason  # fp16 has too small a range for these models
    with pytest.raises(ValueError, match="choose a smaller captioner under Settings"):
        qwen.choose(folder, "cuda", "bf16", small - 1e-6)
    assert qwen.choose(folder, "cpu", "fp32", room + 4 * 1.5 * m)[:2] == ("fp32", False)
    dtype, packed, reason = qwen.choose(folder, "cpu", "fp32", fits)
    assert (dtype, packed) == ("bf16", False) and "slower" in reason
    with pytest.raises(ValueError, match="of memory"):
        qwen.choose(folder, "cpu", "fp32", fits - 1e-6)


def test_the_prompt_leaves_out_what_the_purpose_says():
    def prompt(**settings: str) -> str:
        return qwen.prompt_of(qwen.Config(**settings))

    assert "call it just “cat”" in prompt(purpose="character", class_word="cat") and "Say nothing of" in prompt(purpose="character")
    assert "fur" in prompt(purpose="character") and "medium" in prompt(purpose="style") and "material" in prompt(purpose="object")
    assert "{" not in "".join(prompt(purpose=p) for p in ("", "character", "style", "object"))
    assert prompt(prompt=" What is the {subject} doing? ", class_word="dog", purpose="style") == "What is the dog doing?"
