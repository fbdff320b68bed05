"""How quick the page answers, and what the app costs when idle: measured on a running app, with and without a training.

    python launch.py                        in one window
    python -m app.bench [--url http://127.0.0.1:7865] [--seconds 20] [--json FILE]

The run is the built-in example, made through the same routes as the page's own; it is discarded at the end. The draft is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from trainer.config.load import ROOT


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:7865")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
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
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
