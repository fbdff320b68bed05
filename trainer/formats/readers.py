"""What each tool reads of a LoRA file, and what it skips, refuses or gets wrong.

The rules are those that the tools' own loaders showed (ComfyUI 2025-10, Forge 2025-06, AUTOMATIC1111 1.10.1, SD.Next 2026-07,
InvokeAI 2026-08, diffusers 0.42.1, sd-scripts 2026-02, LyCORIS 2025-10). The layers they know are the base's own modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from trainer.formats import comfy_names, kohya, ldm_names, peft_names

Layers = Mapping[str, Mapping[str, tuple[int, ...]]]

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")
FULL = ("diff", "diff_b", "w_norm", "b_norm")
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
OFT = ("oft_blocks", "oft_diag", "rescale")
PEFT = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight", "oft_R.weight")
OLD = ("lora.down.weight", "lora.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
LYCORIS = (*kohya.ENDINGS, "lora_mid.weight", "dora_scale", *HADA, *LOKR)
WEB_UI = frozenset((*LYCORIS, *FULL, "oft_blocks", "rescale", *GLORA, "weight", "on_input"))
ALL = (*LYCORIS, *FULL, *OFT, *GLORA, *PEFT, *OLD, "set_weight", "reshape_weight", "on_input")
DOWN, UP, ALPHA = kohya.ENDINGS
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
FORGE_MOST = 12  # keys that do not fit, above which Forge refuses a file


@dataclass(frozen=True)
class Reader:
    """`endings` it knows; `aliases`: {family: prefixes it takes besides the family's own}; `unread`: {family: stems it skips}."""

    endings: frozenset[str]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)


_ONE = {"sd1": ("lora_te1_",), "sd2": ("lora_te1_",), "sdxl": ("lora_te_",)}
_EDGES = r"lora_unet_(conv_in|conv_out|time_embedding_linear_[12]|input_blocks_0_0|out_2|time_embed_[02]|label_emb_0_[02])$"
_PROJECTION = "lora_te2_text_projection$"
READERS = {
    "ComfyUI": Reader(frozenset((*LYCORIS, *FULL, *GLORA, "oft_blocks", "rescale", "set_weight", "reshape_weight")), _ONE),
    "Forge": Reader(frozenset((*LYCORIS, *FULL, *GLORA, "set_weight")), _ONE),
    "AUTOMATIC1111": Reader(
        WEB_UI,
        {"sd1": ("lora_te1_",)},
        {"sdxl": rf"lora_unet_(up_blocks_0_upsamplers_0_conv|add_embedding_linear_[12])$|{_PROJECTION}"},
    ),
    "SD.Next": Reader(WEB_UI),
    "InvokeAI": Reader(frozenset((*LYCORIS, *FULL))),
    "diffusers": Reader(frozenset(kohya.ENDINGS), _ONE, {"sdxl": f"lora_unet_add_embedding_|{_PROJECTION}"}),
    "sd-scripts": Reader(frozenset(kohya.ENDINGS), {}, {"sd1": _EDGES, "sd2": _EDGES, "sdxl": f"{_EDGES}|{_PROJECTION}"}),
    "LyCORIS": Reader(frozenset((*LYCORIS, *FULL, "oft_blocks", "rescale"))),
}
# which block names of a UNet a reader takes: diffusers' (d), LDM's (l)
BLOCKS = {
    "ComfyUI": {"sd1": "dl", "sd2": "dl", "sdxl": "dl"},
    "Forge": {"sd1": "dl", "sd2": "dl", "sdxl": "dl"},
    "AUTOMATIC1111": {"sd1": "d", "sd2": "d", "sdxl": "dl"},
    "SD.Next": {"sd1": "d", "sd2": "d", "sdxl": "dl"},
    "InvokeAI": {"sd1": "d", "sd2": "d", "sdxl": "dl"},
    "diffusers": {"sd1": "dl", "sd2": "dl", "sdxl": "dl"},
    "sd-scripts": {"sd1": "d", "sd2": "d", "sdxl": "l"},
    "LyCORIS": {"sd1": "d", "sd2": "d", "sdxl": "l"},
}
TOOLS = {"sd3": tuple(t for t in READERS if t != "LyCORIS")}  # LyCORIS was not measured there
# InvokeAI tells the family by the first of these keys; a time_emb_proj in front makes it take any file for SDXL.
FAMILY_KEYS = re.compile(
    r"(?P<shows>_attn2_to_[kv]\.(lora_down|hada_w1_b|lokr_w2$|diff$)|lora_te_.*_self_attn_.*\.lora_down)|_time_emb_proj\.lora_down"
)
XL_KEYS = re.compile(r"lora_unet_.*(_attn2_to_[kv]\.|_time_emb_proj\.|_transformer_blocks_([2-9]|\d\d))")


