"""The demo captioner: a small BLIP, trained from nothing on pictures of the drawn world and their full captions.

    python -m trainer.demo.build captioner            # trains, writes assets/demo/captioner
    python -m trainer.demo.build measure-captioner    # draws pictures that it has not seen, captions them by `trainer caption`, counts

It is a plain transformers folder that trainer/captioners/blip.py loads as any other BLIP. It has seen what the demo base has not, owls,
sunsets and the character zorp, but never the word zorp: a character's name is the trigger's business, so it says "a green creature".
"""

from __future__ import annotations

import math
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.demo import world

SIDE, PATCH, WIDTH, HEADS, EYES, MOUTH = 64, 8, 128, 4, 4, 2  # pixels, pixels, channels, heads, layers of the encoder and of the decoder
BATCH, RATE, WARMUP = 48, 1.2e-3, 200
SEED = 20261129
UNSEEN = 90_000_000  # pictures from this seed on are for measuring alone
CREATURE = "green creature"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GROUNDS = [p.format(c).replace(" a orange", " an orange") for p in world.PATTERN_WORDS.values() for c in world.COLOURS]
NOUNS = (*world.SUBJECTS, "owl", "creature")


def scene(seed: int) -> world.Scene:
    """What is on the picture of this number: mostly the base's world, one in seven a concept that is held out from the base."""
    rng = random.Random(seed)
    if rng.random() < 6 / 7:
        return world.random_scene(rng)
    return world.concept_scene(rng.choice((*world.HELD_OUT_SUBJECTS, world.HELD_OUT_STYLE)), rng)


def told(scene: world.Scene) -> str:
    """The caption that the captioner is to write."""
    return re.sub(r"^(a big )?zorp\b", lambda found: f"{found[1] or 'a '}{CREATURE}", world.caption(scene))


class Said(NamedTuple):
    """What a caption says; "" for what it leaves out, as silhouettes leave out their colour."""

    subject: str
    colour: str
    ground: str


def read(caption: str) -> Said | None:
    """What a caption in the drawn world's form says, None for any other text."""
    found = _FORM.fullmatch(caption)
    return Said(*(found[key] or "" for key in Said._fields)) if found else None


def _any(words: object) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_FORM = re.compile(
    rf"an? (?:(?:small|big) )?(?:(?P<colour>{_any(world.COLOURS)}) )?(?P<subject>{_any(NOUNS)})"
    rf"(?: (?:{_any(p for p in world.POSITIONS if p)}))?(?: (?P<ground>{_any(set(GROUNDS))}))?(?:, (?:{_any((*world.STYLES, 'sunset'))}) style)?"
)


def vocabulary() -> list[str]:
    """BERT's special tokens, then every word of the world's captions."""
    texts = [*NOUNS, *CREATURE.split(), *world.COLOURS, *world.SIZES, *world.POSITIONS, *GROUNDS, *world.STYLES, world.HELD_OUT_STYLE]
    return [*SPECIAL, *sorted({w for t in texts for w in t.split()} | {"a", "an", "style", ","})]


def make_model(words: int):
    """A BLIP of random weights. transformers would start its vision part at 1e-10, from where nothing is learnt in minutes."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    both = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    text = {**both, **ids, "num_hidden_layers": MOUTH, "vocab_size": words, "encoder_hidden_size": WIDTH, "max_position_embeddings": 32}
    vision = {**both, "num_hidden_layers": EYES, "image_size": SIDE, "patch_size": PATCH}
    model = BlipForConditionalGeneration(BlipConfig(text_config={**text, "label_smoothing": 0.0}, vision_config=vision))
    for name, p in model.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(p, std=0.02)
        elif p.dim() > 1:
            torch.nn.init.xavier_uniform_(p.flatten(1))
    return model


def train(out: Path, steps: int) -> None:
    """Train for `steps` batches of fresh pictures and write the folder `out`, in fp16. A pure function of SEED but for rounding."""
    from transformers import BertTokenizerFast
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}\n', encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(out)
    prepare = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    prepare.save_pretrained(out)
    torch.manual_seed(SEED)
    model = make_model(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    start, running = time.time(), 0.0
    for step in range(steps):
        scenes = [scene(step * BATCH + k) for k in range(BATCH)]
        images = [world.draw(s, 128, step * BATCH + k) for k, s in enumerate(scenes)]
        pixels = prepare(images=images, return_tensors="pt").pixel_values
        tokens = tokenizer([told(s) for s in scenes], padding=True, return_tensors="pt")
        labels = tokens.input_ids.masked_fill(tokens.input_ids == 0, -100)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        loss = model(pixel_values=pixels, labels=labels, **tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += (float(loss.detach()) - running) * max(0.02, 1 / (step + 1))
        if step % 100 == 99:
            print(f"captioner {step + 1} of {steps}, loss {running:.4f}, {time.time() - start:.0f} s", flush=True)
    model.eval().half().save_pretrained(out)
    for path in out.glob("generation_config.json"):
        path.unlink()


def draw(folder: Path, seeds: Iterator[int]) -> dict[str, world.Scene]:
    """Draw the pictures of these numbers into `folder`; {file name: what is on it}."""
    scenes = {}
    for seed in seeds:
        scenes[f"{seed}.png"] = scene(seed)
        world.draw(scenes[f"{seed}.png"], 128, seed).save(folder / f"{seed}.png")
    return scenes


def score(scenes: dict[str, world.Scene], captions: dict[str, str]) -> dict[str, float]:
    """Share of the pictures whose caption has the subject, its colour and the background right, each and all three, in [0, 1].

    A caption that isn't in the world's form is wrong in everything.
    """
    pairs = [(read(told(s)), read(captions[name])) for name, s in scenes.items()]
    keys = Said._fields
    right = [[said is not None and getattr(said, key) == getattr(true, key) for key in keys] for true, said in pairs]
    each = {key: sum(row[k] for row in right) / len(right) for k, key in enumerate(keys)}
    return each | {"all": sum(map(all, right)) / len(right)}


def measure(model: Path, count: int) -> dict[str, object]:
    """Caption `count` pictures that were never trained on, and the example's own, by the job that the page starts too."""
    from trainer.captioners.job import caption

    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "pictures"
        folder.mkdir()
        scenes = draw(folder, range(UNSEEN, UNSEEN + count))
        start = time.time()
        caption(folder, Path(temp) / "job", settings={"source": str(model), "batch": 32})
        seconds = time.time() - start
        captions = {name: (folder / name).with_suffix(".txt").read_text(encoding="utf-8").strip() for name in scenes}
    rates = {key: round(rate, 4) for key, rate in score(scenes, captions).items()}
    return {
        "pictures": count,
        **rates,
        "exact": round(sum(captions[n] == told(s) for n, s in scenes.items()) / count, 4),
        "seconds": round(seconds),
    }
