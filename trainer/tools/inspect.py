"""Say what a model file is and, for a LoRA, what is in it, who reads it, and whether it can do anything."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.formats import FormatError
from trainer.formats.metadata import SHOWN, read_header, shown_as, tensor_hash
from trainer.formats.probe import TITLES, identify

if TYPE_CHECKING:
    import torch

    from trainer.adapters import Delta

FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
# what an ending says of the kind of adapter; the first that is there counts
KINDS = {
    "boft": r"boft$",
    "oft": r"oft_(blocks|diag|R\.weight)$",
    "glora": r"[ab][12]\.weight$",
    "ia3": r"on_input$",
    "dora": r"(dora_scale|lora_magnitude_vector(\.weight)?)$",
    "loha": r"hada_",
    "lokr": r"lokr_",
    "lora": r"lora",
    "full": r"diff(_b)?$",
    "norm": r"[wb]_norm$",
}
MOST_NORMS = 60  # lines of norms in the text


def inspect(path: Path) -> dict[str, Any]:
    """What stands at `path`, ready for JSON; of a file that is no LoRA, `problems` says what it is instead. Raises nothing of its own.

    Keys: `family` (sd1, sd2, sdxl, sd3, another, or None); `adapter` (lora, locon, dora, loha, lokr, oft, boft, glora, ia3, full, norm,
    or None); `rank` and `alpha` (a number, a sorted list where they differ, None where there is none; alpha is rank * scale);
    `layers` {part: {block: {"layers": n, "norm": Frobenius norm of its changes of W, None where only the base could tell}}};
    `parameters`; `effect` (None: only the base could tell); `finite`; `metadata`; `unread` {tool: keys that it leaves out};
    `problems` (sentences).
    """
    path = Path(path)
    out: dict[str, Any] = {"family": None, "adapter": None, "rank": None, "alpha": None, "layers": {}, "parameters": 0}
    out |= {"effect": None, "finite": None, "metadata": {}, "unread": {}, "problems": []}
    try:
        found = identify(path)
        out["family"] = found.family
        if path.is_dir():
            raise FormatError(f"{path.name} is {found.what}, not a LoRA file.")
        out["metadata"], header = read_header(path)
        out["parameters"] = sum(_count(shape) for _, shape in header.values())
        if found.kind != "lora":
            raise FormatError(f"{path.name} is {found.what}. It is not a LoRA.")
    except FormatError as error:
        return out | {"problems": [str(error)]}
    except OSError as error:
        return out | {"problems": [f"{path} cannot be read: {error.strerror}. Choose another file."]}
    try:
        return out | _lora(path, found.family, out["metadata"], header)
    except FormatError as error:
        return out | {"problems": [str(error)]}


def read_lora(path: Path) -> tuple[str, list[Delta]]:
    """(naming, deltas) of a LoRA file. Raises FormatError when it is not a plain LoRA of a family that this project knows."""
    from trainer.formats.self_check import deltas_of, read

    found = identify(path)
    if found.kind != "lora":
        raise FormatError(f"{Path(path).name} is {found.what}. Needed here: a LoRA.")
    family = found.family or FAMILIES[0]  # the demo base's widths belong to no known family, its names to the first one
    if family not in FAMILIES:
        raise FormatError(f"{Path(path).name} is {found.what}. Read here: LoRAs of {', '.join(FAMILIES)}.")
    metadata, _ = read_header(path)
    return deltas_of(family, read(path), metadata)


@dataclass
class Layer:
    """One stem of a file: its tensors by ending, where it belongs, and what it does."""

    keys: dict[str, str]
    part: str = ""
    paths: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    effect: bool | None = None


def _lora(path: Path, family: str | None, entries: Mapping[str, str], header: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    from trainer.formats import readers

    known = family if family in FAMILIES else None
    naming = readers.naming(header)
    grouped: dict[str, dict[str, str]] = {}
    for key, (_, shape) in header.items():
        if shape or key.endswith(".alpha"):  # what stands alone is no layer: markers and counters
            name, ending = readers.split_key(key)
            grouped.setdefault(name, {})[ending] = key
    layers = {name: Layer(keys) for name, keys in grouped.items()}
    bad: list[str] = []
    alphas: dict[str, float | None] = {}
    problems: list[str] = []
    try:
        with safe_open(path, "pt") as file:
            for name, layer in layers.items():
                tensors = {ending: file.get_tensor(key) for ending, key in layer.keys.items()}
                bad += [layer.keys[e] for e, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]
                if {"lora_down.weight", "hada_w1_a", "lokr_w1_a", "lokr_w2_a"} & tensors.keys():
                    alphas[name] = float(tensors["alpha"].flatten()[0]) if "alpha" in tensors and tensors["alpha"].numel() else None
                problems += _measure(layer, name, known or FAMILIES[0], naming, tensors, entries)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path.name} cannot be read: {error}. Download or copy it again.") from None

    adapter = _adapter(header, layers.values())
    out: dict[str, Any] = {"adapter": adapter, "finite": not bad}
    out["rank"] = _one(r for layer in layers.values() for r in layer.ranks)
    out["alpha"] = _one(float(f"{a:.4g}") for layer in layers.values() for a in layer.alphas if math.isfinite(a))
    out["layers"] = _blocks(layers.values())
    effects = {layer.effect for layer in layers.values()}
    out["effect"] = True if True in effects else None if None in effects else False

    if bad:
        problems.append(
            f"{len(bad)} tensors hold values that are not numbers, the first is {bad[0]}. The training failed: pictures turn black."
        )
    if out["effect"] is False:
        problems.append("It changes nothing at all: the change of every layer is zero. It was not trained.")
    if not known:
        what = f"a LoRA for {TITLES[family]}, which is not judged here" if family else "a LoRA whose base cannot be told from its names"
        return out | {"problems": [f"{path.name} is {what}.", *problems]}
    base, other = _base(known, naming, layers.values())
    problems += other
    verdict = readers.judge(known, [k for k in header if header[k][1] or k.endswith(".alpha")], base, alphas)
    out["unread"] = verdict.unread
    problems += verdict.sentences()
    if adapter not in ("lora", "locon"):
        problems.append(f"It is of the kind {adapter}, which this program recognises but cannot convert, merge or start from.")
    problems += _metadata_problems(path, known, entries)
    return out | {"problems": list(dict.fromkeys(problems))}


def _measure(
    layer: Layer, name: str, family: str, naming: str, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, str]
) -> list[str]:
    """Fill in what a layer is and does; sentences on what is wrong with it."""
    from trainer.formats.factors import norm

    layer.part, layer.paths = _place(family, naming, name)
    plain = {"lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha"}
    if tensors.keys() <= plain:
        try:
            found = _deltas(family, naming, name, tensors, entries)
        except FormatError as error:
            return [str(error)]
        layer.ranks = [d.tensors["down"].shape[0] for d in found]
        layer.alphas = [d.scale * r for d, r in zip(found, layer.ranks, strict=True)]
        layer.norms = [n if (n := norm(d)) < float("inf") else None for d in found]
        layer.effect = any(n is None or n > 0 for n in layer.norms)
        layer.paths = tuple(d.path for d in found)
        down, up = found[0].tensors["down"], found[0].tensors["up"]
        layer.shape = (up.shape[0], *down.shape[1:])
        return []
    rank = next((t.shape[0] for e in ("lora_down.weight", "lora_A.weight") if (t := tensors.get(e)) is not None), None)
    rank = rank or next((t.shape[-1] for e in ("hada_w1_a", "lokr_w2_a", "lokr_w1_a") if (t := tensors.get(e)) is not None), None)
    layer.ranks = [rank] if rank else []
    layer.alphas = [float(tensors["alpha"].flatten()[0])] if rank and "alpha" in tensors and tensors["alpha"].numel() else []
    layer.norms = [None]
    layer.effect = _effect(tensors)
    missing = [
        pair for pair in (("lora_up.weight", "lora_down.weight"), ("lora_A.weight", "lora_B.weight")) if len({*pair} & tensors.keys()) == 1
    ]
    return [f"{name} has only one of {' and '.join(pair)}; the file is damaged." for pair in missing]


def _effect(tensors: Mapping[str, torch.Tensor]) -> bool | None:
    """Whether a layer of another kind than plain LoRA can change anything; None where it depends on the base's weights."""
    if any("magnitude" in e or e == "dora_scale" for e in tensors) or any(e in tensors for e in ("on_input", "a1.weight", "a2.weight")):
        ups = [t for e, t in tensors.items() if e in ("lora_up.weight", "lora_B.weight")]
        return True if any(t.any() for t in ups) else None
    factors = [
        ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ]
    for group in factors:  # a product: zero as soon as one factor is
        if there := [tensors[e] for e in group if e in tensors]:
            return all(bool(t.any()) for t in there)
    return any(bool(t.any()) for e, t in tensors.items() if e not in ("alpha", "rescale"))


