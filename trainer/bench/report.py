"""The findings of a bench as text, and what became of an older one's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.bench.case import BenchError, describe

FIGURES = (  # name in words, key, unit, whether more is better
    ("first step", "first_step_s", "s", False),
    ("a step (median)", "step_ms", "ms", False),
    ("images a second", "images_per_s", "", True),
    ("GPU busy a step", "gpu_busy_ms", "ms", False),
    ("share of the limit", "share_of_limit", "%", True),
    ("device memory, tensors", "peak_device_gib", "GiB", False),
    ("host memory", "peak_host_gib", "GiB", False),
    ("loss", "final_loss", "", None),
)
PHASES = {
    "python": "Python", "prepare": "settings and checks", "imports": "imports", "load": "loading", "encode": "encoding",
    "attach": "adapter and optimizer", "first_step": "the step itself",
}  # fmt: skip
AGREES = {"fp32": 1e-3, "bf16": 0.02, "fp16": 0.02}  # relative difference that rounding explains


def text(found: dict[str, Any]) -> str:
    """A table of both sides and sentences on what lies behind it."""
    ours, reference = found["ours"], found["reference"]
    lines = [f"{describe(found['case'])}, {found['case']['steps']} steps on {found['device']}", ""]
    rows = [("", "ours", "reference", "ours / reference")]
    for words, key, unit, _ in FIGURES:
        a, b = ((side or {}).get(key) for side in (ours, reference))
        if a is not None or b is not None:
            rows.append((words, _value(a, unit), _value(b, unit), "" if a is None or not b else f"{a / b:.3g}"))
    lines += table(rows)
    if found["speedup"]:
        lines += ["", f"Ours makes {found['speedup']:.2f} steps in the time of one of the reference's."]
    for name, side in (("ours", ours), ("reference", reference)):
        if side:
            spent = ", ".join(f"{PHASES[k]} {side['start'][k]:.1f}" for k in PHASES if k in side["start"])
            lines.append(f"Seconds to the first step, {name}: {spent}.")
        if side and side["device"]:
            d = side["device"]
            lines.append(
                f"Device memory, {name}: {d['peak_start_gib']:.2f} GiB of tensors before the first step; {d['peak_reserved_gib']:.2f} GiB taken "
                f"by torch from it on; {d['used_gib']:.2f} GiB used on the whole device; {side['kernels']} kernels a step."
            )
    limit = found["limit"]
    if limit["step_tflop"]:
        lines.append(
            f"The limit: {limit['step_tflop']:.4g} TFLOP a step at the {limit['matmul_tflops']:.4g} TFLOP/s that large products of matrices reach."
        )
    if preview := found["preview"]:
        lines.append(
            f"{preview['pictures']} sample images take {preview['seconds']:.1f} s, as long as {preview['worth_steps']:.0f} steps; a run of 1,500 steps makes them {preview['times']} times by itself, which is {preview['share_of_run']:.0%} of its time."
        )
    lines += [f"Ours says: {note}" for note in found["notes"]]
    return "\n".join([*lines, *_unlike(found)])


def _unlike(found: dict[str, Any]) -> list[str]:
    """Sentences where the two sides did not do the same work."""
    ours, reference = found["ours"], found["reference"]
    if not (ours and reference):
        return []
    said = []
    if ours["parameters"] != reference["parameters"]:
        said.append(
            f"Note: ours trains {ours['parameters']:,} numbers, the reference {reference['parameters']:,} (ours limits the rank to a layer's sides)."
        )
    for what, key in (("losses", "final_loss"), ("changes of the weights", "trained_norm")):
        apart = abs(ours[key] - reference[key]) / max(abs(reference[key]), 1e-12)
        if not apart <= AGREES[found["case"]["dtype"]]:
            said.append(
                f"Note: the {what} differ by {apart:.1%}, more than rounding explains: the two sides do not compute the same thing."
            )
    return said


def read(path: Path) -> dict[str, Any]:
    """An older JSON. Raises BenchError for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"ours", "reference", "versions", "device", "case"} <= found.keys():
            raise ValueError
    except OSError as error:
        raise BenchError(f"--compare names {path}, which cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError):
        raise BenchError(f"--compare names {path}, which is not a file that bench --json has written.") from None
    return found


def compare(found: dict[str, Any], old: dict[str, Any]) -> str:
    """Each figure over the older one, and notes where the two were not measured alike."""
    rows = [("", "now", "before", "now / before")]
    for name in ("ours", "reference"):
        for words, key, unit, better in FIGURES:
            a, b = ((one[name] or {}).get(key) for one in (found, old))
            if a is not None and b:
                verdict = "" if better is None or abs(a / b - 1) < 0.03 else " better" if (a > b) == better else " worse"
                rows.append((f"{name}: {words}", _value(a, unit), _value(b, unit), f"{a / b:.3g}{verdict}"))
    if found["speedup"] and old.get("speedup"):
        rows.append(("speedup", f"{found['speedup']:.2f}", f"{old['speedup']:.2f}", f"{found['speedup'] / old['speedup']:.3g}"))
    notes = []
    for what, a, b in (
        ("", {"device": found["device"]}, {"device": old["device"]}),
        ("--", found["case"], old["case"]),
        ("", found["versions"], old["versions"]),
    ):
        notes += [f"Note: {what}{k} was {b.get(k)}, now it is {a.get(k)}." for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    return "\n".join(["Against the older figures:", *table(rows), *notes])


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{value * 100:.3g} %"
    return f"{value:.4g} {unit}".rstrip()


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip() for row in rows
    ]
