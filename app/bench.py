"""How quick the page answers, and what the app costs when idle: measured on a running app, with and without a training.

    python launch.py                        in one window
    python -m app.bench [--url http://127.0.0.1:7865] [--seconds 20] [--json FILE]
    python -m app.bench scan [--images 40] [--megapixels 12] [--json FILE]

The run is the built-in example, made through the same routes as the page's own; it is discarded at the end. The draft is kept.
`scan` needs no app: it draws photos as a phone makes them, and says what looking at each costs when it comes in, when its content is
known, and what of it is JPEG decoding alone, which bounds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL.Image

from app import pictures
from trainer.config.load import ROOT
from trainer.data import scan


def ask(url: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
    """The JSON of a route, or its bytes where it is not JSON."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"content-type": "application/json", "user-agent": "bench"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        raw = answer.read()
        return json.loads(raw) if "json" in answer.headers.get("content-type", "") else raw


def measure(url: str, routes: dict[str, str], seconds: float) -> dict[str, dict[str, float]]:
    """{name: {median_ms, p95_ms, count}}: the routes asked in turn, each once in a quarter of a second, as about four tabs would."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, path in routes.items():
            begin = time.perf_counter()
            ask(url + path)
            times[name].append((time.perf_counter() - begin) * 1000)
        time.sleep(0.25)
    return {
        name: {"median_ms": round(statistics.median(t), 1), "p95_ms": round(sorted(t)[int(len(t) * 0.95)], 1), "count": len(t)}
        for name, t in times.items()
    }


def idle(url: str, seconds: float) -> float:
    """Percent of a core that the app's process takes while nobody asks it anything."""
    before, begin = ask(url + "/api/system")["cpu_s"], time.monotonic()
    time.sleep(seconds)
    return round(100 * (ask(url + "/api/system")["cpu_s"] - before) / (time.monotonic() - begin), 2)


def photo(path: Path, megapixels: float, seed: int) -> None:
    """A JPEG of so many megapixels, 4 to 3, with detail at every size and the noise of a sensor: about 0.3 bytes a pixel."""
    rng = np.random.default_rng(seed)
    size = round((megapixels * 1e6 * 4 / 3) ** 0.5), round((megapixels * 1e6 * 3 / 4) ** 0.5)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)).resize(size, PIL.Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-9, 10, (size[1], size[0], 1), dtype=np.int16)
    PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure_scan(images: int, megapixels: float) -> dict[str, float]:
    """Processor milliseconds for each of `images` photos, and seconds of a thousand with this machine's cores."""

    def cost(work: Any) -> tuple[float, float]:
        cpu, begin = time.process_time(), time.perf_counter()
        work()
        return (time.process_time() - cpu) * 1000 / images, (time.perf_counter() - begin) * 1000 / images

    def decoded(path: Path) -> None:
        with PIL.Image.open(path) as image:
            image.draft(image.mode, (1, 1))
            image.load()

    with TemporaryDirectory() as folder:
        paths = [Path(folder, f"{k:04}.jpg") for k in range(images)]
        for k, path in enumerate(paths):
            photo(path, megapixels, k % 8)
            path.write_bytes(path.read_bytes() + k.to_bytes(4))  # each its own content
        cache = Path(folder, "cache")
        with ThreadPoolExecutor(1) as alone:
            least, _ = cost(lambda: list(alone.map(decoded, paths)))
        new, wall = cost(lambda: pictures.inspect_all(paths, cache))
        scan.forget()
        pictures.forget()
        known, _ = cost(lambda: pictures.inspect_all(paths, cache))
        kept, _ = cost(lambda: pictures.inspect_all(paths, cache))
        megabytes = sum(p.stat().st_size for p in paths) / images / 1e6
    return {
        "images": images, "megapixels": megapixels, "megabytes_each": round(megabytes, 2), "decoding_alone_cpu_ms": round(least, 1),
        "new_cpu_ms": round(new, 1), "new_1000_wall_s": round(wall, 1), "known_content_cpu_ms": round(known, 2), "same_file_cpu_ms": round(kept, 3),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["app", "scan"], default="app")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--url", default="http://127.0.0.1:7865")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.what == "scan":
        found = measure_scan(args.images, args.megapixels)
        print(
            f"{args.images} JPEGs of {args.megapixels:g} megapixels, {found['megabytes_each']} MB each, in processor ms for each: new "
            f"{found['new_cpu_ms']} (decoding alone {found['decoding_alone_cpu_ms']}), known content {found['known_content_cpu_ms']}, "
            f"same file {found['same_file_cpu_ms']}. A thousand new ones: {found['new_cpu_ms']:.0f} s of a core, {found['new_1000_wall_s']:.0f} s here now."
        )
        return _keep(found, args.json)
    try:
        found: dict[str, Any] = {"idle_percent_of_a_core": idle(args.url, args.seconds)}
    except (urllib.error.URLError, OSError):
        print(f"Error: no app answers at {args.url}. Start it with python launch.py, or give its address with --url.", file=sys.stderr)
        return 1
    routes = {"page /": "/", "page /runs": "/runs", "GET /api/runs": "/api/runs", "GET /api/draft": "/api/draft"}
    found["without_a_run"] = measure(args.url, routes, args.seconds)
    data = [{"folder": str(ROOT / "assets/demo/data/zorp/train"), "trigger": "zorp"}]
    config = {"preset": "sd1/demo", "model": {"source": "demo"}, "data": data, "output": {"name": "bench"}, "train": {"visits": 2000}}
    run = ask(f"{args.url}/api/runs", "POST", {"config": config})["id"]
    try:
        while ask(f"{args.url}/api/runs/{run}?since=-1")["run"]["step"] < 1:
            time.sleep(0.5)
        found["with_a_run"] = measure(args.url, routes | {"GET /api/runs/ID": f"/api/runs/{run}?since=0"}, args.seconds)
    finally:
        ask(f"{args.url}/api/runs/{run}/discard", "POST", {"confirm": True})
    print(f"Idle: {found['idle_percent_of_a_core']} % of a core over {args.seconds:.0f} s")
    for part in ("without_a_run", "with_a_run"):
        for name, t in found[part].items():
            print(
                f"{part.replace('_', ' '):14} {name:18} median {t['median_ms']:7.1f} ms, 95 % within {t['p95_ms']:7.1f} ms ({t['count']} times)"
            )
    return _keep(found, args.json)


def _keep(found: dict[str, Any], path: Path | None) -> int:
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
