"""The data folder: where everything stands that the app keeps. Run folders are trainer/run_dir.py's."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Home:
    """Paths inside the data folder (`--data-dir`, LORA_ATELIER_DATA, or `~/lora-atelier`)."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root or os.environ.get("LORA_ATELIER_DATA") or "~/lora-atelier").expanduser().resolve()
        self.runs = self.root / "runs"
        self.datasets = self.root / "datasets"
        self.trash = self.root / "trash"  # data sets that were deleted; nothing here is ever destroyed by the app
        self.jobs = self.root / "jobs"  # folders of captionings, measurements, the playground; made like run folders
        self.cache = self.root / "cache"  # thumbnails and what was read of model headers; may be deleted at any time
        self.draft = self.root / "draft.json"
        self.settings = self.root / "settings.json"
        self.queue = self.root / "queue.sqlite"
        self.password = self.root / "password.json"
        self.server = self.root / "server.json"  # address and pid of the app that runs here
        self.log = self.root / "server.log"

    def create(self) -> None:
        """Make the folders. Raises OSError."""
        for folder in (self.root, self.runs, self.datasets, self.jobs, self.cache):
            folder.mkdir(parents=True, exist_ok=True)
