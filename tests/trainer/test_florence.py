"""Florence-2 of random weights, against transformers' own processor."""

import pytest
from PIL import Image
from small_captioners import make_florence

from trainer.captioners import florence


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_thread):
    return make_florence(tmp_path_factory.mktemp("florence") / "model")


@pytest.fixture(scope="module")
def images(draw_pictures, tmp_path_factory):
    folder = draw_pictures(tmp_path_factory.mktemp("pictures"), [(64, 64), (96, 48), (30, 80)])
    return [Image.open(p).convert("RGB") for p in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("task", florence.TASKS)
def test_each_task_is_asked_as_transformers_processor_asks_it(model, images, task):
    from transformers import AutoTokenizer, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    write = florence.build(florence.Config(task=task, max_tokens=12), model, "cpu", "fp32", print)
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = Florence2Processor(CLIPImageProcessorPil.from_pretrained(model), tokenizer)
    inputs = processor(images=images, text=[f"<{task.upper()}_CAPTION>".replace("CAPTION_CAPTION", "CAPTION")] * 3, return_tensors="pt")
    made = Florence2ForConditionalGeneration.from_pretrained(model).eval()
    assert inputs.input_ids.shape[1] > florence.tokens_of(made.config.vision_config, 64, 64) == 65
    tokens = made.generate(**inputs, max_new_tokens=12, num_beams=3, do_sample=False)
    texts = write(images)
    assert texts == [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)] and len(set(texts)) > 1


def test_the_number_of_a_pictures_tokens_is_that_of_the_vision_tower():
    import torch
    from transformers import Florence2VisionConfig
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    config = Florence2VisionConfig(depths=[1, 1, 1, 1], embed_dim=[8] * 4, num_heads=[2] * 4, num_groups=[2] * 4, projection_dim=8)
    tower = Florence2VisionBackbone(config)
    for side in (96, 100, 131):
        seen = tower(torch.zeros(1, 3, side, side)).last_hidden_state
        assert florence.tokens_of(config, side, side) == seen.shape[2] * seen.shape[3] + 1
    assert florence.tokens_of(config, 768, 768) == 577  # of the models of the hub


def test_a_caption_ends_where_the_model_has_no_more_places(model, images):
    assert florence.build(florence.Config(max_tokens=1000), model, "cpu", "fp32", print)(images[:1])[0]
