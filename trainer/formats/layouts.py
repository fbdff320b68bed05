"""Every Linear and Conv2d of the published models, without building them: {part: {path in diffusers: weight shape}}. Torch-free.

A file that is looked at alone has no base beside it to compare with. The tests hold these lists against the real models' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

Shapes = dict[str, tuple[int, ...]]
NAMES = ("sd1", "sd2", "sdxl", "sd3_medium", "sd3.5_medium", "sd3.5_large")


@cache
def layers(name: str) -> dict[str, Shapes]:
    """The layers of one of NAMES; text paths without `text_model.`."""
    small, big = _clip(12, 768, 3072), _clip(32, 1280, 5120) | {"text_projection": (1280, 1280)}
    if name == "sd1":
        return {"unet": _unet((320, 640, 1280, 1280), (1, 1, 1, 0), 768, linear=False), "text_1": small}
    if name == "sd2":
        return {"unet": _unet((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, linear=True), "text_1": _clip(23, 1024, 4096)}
    if name == "sdxl":
        return {"unet": _unet((320, 640, 1280), (0, 2, 10), 2048, linear=True, added=2816), "text_1": small, "text_2": big}
    depth, dual = {"sd3_medium": (24, 0), "sd3.5_medium": (24, 13), "sd3.5_large": (38, 0)}[name]
    text = {"text_1": small | {"text_projection": (768, 768)}, "text_2": big}
    return {"unet": _mmdit(depth, dual)} | text


def _clip(depth: int, width: int, inner: int) -> Shapes:
    out: Shapes = {}
    for i in range(depth):
        out |= {f"encoder.layers.{i}.self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        out |= {f"encoder.layers.{i}.mlp.fc1": (inner, width), f"encoder.layers.{i}.mlp.fc2": (width, inner)}
    return out


def _unet(widths: Sequence[int], depths: Sequence[int], cross: int, *, linear: bool, added: int = 0) -> Shapes:
    """`depths`: transformer blocks of each level, from the finest; the middle has as many as the coarsest level that has any."""
    first, time = widths[0], 4 * widths[0]
    out: Shapes = {"conv_in": (first, 4, 3, 3), "conv_out": (4, first, 3, 3)}
    out |= {"time_embedding.linear_1": (time, first), "time_embedding.linear_2": (time, time)}
    if added:
        out |= {"add_embedding.linear_1": (time, added), "add_embedding.linear_2": (time, time)}

    def resnet(path: str, wide: int, width: int) -> None:
        out[f"{path}.conv1"], out[f"{path}.conv2"] = (width, wide, 3, 3), (width, width, 3, 3)
        out[f"{path}.time_emb_proj"] = (width, time)
        if wide != width:
            out[f"{path}.conv_shortcut"] = (width, wide, 1, 1)

    def attention(path: str, width: int, depth: int) -> None:
        square = (width, width) if linear else (width, width, 1, 1)
        out[f"{path}.proj_in"] = out[f"{path}.proj_out"] = square
        for i in range(depth):
            block = f"{path}.transformer_blocks.{i}"
            for k, source in ((1, width), (2, cross)):
                out[f"{block}.attn{k}.to_q"] = out[f"{block}.attn{k}.to_out.0"] = (width, width)
                out[f"{block}.attn{k}.to_k"] = out[f"{block}.attn{k}.to_v"] = (width, source)
            out[f"{block}.ff.net.0.proj"], out[f"{block}.ff.net.2"] = (8 * width, width), (width, 4 * width)

    skips = [first]
    for b, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(2):
            resnet(f"down_blocks.{b}.resnets.{j}", skips[-1], width)
            skips.append(width)
            if depth:
                attention(f"down_blocks.{b}.attentions.{j}", width, depth)
        if b < len(widths) - 1:
            out[f"down_blocks.{b}.downsamplers.0.conv"] = (width, width, 3, 3)
            skips.append(width)
    width = widths[-1]
    for j in range(2):
        resnet(f"mid_block.resnets.{j}", width, width)
    attention("mid_block.attentions.0", width, [d for d in depths if d][-1])
    below = width
    for b, (width, depth) in enumerate(zip(reversed(widths), reversed(depths), strict=True)):
        for j in range(3):
            resnet(f"up_blocks.{b}.resnets.{j}", below + skips.pop(), width)
            below = width
            if depth:
                attention(f"up_blocks.{b}.attentions.{j}", width, depth)
        if b < len(widths) - 1:
            out[f"up_blocks.{b}.upsamplers.0.conv"] = (width, width, 3, 3)
    return out


def _mmdit(depth: int, dual: int) -> Shapes:
    """`dual`: blocks, from the first, that have a second attention over the image."""
    w = 64 * depth
    out: Shapes = {"pos_embed.proj": (w, 16, 2, 2), "context_embedder": (w, 4096), "proj_out": (64, w), "norm_out.linear": (2 * w, w)}
    for name, width in (("timestep_embedder", 256), ("text_embedder", 2048)):
        out |= {f"time_text_embed.{name}.linear_1": (w, width), f"time_text_embed.{name}.linear_2": (w, w)}
    for i in range(depth):
        last, block = i == depth - 1, f"transformer_blocks.{i}"
        squares = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
        squares += [] if last else ["attn.to_add_out"]
        squares += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"] if i < dual else []
        out |= {f"{block}.{n}": (w, w) for n in squares}
        for ff in ("ff",) if last else ("ff", "ff_context"):
            out |= {f"{block}.{ff}.net.0.proj": (4 * w, w), f"{block}.{ff}.net.2": (w, 4 * w)}
        out[f"{block}.norm1.linear"] = ((9 if i < dual else 6) * w, w)
        out[f"{block}.norm1_context.linear"] = ((2 if last else 6) * w, w)
    return out
