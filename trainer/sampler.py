"""Sample images: noise, the denoising loop, pictures. Previews, generate, compare and the playground all make theirs here.

The arithmetic between the denoiser's passes is that of diffusers' schedulers, whose numbers stay on the host, so that nothing in the loop
waits for the device. Prompts and guidance are one batch: the rows of the negative prompt, then those of the prompts.

An encoder is on the device while it reads, the VAE while it decodes. On CUDA the previews' pass is a graph: the first step runs eagerly,
which compiles kernels, then the pass is captured, which takes as long as an eager pass and executes nothing, and the other steps are
replayed. The graph ends with the call: another capture is a twentieth of 20 eager steps, while its memory (activations of all rows, about
1.5 GiB for four pictures of SDXL, an estimate) would be missing in training, and weights may move between two calls.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from trainer.families import Cond, Family, Models, States

Tick = Callable[[], None]
T = TypeVar("T")
Guess = Callable[[torch.Tensor, torch.Tensor, Cond], torch.Tensor]  # (latents, t, what the denoiser is told) -> guided prediction

# Pictures that are denoised at once on CUDA. Their rows, two for each, take less memory than the decoding of one of them.
AT_ONCE = 8
BATCH_PIXELS = 512 * 512  # elsewhere so many pixels, but at least one picture: a larger batch is no faster there
DECODED_PIXELS = 512 * 512  # pixels that are decoded at once, but at least one picture


@dataclass(frozen=True)
class _Told:
    """What an encoder made of texts, and how many windows each of them takes."""

    texts: tuple[str, ...]
    states: States
    windows: tuple[int, ...]


class Sampler:
    """Makes pictures with the models as they are at each call.

    Args:
        frozen: the text encoders whose weights stay as they are: what they make of the prompts is kept, and made anew only when a prompt
            changes. The others read at each call.
        graphs: whether the denoiser's passes are CUDA graphs where they can be; not for models whose layers change between calls.
        attention: how the models were loaded, as in train.attention.
        room: gives memory of the device back, at a price; called where it is short, at most once a call.
        say: gets a sentence for the user, each once.
    """

    def __init__(
        self,
        family: Family,
        models: Models,
        *,
        frozen: Container[str] = (),
        graphs: bool = False,
        attention: str = "sdpa",
        room: Callable[[], None] | None = None,
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.family, self.models, self.frozen, self.room, self._say = family, models, frozen, room, say
        self.why_eager = why_not(models.device, attention) if graphs else "this is a single call"
        self.replays = 0  # of all calls
        self._told: dict[str, _Told] = {}
        self._spare = False  # whether `room` can still be made in this call
        self._tiled = False  # whether a picture was too large to be decoded whole
        self._pass: _Pass | None = None
        if graphs and models.device.type == "cuda" and self.why_eager:
            say(f"Sample images are made without CUDA graphs, which is slower: {self.why_eager}.")

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        tick: Tick | None = None,
    ) -> list[Image.Image]:
        """Pictures of `size` (width, height), one for each prompt, each from its own seed on the CPU.

        With `guidance` of at most 1 there is none, and `negative` has no effect. `tick` is called after each denoising step; what it
        raises ends the sampling. Raises ValueError for a size that the denoiser does not take.
        """
        self._check(size)
        self._spare = self.room is not None
        guided = guidance > 1
        told = self._with_room(lambda: self.read(prompts, negative, guidance))
        scheduler = self.family.preview_scheduler(self.models)
        latents: dict[int, torch.Tensor] = {}

        def denoise(which: Sequence[int]) -> None:
            texts = [*([negative] * len(which) if guided else []), *(prompts[k] for k in which)]
            cond = self._condition(told, texts, size)
            noise = [torch.randn((1, *self._shape(size)), generator=torch.Generator().manual_seed(seeds[k])) for k in which]
            scheduler.set_timesteps(steps)  # anew for each batch: it remembers the last steps
            scheduler.set_begin_index(0)  # else it would look the first timestep up
            latents.update(zip(which, self._denoise(torch.cat(noise), cond, guidance, scheduler, tick), strict=True))

        try:
            for which in self._batches(told, prompts, negative if guided else None, size):
                self._fitting(denoise, which)
        finally:
            self.release()
        return self.decode([latents[k] for k in range(len(prompts))])

    def release(self) -> None:
        """Give the memory of the graph, and what else is not in use, back to the device."""
        cuda = self.models.device.type == "cuda"
        if cuda and self._pass is not None:
            torch.cuda.synchronize(self.models.device)  # a graph's memory is unmapped at once, also while a replay still uses it
        self._pass = None
        if cuda:
            torch.cuda.empty_cache()

    def _with_room(self, work: Callable[[], T]) -> T:
        """work(), tried again with the memory that is given back where it is short."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self._spare:
                raise
        self._spare = False  # here the error is gone, and with it what its frames held
        self.release()
        self.room()
        return work()

    # what is asked for

    def _check(self, size: tuple[int, int]) -> None:
        step = 8 * (self.models.parts["unet"].config.get("patch_size") or 1)
        if any(side % step for side in size):
            near = " x ".join(str(max(step, round(side / step) * step)) for side in size)
            raise ValueError(f"The pictures' size is {size[0]} x {size[1]}; both sides must be divisible by {step}. Nearest: {near}.")

    def _shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.models.parts["unet"].config.in_channels, size[1] // 8, size[0] // 8

    def read(self, prompts: Sequence[str], negative: str, guidance: float, only: Container[str] | None = None) -> dict[str, _Told]:
        """What each encoder (or those that `only` names) makes of the texts; of frozen ones, what is known already."""
        texts = tuple(dict.fromkeys([*prompts, *([negative] if guidance > 1 else [])]))
        found = {}
        for part in (p for p in self.models.text if only is None or p in only):
            known = self._told.get(part)
            if known is None or known.texts != texts:
                known = _Told(texts, *self.family.read(self.models, part, texts))
            if part in self.frozen:
                self._told[part] = known
            found[part] = known
        return found

    def _batches(self, told: dict[str, _Told], prompts: Sequence[str], negative: str | None, size: tuple[int, int]) -> Iterator[list[int]]:
        """The prompts' indices in batches. Those of one batch take equally many windows with the negative prompt, so that no picture
        depends on how long the prompts of others are.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for k, prompt in enumerate(prompts):
            both = (prompt,) if negative is None else (prompt, negative)
            groups.setdefault(tuple(_longest(t, both) for t in told.values()), []).append(k)
        most = AT_ONCE if self.models.device.type == "cuda" else max(1, BATCH_PIXELS // (size[0] * size[1]))
        for members in groups.values():
            each = -(-len(members) // -(-len(members) // most))  # even batches: a graph is for one size
            yield from (members[at : at + each] for at in range(0, len(members), each))

    def _condition(self, told: dict[str, _Told], texts: Sequence[str], size: tuple[int, int]) -> Cond:
        """What the denoiser is told, in its own dtype: a row for each of `texts`, as wide as the longest of them needs."""
        models, states = self.models, {}
        for part, t in told.items():
            index = torch.tensor([t.texts.index(text) for text in texts], device=models.device)
            states[part] = t.states.rows(index, _longest(t, texts))
        cond = self.family.condition(models, states, self.family.whole(models, size, len(texts)))
        dtype = models.parts["unet"].dtype
        return Cond(cond.hidden.to(dtype), None if cond.pooled is None else cond.pooled.to(dtype), cond.size)

    # the denoising

    def _fitting(self, denoise: Callable[[Sequence[int]], None], which: Sequence[int]) -> None:
        """Denoise the pictures `which` at once, or half of them at a time where the memory is short."""
        try:
            return self._with_room(lambda: denoise(which))
        except torch.OutOfMemoryError:
            if len(which) == 1:
                raise
        self.release()
        for half in (which[: len(which) // 2], which[len(which) // 2 :]):
            self._fitting(denoise, half)

    def _denoise(self, noise: torch.Tensor, cond: Cond, guidance: float, scheduler: Any, tick: Tick | None) -> torch.Tensor:
        """Latents (n, C, h, w) in float32 from noise of this shape on the host, told by `cond` of n rows, or with guidance of 2n."""
        latents = noise.to(self.models.device)
        t = torch.zeros(len(cond.hidden), dtype=scheduler.timesteps.dtype, device=latents.device)

        def guess(latents: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
            if len(t) == len(latents):
                return self.family.predict(self.models, latents, t, cond)
            without, told = self.family.predict(self.models, torch.cat([latents, latents]), t, cond).chunk(2)
            return without + guidance * (told - without)

        for at, number in zip(scheduler.timesteps, scheduler.timesteps.tolist(), strict=True):
            t.fill_(number)
            latents = scheduler.step(self._run(guess, latents, t, cond), at, latents, return_dict=False)[0]
            if tick:
                tick()
        return latents

    def _run(self, guess: Guess, *given: Any) -> torch.Tensor:
        """guess(*given): eagerly at the first time with such inputs, then captured, then replayed."""
        if self.why_eager:
            return guess(*given)
        kind = [(x.shape, x.dtype) for x in _tensors(*given)]
        if self._pass is None or self._pass.kind != kind:
            self.release()
            self._pass = _Pass(kind)
            return guess(*given)
        try:
            out = self._pass(guess, *given)
        except RuntimeError as error:  # of CUDA, or torch's for memory that is short: without a graph it may work
            if self._spare and isinstance(error, torch.OutOfMemoryError):
                raise  # there is room to be made
            self.why_eager = str(error).partition("\n")[0].rstrip(".")
        if self.why_eager:
            self._say(f"Sample images are made without CUDA graphs, which is slower: {self.why_eager}.")
            self.release()
            return guess(*given)
        self.replays += 1
        return out

    # the pictures

    def decode(self, latents: Sequence[torch.Tensor]) -> list[Image.Image]:
        """Pictures of latents (C, h, w) each, by the VAE, which is borrowed for it."""
        vae = self.models.vae
        whole = torch.stack(list(latents)).to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        most = max(1, DECODED_PIXELS // (64 * whole.shape[-2] * whole.shape[-1]))

        def decode() -> list[Image.Image]:
            with self.models.borrow("vae"):
                return [picture for piece in whole.split(most) for picture in self._pictures(piece)]

        try:
            return self._with_room(decode)
        finally:
            self.release()

    def _pictures(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents (n, C, h, w) as the VAE takes them: at once, or one by one, or in tiles, as the memory allows."""
        if not self._tiled:
            try:
                return _images(self._with_room(lambda: self.models.vae.decode(latents, return_dict=False)[0]))
            except torch.OutOfMemoryError:
                pass
            self.release()
            if len(latents) == 1:
                self._tiled = True
                self._say(
                    "The GPU's memory is too small to decode a sample image at once. From now on they are decoded in overlapping tiles, which may "
                    "show as slight differences in brightness; the training is not touched. Smaller sample images (preview.width, preview.height) avoid it."
                )
        return [picture for one in latents.split(1) for picture in (self._in_tiles(one) if self._tiled else self._pictures(one))]

    def _in_tiles(self, latents: torch.Tensor) -> list[Image.Image]:
        """The picture of latents (1, C, h, w), each tile about a third as high and wide as the picture."""
        with self.models.tiling(-(-max(latents.shape[-2:]) // 12) * 4):  # of which a quarter, in which tiles overlap, is a whole number
            return _images(self.models.vae.decode(latents, return_dict=False)[0])


class _Pass:
    """A pass of the denoiser as a CUDA graph, whose inputs are copied into the tensors that it was captured with.

    `kind`: shape and dtype of each input.
    """

    def __init__(self, kind: list[Any]) -> None:
        self.kind = kind
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[torch.Tensor] = []
        self.out: torch.Tensor

    def __call__(self, guess: Guess, latents: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """guess(latents, t, cond), in a tensor that holds it until the next call; captured at the first one."""
        if self.graph is None:
            own = latents.clone(), t.clone(), Cond(*(None if x is None else x.clone() for x in (cond.hidden, cond.pooled, cond.size)))
            self.inputs = _tensors(*own)
            self.graph, self.out = _capture(lambda: guess(*own))
        torch._foreach_copy_(self.inputs, _tensors(latents, t, cond))
        self.graph.replay()
        return self.out


def _capture(work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """`work` as a graph, and what it will have made after each replay. Raises RuntimeError where it cannot be captured."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream, device, collects = torch.cuda.current_stream(), torch.cuda.current_device(), gc.isenabled()
    gc.disable()  # what is collected during a capture may end it; collecting all before it would take .2 s
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # what other threads do is no matter
            out = work()
    except BaseException:  # torch stays on the capture's stream then, and its allocator may take the capture for going on
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # it does know of the end
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
    finally:
        if collects:
            gc.enable()
    return graph, out


def why_not(device: torch.device, attention: str) -> str | None:
    """Why the passes cannot be captured, as the end of a sentence; None: they can."""
    if device.type != "cuda":
        return f"CUDA graphs need an NVIDIA or AMD GPU, this run is on {device.type}"
    if torch.version.hip:
        return "CUDA graphs are untried with ROCm"
    if attention == "xformers":
        return "CUDA graphs are untried with train.attention = xformers"
    return None


def _longest(told: _Told, texts: Sequence[str]) -> int:
    """The windows that the longest of `texts` takes."""
    return max(told.windows[told.texts.index(text)] for text in texts)


def _tensors(latents: torch.Tensor, t: torch.Tensor, cond: Cond) -> list[torch.Tensor]:
    return [x for x in (latents, t, cond.hidden, cond.pooled, cond.size) if x is not None]


def _images(pixels: torch.Tensor) -> list[Image.Image]:
    """Pictures of pixels (n, 3, H, W) in [-1, 1]."""
    levels = (pixels.float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(x) for x in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