def _place(family: str, naming: str, name: str) -> tuple[str, tuple[str, ...]]:
    """(part, module paths) of a stem; no paths for what is no layer of the family."""
    from trainer.formats import comfy_names, kohya, peft_names

    try:
        if naming == "kohya":
            return kohya.locate(family, name)
        if naming == "comfy":
            part, path = comfy_names.locate(family, name)
            return part, (path,)
    except FormatError:
        return "", ()
    component, _, path = name.partition(".")
    part = {c: p for p, c in peft_names.COMPONENTS[family].items()}.get(component, "")
    return part, (kohya.canonical(part, path),) if part else ()


def _deltas(family: str, naming: str, name: str, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, str]) -> list[Delta]:
    from trainer.formats.self_check import deltas_of

    if naming == "unknown":
        raise FormatError(f"{name} is a name that is not known here.")
    return deltas_of(family, {f"{name}.{ending}": tensor for ending, tensor in tensors.items()}, dict(entries))[1]


def _adapter(header: Mapping[str, tuple[str, tuple[int, ...]]], layers: Iterable[Layer]) -> str:
    from trainer.formats.readers import split_key

    endings = Counter(split_key(key)[1] for key in header)
    kind = next((k for k, pattern in KINDS.items() if any(re.match(pattern, e) for e in endings)), "lora")
    if kind == "oft" and any(split_key(k)[1] == "oft_blocks" and len(shape) == 4 for k, (_, shape) in header.items()):
        return "boft"
    convolutions = any(len(shape) == 4 and shape[-1] > 1 for k, (_, shape) in header.items() if "lora_down" in k or "lora_A" in k)
    return "locon" if kind == "lora" and (convolutions or "lora_mid.weight" in endings) else kind