@dataclass
class Verdict:
    """`unread`: {tool: keys that it leaves out, all of them where it refuses the file}; `wrong`: tools that read a part of it wrong."""

    unread: dict[str, list[str]]
    wrong: set[str] = field(default_factory=set)
    said: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def say(self, tools: Iterable[str], text: str) -> None:
        """Keep a sentence on `tools`, of those that are judged here."""
        if tools := tuple(t for t in tools if t in self.unread):
            self.said.append((tools, text))

    def refuse(self, tool: str, keys: Iterable[str], text: str) -> None:
        if tool in self.unread:
            self.unread[tool] = list(keys)
            self.said.append(((tool,), text))

    def mistake(self, tools: Iterable[str], text: str) -> None:
        tools = tuple(tools)
        self.wrong.update(t for t in tools if t in self.unread)
        self.say(tools, text)

    @property
    def vouched(self) -> tuple[str, ...]:
        """The tools that take the whole file, and take it right."""
        return tuple(tool for tool, keys in self.unread.items() if not keys and tool not in self.wrong)

    def sentences(self, tools: Iterable[str] | None = None) -> list[str]:
        """Why `tools` (all of them unless given) leave keys unread, or read them wrong."""
        chosen = set(self.unread if tools is None else tools)
        by_keys: dict[tuple[str, ...], list[str]] = {}
        for tool, keys in self.unread.items():
            if keys and tool in chosen:
                by_keys.setdefault(tuple(keys), []).append(tool)
        left = [f"{', '.join(some)} would leave {len(keys)} keys unread, the first is {keys[0]}." for keys, some in by_keys.items()]
        return left + [text for some, text in self.said if chosen & set(some)]


def split_key(key: str) -> tuple[str, str]:
    """(stem, ending) of a key of any LoRA file; PEFT's own adapter name `default` is left out of the ending."""
    bare = key.replace(".default.", ".") if ".lora_" in key else key
    ending = max((e for e in ALL if bare.endswith(f".{e}")), key=len, default=bare.rpartition(".")[2])
    return bare.removesuffix(f".{ending}"), ending


def naming(keys: Iterable[str]) -> str:
    """`kohya`, `peft`, `comfy` or `unknown`, by how most of a file's layers are called."""
    kinds = {
        "kohya": ("lora_", "oft_unet_"),
        "comfy": comfy_names.STARTS,
        "peft": ("unet.", "transformer.", "text_encoder.", "text_encoder_2."),
    }
    keys = list(keys)
    count = {name: sum(k.startswith(starts) for k in keys) for name, starts in kinds.items()}
    best = max(count, key=count.__getitem__)
    return best if count[best] else "unknown"


def judge(family: str, keys: Iterable[str], layers: Layers, alphas: Mapping[str, float | None] | None = None) -> Verdict:
    """What the tools make of a file with these keys, in file order. `layers`: all of the base's; `alphas`: {stem: its alpha or None}."""
    keys = list(keys)
    kind = naming(keys)
    verdict = Verdict({tool: [] for tool in TOOLS.get(family, READERS)})
    if family == "sd3":
        _judge_sd3(keys, kind, layers, verdict)
    elif kind == "kohya":
        _judge_kohya(family, keys, layers, verdict)
    else:
        _judge_dotted(family, keys, kind, layers, verdict)
    if kind == "kohya":
        _judge_alphas(family, keys, alphas or {}, verdict)
    return verdict


