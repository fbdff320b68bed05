"""Captions into tokens, tokens into states: CLIP in windows of 75 tokens as the tools read it, and SD3's T5.

A window is BOS, up to 75 tokens, EOS, then the tokenizer's own padding: 77 in all. A longer caption takes several windows, each of them
read by itself, their states put one after the other (as sd-scripts and AUTOMATIC1111 do). There is no attention mask but CLIP's causal one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.families import WINDOW

CONTENT = WINDOW - 2  # tokens of a caption in one window, between BOS and EOS
STRONGER = 1.1  # what a pair of round brackets multiplies by; square ones divide

_MARKS = re.compile(r"\\[()\[\]\\]|[(\[\])]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")


@dataclass(frozen=True)
class Tokens:
    """Tokens of N captions, all in the same number of windows.

    `ids`: (N, windows * 77) int64; `weights`: (N, windows * 77) float32, None where all are 1; `windows`: how many each caption needs by
    itself (not kept by `rows`, which would have to wait for the device).
    """

    ids: torch.Tensor
    weights: torch.Tensor | None
    windows: tuple[int, ...] = ()

    def rows(self, index: torch.Tensor, windows: int | None = None) -> Tokens:
        """The rows `index` (a 1-D integer tensor on the same device), of the first `windows` windows."""
        columns = None if windows is None else windows * WINDOW
        ids, weights = (None if x is None else x[:, :columns].index_select(0, index) for x in (self.ids, self.weights))
        return Tokens(ids, weights)

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.ids.to(device), None if self.weights is None else self.weights.to(device), self.windows)


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""Pieces of `text` with their weights, as AUTOMATIC1111 reads it: (word) 1.1, ((word)) 1.21, [word] 1 / 1.1, (word:1.3) 1.3.

    Brackets within brackets multiply; one that is never closed counts to the end. `\(`, `\)`, `\[`, `\]` and `\\` stand for themselves, and
    so do a closing bracket without an opening one and a number outside of round brackets. Neighbours of one weight are one piece.
    """
    pieces: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the piece that comes first in each open bracket

    def close(kind: str, factor: float) -> None:
        for piece in pieces[opened[kind].pop() :]:
            piece[1] *= factor

    at = 0
    for mark in _MARKS.finditer(text):
        found, number = mark.group(), mark.group(1)
        pieces.append([text[at : mark.start()], 1.0])
        at = mark.end()
        if found in opened:
            opened[found].append(len(pieces))
        elif found[0] in ":)" and opened["("]:
            close("(", STRONGER if number is None else float(number))
        elif found == "]" and opened["["]:
            close("[", 1 / STRONGER)
        else:
            pieces.append([found.removeprefix("\\") if found[0] == "\\" else found, 1.0])
    pieces.append([text[at:], 1.0])
    for kind, factor in (("(", STRONGER), ("[", 1 / STRONGER)):
        while opened[kind]:
            close(kind, factor)
    out: list[tuple[str, float]] = []
    for words, weight in pieces:
        if words and out and out[-1][1] == weight:
            out[-1] = (out[-1][0] + words, weight)
        elif words:
            out.append((words, weight))
    return out or [("", 1.0)]