def _base(family: str, naming: str, layers: Iterable[Layer]) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """The base's layers as far as the file shows which base that is, and sentences on what does not fit it."""
    from trainer.formats import layouts, sd3_names

    placed = [(layer, path) for layer in layers for path in layer.paths]
    shown = {path: layer.shape for layer, path in placed if layer.part == "unet"}
    base = layouts.layers(sd3_names.variant(shown) if family == "sd3" else family)
    sized = [(layer.part, path, layer.shape) for layer, path in placed if layer.shape]
    fit = {(part, path): base.get(part, {}).get(path) == shape for part, path, shape in sized if path in base.get(part, {})}
    if sum(fit.values()) * 2 < len(fit):  # another size of the family, such as the demo base: its layers are not known beyond the file
        own: dict[str, dict[str, tuple[int, ...]]] = {}
        for part, path, shape in sized:
            own.setdefault(part, {})[path] = shape
        return own, [f"Its layers have other sizes than those of {TITLES[family]}: it fits its own base alone, not the published models."]
    wrong = [" ".join(key) for key, right in fit.items() if not right]
    text = (
        f"{len(wrong)} layers have other sizes than the base's, the first is {wrong[0]}. Tools fail on them or skip them." if wrong else ""
    )
    return base, [text] if text else []


def _metadata_problems(path: Path, family: str, entries: Mapping[str, str]) -> list[str]:
    problems = []
    wrong = {tool: shown for tool, shown in shown_as(entries).items() if shown not in (family, "unknown")}
    if family != "sd3" and wrong:
        tools, shown = ", ".join(wrong), TITLES[next(iter(wrong.values()))]
        problems.append(f"Its metadata make {tools} take it for {shown} and hide it from the list. Convert it, which mends that.")
    said = entries.get("sshs_model_hash")
    if said is not None and said != tensor_hash(path):
        problems.append("Its tensors are not those that its own hash (sshs_model_hash) was made of: it was changed or damaged.")
    return problems