def _judge_kohya(family: str, keys: list[str], layers: Layers, verdict: Verdict) -> None:
    paths = layers.get("unet", {})
    d = {kohya.plain_stem(family, "unet", p) for p in paths}
    ldm = {kohya.plain_stem(family, "unet", ldm_names.to_ldm(p, attention_first=family == "sdxl")) for p in paths}
    text = {kohya.stem(family, part, p) for part in layers if part != "unet" for p in layers[part]}
    sets = {"d": d, "l": ldm}
    parted = {key: key.partition(".")[::2] for key in keys}
    own = tuple(kohya.PREFIXES[family].values())
    units = [name for name, _ in parted.values() if name.startswith("lora_unet_")]
    mixed = any(n in ldm - d for n in units) and any(n in d - ldm for n in units)
    kinds = {ending for _, ending in parted.values()}

    for tool, reader in READERS.items():
        stems = set().union(*(sets[b] for b in BLOCKS[tool][family])) | text
        aliases = {a: kohya.PREFIXES[family][kohya.ALIASES[family][a]] for a in reader.aliases.get(family, ())}

        def known(name: str, stems: set[str] = stems, reader: Reader = reader, aliases: dict[str, str] = aliases, tool: str = tool) -> bool:
            for alias, prefix in aliases.items():
                if name.startswith(alias) and not name.startswith(own):
                    name = prefix + name.removeprefix(alias)
            if tool == "SD.Next":
                name = re.sub(r"^(lora_te[12]?_)(encoder_)", r"\1text_model_\2", name)
            return name in stems and not re.search(reader.unread.get(family, "(?!)"), name)

        # norms are no layers of the lists; their names are the base's where the tool reads them at all
        left = [
            k
            for k, (name, ending) in parted.items()
            if ending not in reader.endings or not (known(name) or (ending in ("w_norm", "b_norm") and name.startswith(own)))
        ]
        if left:
            verdict.unread[tool] = left

    _judge_rules(family, keys, parted, kinds, mixed, ldm - d, verdict)


def _judge_rules(
    family: str, keys: list[str], parted: Mapping[str, tuple[str, str]], kinds: set[str], mixed: bool, ldm: set[str], verdict: Verdict
) -> None:
    """What the tools ask for beyond names: refusals, layers that they lose, and kinds of adapters that they read wrong."""
    unread = verdict.unread
    own = tuple(kohya.PREFIXES[family].values())
    if (n := len(unread["Forge"])) > FORGE_MOST:
        verdict.refuse("Forge", keys, f"Forge refuses the file: {n} keys do not fit, it allows {FORGE_MOST}.")
    if len(unread["SD.Next"]) == len(keys):
        verdict.say(["SD.Next"], "SD.Next does not load the file: no key fits.")

    odd = [k for k, (name, ending) in parted.items() if ending not in WEB_UI and name.startswith(own)]
    if odd:
        verdict.refuse("AUTOMATIC1111", keys, f"AUTOMATIC1111 refuses the file: it does not know what {odd[0]} is.")

    odd = [k for k, (name, ending) in parted.items() if ending not in READERS["InvokeAI"].endings or not name.startswith(own)]
    if mixed:
        verdict.refuse("InvokeAI", keys, "InvokeAI refuses the file: it has block names of diffusers' and of LDM's.")
    elif odd:
        verdict.refuse("InvokeAI", keys, f"InvokeAI refuses the file for {odd[0]}.")
    elif not shows_family(family, keys):
        verdict.refuse(
            "InvokeAI", keys, "InvokeAI cannot tell the family, so it does not import the file: no cross-attention layer shows it."
        )
    elif kinds & {"lokr_w1_a", "lokr_w2_a"} and kinds <= {*LOKR, ALPHA}:
        verdict.refuse("InvokeAI", keys, "InvokeAI does not import files of LoKr with a decomposed factor alone.")

    allowed = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
    odd = [k for k, (name, ending) in parted.items() if ending not in (*kohya.ENDINGS, "dora_scale") or not name.startswith(allowed)]
    bare = [
        p
        for p in allowed[1:]
        if any(k.startswith(p) for k in keys) and not any(re.match(rf"{p}.*(_out_proj|_mlp_fc[12])\.", k) for k in keys)
    ]
    if odd:
        verdict.refuse("diffusers", keys, f"diffusers refuses the file for {odd[0]}.")
    elif bare:
        verdict.refuse("diffusers", keys, f"diffusers refuses the file: {bare[0]}* has neither out_proj nor fc1 and fc2.")
    elif mixed:
        lost = [k for k in keys if parted[k][0] in ldm or k in unread["diffusers"]]
        verdict.refuse(
            "diffusers", lost, "diffusers drops the layers with LDM block names without a word, as others have diffusers' names."
        )

    openclip = {"sd2": "lora_te_", "sdxl": "lora_te2_"}.get(family)
    for start in incomplete(keys):
        if openclip and start.startswith(openclip):
            lost = [k for k in keys if k.startswith(start) and k not in unread["AUTOMATIC1111"]]
            unread["AUTOMATIC1111"] += lost
            verdict.say(["AUTOMATIC1111"], f"AUTOMATIC1111 drops {start}*: it wants q, k, v and out_proj of a layer, or none of them.")

    if "dora_scale" in kinds:
        tools = ("ComfyUI", "Forge", "AUTOMATIC1111", "InvokeAI", "diffusers", "sd-scripts")
        verdict.mistake(tools, f"{', '.join(tools)} take the magnitudes of DoRA otherwise than they were trained, or leave them out.")
    if "lora_mid.weight" in kinds:
        verdict.mistake(["sd-scripts"], "sd-scripts merges Tucker layers without their middle.")
    if kinds & {"w_norm", "diff_b"}:
        verdict.mistake(["SD.Next"], "SD.Next ruins norm layers and biases that have changes.")
    if kinds & {"hada_w1_a", "lokr_w1_a", "lokr_w2_a"}:
        verdict.mistake(["LyCORIS"], "LyCORIS applies the scale of LoHa and of decomposed LoKr twice when it merges.")


