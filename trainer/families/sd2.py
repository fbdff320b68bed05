"""Stable Diffusion 2.x: as SD1 with OpenCLIP-H, whose last layer is left out already; 512 px epsilon or 768 px v prediction."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from trainer.families.unet import UNetFamily
from trainer.formats import probe


class SD2(UNetFamily):
    name = "sd2"
    parts = ("unet", "text_1")
    skip: ClassVar = {"text_1": 1}

    def native_resolution(self, source: Path, prediction: str = "auto") -> int:
        """512 or 768: a single file says nothing of its size, but the one that predicts v was made for 768."""
        said = probe.prediction(source)[0] if prediction == "auto" else prediction
        return probe.native_resolution(source, 512 if said == "epsilon" else 768)