def _blocks(layers: Iterable[Layer]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, list[float | None]]] = {}
    for layer in layers:
        for i, path in enumerate(layer.paths or ("unknown",)):
            norm = layer.norms[i] if i < len(layer.norms) else None
            found.setdefault(layer.part or "unknown", {}).setdefault(_block(path), []).append(norm)
    order = {part: sorted(blocks.items(), key=lambda item: _natural(item[0])) for part, blocks in found.items()}
    return {
        part: {
            block: {"layers": len(norms), "norm": None if None in norms else float(f"{sum(n * n for n in norms) ** 0.5:.6g}")}
            for block, norms in blocks
        }
        for part, blocks in order.items()
    }


def _block(path: str) -> str:
    """`down_blocks.1`, `mid_block`, `transformer_blocks.7`, `encoder.layers.3`; of a layer outside of blocks its first name."""
    found = re.match(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block|transformer_blocks\.\d+|encoder\.(layers|block)\.\d+)\b", path)
    return found[1] if found else path.partition(".")[0]


def _natural(text: str) -> list[Any]:
    sides = {"down": 0, "mid": 1, "up": 2}
    return [sides.get(text.partition("_")[0], 3), [int(n) for n in re.findall(r"\d+", text)], text]


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _one(values: Iterable[float]) -> Any:
    found = sorted(set(values))
    return None if not found else found[0] if len(found) == 1 else found


def format_text(report: Mapping[str, Any], name: str = "") -> str:
    """The report of `inspect` as lines for a terminal."""
    lines = [name] if name else []
    if report["adapter"]:
        lines.append(f"kind: {report['adapter']} for {TITLES.get(report['family'], 'an unknown base')}")
        for label in ("rank", "alpha"):
            value = report[label]
            text = "none" if value is None else ", ".join(f"{v:g}" for v in (value if isinstance(value, list) else [value]))
            lines.append(f"{label}: {text}")
        effect = {True: "yes", False: "none at all", None: "only its base could tell"}[report["effect"]]
        lines += [f"parameters: {report['parameters']:,}", f"effect: {effect}", f"finite: {'yes' if report['finite'] else 'NO'}"]
    for part, blocks in report["layers"].items():
        lines.append(f"{part}: {sum(b['layers'] for b in blocks.values())} layers")
        for block, b in list(blocks.items())[:MOST_NORMS]:
            lines.append(f"  {block}: {b['layers']} layers" + (f", norm {b['norm']:.4g}" if b["norm"] is not None else ""))
    if words := report["metadata"].get("modelspec.trigger_phrase"):
        lines.append(f"trigger words: {words}")
    lines += [f"{label}: {report['metadata'][key]}" for label, key in SHOWN.items() if key in report["metadata"]]
    if report["unread"]:
        whole = [tool for tool, keys in report["unread"].items() if not keys]
        lines.append(f"every key is read by: {', '.join(whole) or 'no tool that is known here'}")
    lines += [f"Note: {text}" if report["adapter"] else text for text in report["problems"]]
    return "\n".join(lines)
