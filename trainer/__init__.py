"""The trainer: usable alone, by `python -m trainer` or from Python."""

import os
import sys

# How long a CPU thread spins for the others before it sleeps. With libgomp's default one busy process beside a training on two cores
# slows it 45 times (30 -> 0.7 images/s on the demo base), with this 5 times (6 images/s), and on an idle machine both are equal.
# Read when torch loads. Measured by images_per_s of `python -m trainer train --preset sd1/demo` with and without a busy loop beside it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# CUDA memory in pieces that grow, so that less of it lies idle between tensors of other sizes. Windows has no such thing. Read by torch's
# first allocation.
if sys.platform.startswith("linux"):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
