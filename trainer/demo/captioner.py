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
import torch.nn.functional as F

from trainer.demo import measure, world

SIDE, PATCH, WIDTH, HEADS, EYES, MOUTH = 64, 8, 128, 8, 4, 2  # pixels, pixels, channels, heads, layers of the encoder and of the decoder
BATCH, RATE, WARMUP = 32, 1.2e-3, 200
POOL, REUSE, NOUN_WEIGHT = 2048, 3, 4.0
SHARP = 6.5  # about 4 nats between the place that a head looks at and its neighbours
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
    _look_around(model.vision_model)
    return model


@torch.no_grad()
def _look_around(vision) -> None:
    """Let each head of all layers but the last begin by looking at one of a patch's eight neighbours, as a 3 x 3 convolution would.

    Attention can express convolution where the places' embeddings allow it (Cordonnier et al. 2020, arXiv:1911.03584). Here the first
    eight channels hold the sines and cosines of a patch's row and column, of two wavelengths; a head's keys are these, and its queries the
    same turned by the angle of one step, so that their product is greatest where the neighbour is.
    """
    side, own = SIDE // PATCH, WIDTH // HEADS
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [(place.flatten(), math.pi / length) for length in (side, side / 2) for place in (x, y)]
    channels = torch.stack([f(place * w) for place, w in waves for f in (torch.cos, torch.sin)], 1)  # (64, 8)
    count = channels.shape[1]
    embeddings = vision.embeddings
    embeddings.position_embedding[:, :, :count] = 0
    embeddings.position_embedding[0, 1:, :count] = channels
    embeddings.patch_embedding.weight *= 3  # as large as the places, since the layers' norms weigh them against each other
    embeddings.patch_embedding.weight[:count] = 0
    steps = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
    for layer in vision.encoder.layers[:-1]:
        query, key, _ = layer.self_attn.qkv.weight.view(3, HEADS, own, WIDTH)
        for head, (dx, dy) in enumerate(steps):
            query[head, :count], key[head, :count] = 0, 0
            key[head, :count, :count] = SHARP * torch.eye(count)
            for k, (step, (_, w)) in enumerate(zip((dx, dy) * 2, waves, strict=True)):
                cos, sin = math.cos(step * w), math.sin(step * w)
                query[head, 2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = SHARP * torch.tensor([[cos, -sin], [sin, cos]])
        layer.self_attn.projection.weight[:count] = 0
        layer.mlp.fc2.weight[:count] = 0


def train(out: Path, teacher: measure.SubjectClassifier, steps: int) -> None:
    """Train for `steps` batches and write the folder `out`, in fp16. A pure function of SEED but for rounding.

    A small ViT on its own takes many pictures to tell shapes, so it is also taught where to look: a linear map of each patch's state is to
    give what the demo's classifier (`teacher`) sees there, whose last feature map has the same 8 x 8 places. Nouns count for more than
    other words. Each picture is used in REUSE passes, since drawing it takes half as long as learning from it.
    """
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
    eyes = torch.nn.Sequential(*list(teacher)[:-3])  # without pooling and naming: (B, 160, 8, 8)
    head = torch.nn.Linear(WIDTH, 160)
    nouns = {word for noun in NOUNS for word in noun.split()}
    counts = torch.tensor([NOUN_WEIGHT if word in nouns else 1.0 for word in vocabulary()])
    params = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)

    def fresh(first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """POOL pictures as the model gets them, their captions' tokens, and what the teacher sees, a row for each place."""
        scenes = [scene(seed) for seed in range(first, first + POOL)]
        images = [world.draw(s, 128, first + k) for k, s in enumerate(scenes)]
        pixels = prepare(images=images, return_tensors="pt").pixel_values
        with torch.no_grad():
            seen = torch.cat([eyes(measure.to_pixels(images[k : k + 64])).flatten(2).mT for k in range(0, POOL, 64)])
        return pixels, tokenizer([told(s) for s in scenes], padding=True, return_tensors="pt").input_ids, seen

    start, running, order = time.time(), [0.0, 0.0], torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if not len(order):
            pixels, tokens, seen = fresh(step // (POOL * REUSE // BATCH) * POOL)
            order = torch.cat([torch.randperm(POOL) for _ in range(REUSE)])
        index, order = order[:BATCH], order[BATCH:]
        ids = tokens[index]
        falling = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / (1.5 * steps)))  # to a quarter
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, falling)
        said = model(pixel_values=pixels[index], input_ids=ids, attention_mask=(ids != 0).long())
        words = F.cross_entropy(said.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), counts, ignore_index=0)
        looks = F.mse_loss(head(said.image_embeds[:, 1:]), seen[index]) / seen.var()
        (words + looks).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = [r + (float(x.detach()) - r) * max(0.02, 1 / (step + 1)) for r, x in zip(running, (words, looks), strict=True)]
        if step % 100 == 99:
            print(
                f"captioner {step + 1} of {steps}, words {running[0]:.3f}, looks {running[1]:.3f}, {time.time() - start:.0f} s", flush=True
            )
    save(model, out)


def save(model, out: Path) -> None:
    """Write the model in fp16, with places for all the tokens that a captioner may write, should it find no end; it learnt those it needs."""
    embeddings, size = model.text_decoder.bert.embeddings, 64
    learnt = embeddings.position_embeddings.weight.detach()
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(F.pad(learnt, (0, 0, 0, size - len(learnt))))
    embeddings.position_ids = torch.arange(size)[None]
    model.config.text_config.max_position_embeddings = model.text_decoder.config.max_position_embeddings = size
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


def measure_it(model: Path, count: int) -> dict[str, object]:
    """Caption `count` pictures that were never trained on, by the job that the page starts too."""
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
    exact = sum(captions[name] == told(s) for name, s in scenes.items()) / count
    size = sum(p.stat().st_size for p in model.iterdir()) / 1e6
    return {"pictures": count, **rates, "exact": round(exact, 4), "megabytes": round(size, 1), "seconds": round(seconds)}
