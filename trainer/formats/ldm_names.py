"""UNet module paths: diffusers' block names and those of the original LDM code, which SDXL LoRA files use.

SD1, SD2 and SDXL all have two resnets in a down block and three in an up block. Source: diffusers `single_file_utils`.
"""

from __future__ import annotations

import re

from trainer.formats import FormatError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
EDGES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {ldm: own for own, ldm in RESNET.items()}
_EDGES = {ldm: own for own, ldm in EDGES.items()}


def to_ldm(path: str, attention_first: bool = True) -> str:
    """The LDM path of a diffusers UNet path. `attention_first`: the first up block has attention (SDXL; SD1 and SD2 have none there).

    Raises FormatError for a path that such a UNet does not have.
    """
    if path in EDGES:
        return EDGES[path]
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.([012])\.(.+)", path):
        side, b, kind, j, rest = found.groups()
        place = 3 * int(b) + int(j) + (side == "down")
        if not (side == "down" and j == "2"):
            return f"{'input' if side == 'down' else 'output'}_blocks.{place}." + (
                "0." + _resnet(path, rest) if kind == "resnets" else "1." + rest
            )
    if found := re.fullmatch(r"mid_block\.(resnets\.([01])|attentions\.0)\.(.+)", path):
        _, j, rest = found.groups()
        return f"middle_block.{2 * int(j)}.{_resnet(path, rest)}" if j else f"middle_block.1.{rest}"
    if found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", path):
        return f"output_blocks.{3 * int(found[1]) + 2}.{1 if found[1] == '0' and not attention_first else 2}.conv"
    raise FormatError(f"{path} is no layer of a UNet with two resnets in a down block, so it has no LDM name.")


def to_diffusers(path: str) -> str:
    """The diffusers path of an LDM UNet path; one that has diffusers' names already is given back.

    Raises FormatError for a path of neither layout.
    """
    if path in _EDGES:
        return _EDGES[path]
    if found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", path):
        return f"down_blocks.{int(found[1]) // 3 - 1}.downsamplers.0.conv"
    if found := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.conv", path):
        return f"up_blocks.{int(found[1]) // 3}.upsamplers.0.conv"
    if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([01])\.(.+)", path):
        side, place, kind, rest = found[1], int(found[2]) - (found[1] == "input"), found[3], found[4]
        block = f"{'down' if side == 'input' else 'up'}_blocks.{place // 3}"
        return f"{block}.resnets.{place % 3}.{_own_resnet(path, rest)}" if kind == "0" else f"{block}.attentions.{place % 3}.{rest}"
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        place, rest = int(found[1]), found[2]
        return f"mid_block.attentions.0.{rest}" if place == 1 else f"mid_block.resnets.{place // 2}.{_own_resnet(path, rest)}"
    if re.match(r"(down_blocks|up_blocks|mid_block)\.", path) or path in EDGES:
        return path
    raise FormatError(f"{path} is no layer of a Stable Diffusion UNet.")


def _resnet(path: str, name: str) -> str:
    if name not in RESNET:
        raise FormatError(f"{path} is no layer of a UNet: a resnet has {', '.join(RESNET)}.")
    return RESNET[name]


def _own_resnet(path: str, name: str) -> str:
    if name not in _RESNET:
        raise FormatError(f"{path} is no layer of a UNet: a resnet has {', '.join(_RESNET)}.")
    return _RESNET[name]