def _judge_dotted(family: str, keys: list[str], kind: str, layers: Layers, verdict: Verdict) -> None:
    """Files in PEFT's or ComfyUI's own naming, and those in no naming that is known here."""
    for tool in verdict.unread:
        verdict.unread[tool] = list(keys)
    parted = {key: split_key(key) for key in keys}
    if kind == "comfy":
        known = comfy_names.PREFIXES[family]
        stems = {comfy_names.stem(family, part, p) for part, paths in layers.items() if part in known for p in paths}
        ends = READERS["ComfyUI"].endings
        verdict.unread["ComfyUI"] = [k for k, (name, ending) in parted.items() if name not in stems or ending not in ends]
        verdict.say(set(verdict.unread) - {"ComfyUI"}, "The names are ComfyUI's own, which no other tool is known to read.")
    elif kind == "peft":
        stems = {peft_names.stem(family, part, p) for part, paths in layers.items() for p in paths}
        plain = {k for k, (name, ending) in parted.items() if name in stems and ending in ("lora_A.weight", "lora_B.weight")}
        others = [k for k in keys if "lora" not in k]
        if others:
            verdict.say(["diffusers"], f"diffusers refuses the file for {others[0]}: it wants names with lora in them.")
        else:
            verdict.unread["diffusers"] = [k for k in keys if k not in plain]
        verdict.unread["ComfyUI"] = [k for k in keys if k not in plain or re.match(r"unet\..*\.attn[12]\.", k)]
        readers = "ComfyUI and diffusers read" if family == "sd3" else "diffusers alone reads"
        if family == "sd3":
            image = re.compile(r"transformer\.transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)\.")
            verdict.unread["AUTOMATIC1111"] = [k for k in keys if not image.match(k)]
        unread = {tool for tool, left in verdict.unread.items() if left}
        verdict.say(unread, f"The names are PEFT's, which {readers} whole. The other tools need the file with kohya names.")
    else:
        verdict.say(verdict.unread, f"The layers have names that no tool is known to read, such as {keys[0]}.")


