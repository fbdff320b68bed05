"""The trainer: usable alone, by `python -m trainer` or from Python."""

import os
import sys

# How long a CPU thread spins for the others before it sleeps; read when torch loads. On one machine a busy process beside a training on two
# cores slowed it 45 times with libgomp's default and 5 times with this (images_per_s of `python -m trainer train --preset sd1/demo`, before
# trainer.tape); on another 3.8 and 5.6 times (of `python -m trainer bench --only ours --steps 60 --no-previews`), with 12.5 and 14.1 idle.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# CUDA memory in pieces that grow, so that less of it lies idle between tensors of other sizes. Windows has no such thing. Read by torch's
# first allocation.
if sys.platform.startswith("linux"):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