def _plain(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text` alone: no BOS, no EOS, not cut."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _weighed(tokenizer: Any, caption: str, weighted: bool) -> tuple[list[int], list[float]]:
    """(tokens, weight of each) of a caption."""
    ids, weights = [], []
    for words, weight in parse_weights(caption) if weighted else [(caption, 1.0)]:
        new = _plain(tokenizer, words)
        ids += new
        weights += [weight] * len(new)
    return ids, weights


def count(tokenizer: Any, caption: str) -> int:
    """How many tokens a caption has; a window takes 75."""
    return len(_plain(tokenizer, caption))


def tokenize(tokenizer: Any, captions: Sequence[str], max_windows: int = 3, weighted: bool = False) -> Tokens:
    """Captions in windows of 75 tokens, at most `max_windows`: what is longer is cut.

    All are filled up with empty windows to as many as the longest takes. With `weighted`, brackets weigh words (`parse_weights`).
    """
    found = [_weighed(tokenizer, caption, weighted) for caption in captions]
    windows = tuple(min(max_windows, max(1, -(-len(ids) // CONTENT))) for ids, _ in found)

    def row(values: list[Any], first: Any, last: Any, fill: Any) -> list[Any]:
        out = []
        for at in range(0, max(windows) * CONTENT, CONTENT):
            own = values[at : at + CONTENT]
            out += [first, *own, last, *[fill] * (CONTENT - len(own))]
        return out

    ends = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.tensor([row(ids, *ends) for ids, _ in found])
    return Tokens(ids, _unless_ones(torch.tensor([row(weights, 1.0, 1.0, 1.0) for _, weights in found])), windows)


def encode(model: torch.nn.Module, tokens: Tokens, skip: int, final_norm: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden (N, windows * 77, D), pooled (N, P)) of a CLIP text encoder; pooled is None for one without a projection.

    Args:
        skip: which layer is read, counted from the end; 1 is the last.
        final_norm: whether the encoder's last layer norm is applied to it (SD1, SD2), or not (SDXL, SD3).

    `pooled` is the first window's EOS after the last layer and the projection, whatever `skip` is, and knows no weights.
    """
    rows = len(tokens.ids)
    # Left out, transformers would make this mask under the capture of a CUDA graph and not otherwise, and round differently.
    mask = torch.full((WINDOW, WINDOW), torch.finfo(model.dtype).min, dtype=model.dtype, device=tokens.ids.device).triu(1)
    found = model(tokens.ids.view(-1, WINDOW), attention_mask=mask[None, None], output_hidden_states=True)
    hidden = found.hidden_states[-skip]
    if final_norm:
        hidden = getattr(model, "text_model", model).final_layer_norm(hidden)
    pooled = getattr(found, "text_embeds", None)
    if pooled is not None:
        pooled = pooled.view(rows, -1, pooled.shape[-1])[:, 0]
    return _weigh(hidden.reshape(rows, -1, hidden.shape[-1]), tokens.weights), pooled


def tokenize_t5(tokenizer: Any, captions: Sequence[str], max_windows: int = 3, weighted: bool = False) -> Tokens:
    """Captions for T5: tokens, EOS, padding, as many times 77 as the longest takes, at most `max_windows`."""
    found = [_weighed(tokenizer, caption, weighted) for caption in captions]
    windows = tuple(min(max_windows, -(-(len(ids) + 1) // WINDOW)) for ids, _ in found)
    columns = max(windows) * WINDOW

    def row(values: list[Any], last: Any, fill: Any) -> list[Any]:
        own = [*values[: columns - 1], last]
        return own + [fill] * (columns - len(own))

    ids = torch.tensor([row(ids, tokenizer.eos_token_id, tokenizer.pad_token_id) for ids, _ in found])
    return Tokens(ids, _unless_ones(torch.tensor([row(weights, 1.0, 1.0) for _, weights in found])), windows)


def encode_t5(model: torch.nn.Module, tokens: Tokens) -> torch.Tensor:
    """Hidden states (N, windows * 77, D) of T5.

    Padding is read like any other token, as in diffusers, but only up to the end of a caption's own last window: so a caption's states do
    not depend on how long the others of its batch are.
    """
    rows = len(tokens.ids)
    used = (tokens.ids.view(rows, -1, WINDOW) != model.config.pad_token_id).any(-1)
    mask = used.repeat_interleave(WINDOW, 1).long()
    return _weigh(model(tokens.ids, attention_mask=mask).last_hidden_state, tokens.weights)


def _unless_ones(weights: torch.Tensor) -> torch.Tensor | None:
    return None if bool((weights == 1).all()) else weights


def _weigh(hidden: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Multiply each token's state by its weight, then bring each window's mean back to what it was: AUTOMATIC1111's original rule."""
    if weights is None:
        return hidden
    before = hidden.unflatten(1, (-1, WINDOW))
    after = before * weights.unflatten(1, (-1, WINDOW)).unsqueeze(-1)
    after = after * (before.to(after.dtype).mean((2, 3), keepdim=True) / after.mean((2, 3), keepdim=True))
    return after.flatten(1, 2).to(hidden.dtype)