def _judge_sd3(keys: list[str], kind: str, layers: Layers, verdict: Verdict) -> None:
    if kind != "kohya":
        _judge_dotted("sd3", keys, kind, layers, verdict)
        return
    underscores = any(k.startswith("lora_transformer_") for k in keys)
    unet = layers.get("unet", {})
    stems = {f"lora_transformer_{p.replace('.', '_')}" for p in unet} if underscores else {kohya.stem("sd3", "unet", p) for p in unet}
    stems |= {kohya.stem("sd3", part, p) for part in layers if part != "unet" for p in layers[part]}
    right = ("ComfyUI", "SD.Next") if underscores else ("ComfyUI", "Forge", "sd-scripts")

    def reads(tool: str, key: str) -> bool:
        name, _, ending = key.partition(".")
        return tool in right and ending in READERS[tool].endings and (name in stems or name.startswith("lora_te3_"))

    for tool in verdict.unread:
        verdict.unread[tool] = [k for k in keys if not reads(tool, k)]
    if "Forge" in right and (n := len(verdict.unread["Forge"])) > FORGE_MOST:
        verdict.refuse("Forge", keys, f"Forge refuses the file: {n} keys do not fit, it allows {FORGE_MOST}.")
    if underscores:
        verdict.say(["Forge", "sd-scripts", "diffusers"], "ComfyUI and SD.Next alone read these names.")
    else:
        verdict.say(["diffusers"], "diffusers applies nothing of an SD3 file with kohya names and raises no error; it needs PEFT names.")
        verdict.mistake(["SD.Next"], "SD.Next gets an SD3 file with kohya names wrong; do not use it there.")
    verdict.say(["AUTOMATIC1111"], "AUTOMATIC1111 stops at the alpha values of an SD3 file.")
    verdict.say(["InvokeAI"], "InvokeAI takes no LoRA for SD3.")


def _judge_alphas(family: str, keys: list[str], alphas: Mapping[str, float | None], verdict: Verdict) -> None:
    without = sorted(name for name, a in alphas.items() if a is None)
    if without:
        text = f"{len(without)} layers have no alpha, the first is {without[0]}; tools take the rank for it, and LyCORIS refuses the file."
        verdict.refuse("LyCORIS", keys, text)
    for part, prefix in kohya.PREFIXES[family].items():
        values = {a for name, a in alphas.items() if name.startswith(prefix)}
        there = sorted(a for a in values if a is not None)
        if len(values) > 1 and family != "sd3":
            said = ", ".join(f"{a:g}" for a in there[:6]) + (" ..." if len(there) > 6 else "") + (" or none" if None in values else "")
            verdict.mistake(["diffusers"], f"{part} has alphas {said}; diffusers takes one for all and scales layers wrongly.")
        if there and there[0] <= 0:
            text = f"{part} has an alpha of {there[0]:g}, which tools take differently; it should be positive."
            verdict.mistake(["sd-scripts", "LyCORIS"], text)


def shows_family(family: str, keys: Iterable[str]) -> bool:
    """True when InvokeAI can tell that kohya keys in this order belong to a file of `family`."""
    if family == "sdxl":
        return any(XL_KEYS.match(key) for key in keys)
    first = next((m for key in keys if (m := FAMILY_KEYS.search(key))), None)
    return family not in ("sd1", "sd2") or bool(first and first["shows"])


def incomplete(keys: Iterable[str]) -> dict[str, set[str]]:
    """{start of the stems of a text layer's attention: which of q, k, v and out_proj are there}, where some are missing."""
    groups: dict[str, set[str]] = {}
    for key in keys:
        if found := re.match(r"(lora_te.*_self_attn_)([a-z]+_proj)\.", key):
            groups.setdefault(found[1], set()).add(found[2])
    return {name: ends for name, ends in groups.items() if len(ends) < len(TEXT_ATTENTION)}


def alphas_of(state: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
    """{stem: alpha, None where it has none} of a kohya file's layers that have a scale."""
    stems = {k.partition(".")[0] for k in state if re.search(r"\.(lora_down\.weight|hada_w1_a|lokr_w[12]_a)$", k)}
    return {name: float(state[f"{name}.{ALPHA}"]) if f"{name}.{ALPHA}" in state else None for name in sorted(stems)}
