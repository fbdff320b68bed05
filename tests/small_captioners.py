"""Each kind of captioner as a model of random weights and some hundred kB, in the files of a hub repository."""

from __future__ import annotations

import csv
from pathlib import Path

WORDS = ["a", "red", "green", "blue", "cat", "dog", "house", "on", "the", "grass", "under", "tree", "sky", "with", "of"]
WORDS += ["Describe", "What", "does", "image", "detail", "what", "is", "shown", "in", "paragraph"]
TAGS = [
    *[("general", 9), ("sensitive", 9), ("questionable", 9), ("explicit", 9)],
    *[("1girl", 0), ("long_hair", 0), ("^_^", 0), (">_<", 0), ("smile", 0), ("simple_background", 0), ("red_eyes", 0), ("sky_(cloudy)", 0)],
    *[("zorp_(series)", 4), ("hatsune_miku", 4)],
]


def make_wd(folder: Path, *, side: int = 24, batch: int | str = "N", tags: int = len(TAGS)) -> Path:
    """A WD tagger: the sigmoid of a random linear map of all pixels. `batch`: a name, or a number for a model of a fixed batch."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.normal(0, 4 / side, (side * side * 3, tags)).astype(np.float32)
    nodes = [
        helper.make_node("Div", ["input", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "half"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    constants = {"scale": np.float32(255), "half": np.float32(0.5), "weight": weight}
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, side, side, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, tags])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    np.save(folder / "weight.npy", weight)  # for a reference
    with (folder / "selected_tags.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows([n, name, kind, 100] for n, (name, kind) in enumerate(TAGS[:tags]))
    return folder


def _stir(model, std: float) -> None:
    """Larger random weights: as made, a small model says the same of every image."""
    import torch

    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=std)


def _words(extra: list[str], **special: str):
    """A tokenizer of whole words, each with the space before it."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = [*extra, "<unk>", *[f" {word}" for word in WORDS], *WORDS]
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), behavior="isolated")
    made.decoder = decoders.Fuse()
    return made


def make_florence(folder: Path) -> Path:
    """A Florence-2 in transformers' own format, 32 wide, that sees 64 x 64 pixels as 3 x 3 + ... tokens."""
    import torch
    from tokenizers import processors
    from transformers import Florence2Config, Florence2ForConditionalGeneration, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    made = _words(["<s>", "<pad>", "</s>", "<image>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = len(tokenizer)
    text = {"model_type": "bart", "vocab_size": size, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
    text |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
    text |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    vision |= {"embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4, "projection_dim": 32}
    torch.manual_seed(3)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=3)
    model = Florence2ForConditionalGeneration(config)
    _stir(model, 0.4)
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=3, forced_bos_token_id=0, decoder_start_token_id=2, eos_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=65, image_mean=[0.485, 0.456, 0.406]
    ).save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_qwen(folder: Path, kind: str = "qwen3_vl") -> Path:
    """A Qwen3-VL, Qwen2.5-VL or Qwen2-VL whose language model is 64 wide and whose eyes see patches of 8 pixels, four of them to a token."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(QWEN_SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        extra_special_tokens=QWEN_SPECIAL[3:],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}, "tie_word_embeddings": True}
    vision = {"patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2, "depth": 2, "num_heads": 2}
    vision |= {
        "qwen3_vl": {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0]},
        "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]},
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    }[kind]
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4, "tie_word_embeddings": True}
    torch.manual_seed(4)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids))
    _stir(model, 0.3)
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}  # as of the models of the hub
    model.generation_config.update(eos_token_id=[2], pad_token_id=0, suppress_tokens=list(range(8)), **drawn)  # words alone, no end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, patch_size=8, temporal_patch_size=2, merge_size=2
    ).save_pretrained(folder)
    return folder
