"""SD3's transformer: diffusers' module paths and those of the original MMDiT, where q, k and v are one layer of stacked rows.

Three LoRAs of rank r fuse into one of rank 3r exactly: down = [dq; dk; dv], up = the block diagonal of uq, uk and uv; three that share
one down fuse at rank r. The halves of a few modulation layers' rows are swapped. Source: diffusers `convert_sd3_to_diffusers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from trainer.adapters import Delta
from trainer.formats import FormatError

# within a block: original -> diffusers, three for a fused one
BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
EDGES = {
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}
_BLOCK = {own: (original, place) for original, group in BLOCK.items() for place, own in enumerate(group)}
_EDGES = {own: original for original, own in EDGES.items()}
# what diffusers' paths begin with, where the original's differ
DIFFUSERS = ("transformer_blocks.", "norm_out.", "proj_out", "pos_embed.", "time_text_embed.")
VARIANTS = ("sd3_medium", "sd3.5_medium", "sd3.5_large")


def to_original(path: str) -> tuple[str, int]:
    """(the original's path, place among the layers stacked there) of a diffusers path. Raises FormatError for an unknown one."""
    if path in _EDGES:
        return _EDGES[path], 0
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
    if not found or found[2] not in _BLOCK:
        raise FormatError(f"{path} is no layer of an SD3 transformer that a LoRA file has a name for.")
    original, place = _BLOCK[found[2]]
    return f"joint_blocks.{found[1]}.{original}", place


def to_diffusers(path: str) -> tuple[str, ...]:
    """The diffusers paths, three for a fused layer, of an original path. Raises FormatError for an unknown one."""
    if path in EDGES:
        return (EDGES[path],)
    found = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", path)
    if not found or found[2] not in BLOCK:
        raise FormatError(f"{path} is no layer of an SD3 transformer.")
    return tuple(f"transformer_blocks.{found[1]}.{own}" for own in BLOCK[found[2]])


def variant(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """One of VARIANTS, as far as a file's keys and shapes tell: large has 38 blocks of width 2432, 3.5 medium a second attention."""
    blocks = [int(n) for key in shapes for n in re.findall(r"(?:joint|transformer)_blocks[._](\d+)", key)]
    if max(blocks, default=0) > 23 or any(2432 in shape for shape in shapes.values()):
        return "sd3.5_large"
    return "sd3.5_medium" if any(re.search(r"[._]attn2[._]", key) for key in shapes) else "sd3_medium"


def fuse(deltas: Iterable[Delta]) -> list[tuple[Delta, int]]:
    """The deltas of the transformer with original paths, q, k and v as one; and how many LoRAs are stacked in each (1 to 3).

    Where one of q, k and v is missing its rows are zero. A fused delta has the scale of its parts; where they differ, `up` is scaled.
    """
    groups: dict[str, dict[int, Delta]] = {}
    for d in deltas:
        path, place = to_original(d.path)
        groups.setdefault(path, {})[place] = d
    out = []
    for path, group in groups.items():
        places = len(to_diffusers(path))
        first = next(iter(group.values()))
        if places == 1:
            out.append((replace(first, path=path, tensors=_turned(first)), 1))
            continue
        rows = first.tensors["up"].shape[0]
        if any(d.tensors["up"].shape[0] != rows for d in group.values()):
            raise FormatError(f"{first.path} and its neighbours have different heights, so they cannot be one layer {path}.")
        scale = max((d.scale for d in group.values()), key=abs)
        ups = {place: d.tensors["up"].double() * (d.scale / scale if scale else 0.0) for place, d in group.items()}
        downs = [d.tensors["down"] for d in group.values()]
        if len(downs) > 1 and all(torch.equal(downs[0], other) for other in downs[1:]):
            up = torch.cat([ups.get(i, torch.zeros(rows, len(downs[0]), dtype=torch.float64)) for i in range(places)])
            out.append((Delta(first.part, path, "lora", {"down": downs[0], "up": up}, scale), 1))
            continue
        up = torch.zeros(places * rows, sum(len(d) for d in downs), dtype=torch.float64)
        at = 0
        for place in sorted(group):
            rank = ups[place].shape[1]
            up[place * rows : (place + 1) * rows, at : at + rank] = ups[place]
            at += rank
        down = torch.cat([group[place].tensors["down"] for place in sorted(group)])
        out.append((Delta(first.part, path, "lora", {"down": down, "up": up}, scale), len(group)))
    return out


def split(delta: Delta) -> list[Delta]:
    """The deltas with diffusers paths of one with an original path; `up` columns that do nothing for q, k or v are dropped.

    Raises FormatError when a fused layer's rows are not three times a number.
    """
    paths = to_diffusers(delta.path)
    if len(paths) == 1:
        d = replace(delta, path=paths[0])
        return [replace(d, tensors=_turned(d))]
    down, up = delta.tensors["down"], delta.tensors["up"]
    if up.shape[0] % 3:
        raise FormatError(f"{delta.path} has {up.shape[0]} rows; q, k and v need three times a number. The file is damaged.")
    return [
        replace(delta, path=path, tensors={"down": down[kept].contiguous(), "up": rows[:, kept].contiguous()})
        for path, rows, kept in zip(paths, up.chunk(3), _columns(up), strict=True)
    ]


def _columns(up: torch.Tensor) -> list[torch.Tensor]:
    """For q, k and v, the ranks that are theirs."""
    rank = up.shape[1]
    blocks = up.chunk(3)
    if rank % 3 == 0:  # as `fuse` writes three of one rank, even where nothing was learned
        own = torch.arange(rank).chunk(3)
        outside = [torch.cat([b[:, c] for j, c in enumerate(own) if j != i], 1) for i, b in enumerate(blocks)]
        if not any(o.any() for o in outside):
            return list(own)
    used = [b.any(0).nonzero().flatten() for b in blocks]
    return [u if len(u) else torch.zeros(1, dtype=torch.int64) for u in used]


def _turned(delta: Delta) -> dict[str, torch.Tensor]:
    """`up` with the halves of its rows swapped where the two layouts have shift and scale in the other order: norm_out, and the
    last block's context modulation, the only one with two chunks of the width instead of six. Its own inverse."""
    down, up = delta.tensors["down"], delta.tensors["up"]
    context = delta.path.endswith(("norm1_context.linear", "context_block.adaLN_modulation.1")) and up.shape[0] == 2 * down.shape[1]
    if context or delta.path in ("norm_out.linear", "final_layer.adaLN_modulation.1"):
        up = torch.cat(up.chunk(2)[::-1])
    return {"down": down, "up": up}
