"""python -m app [--listen [ADDRESS]] [--port 7865] [--data-dir D] [--no-browser] [--set-password]"""

from __future__ import annotations

import argparse
import contextlib
import errno
import getpass
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import Problem
from app.paths import Home
from trainer.run_dir import Lock, RunDir, RunError, write_json

PORT, TRIES = 7865, 20
EXPOSED = """It lets others in, at:
{addresses}
Whoever reaches it and knows the password can see your images and captions, start and delete trainings, read model files and folders of
this machine by naming them, and use its GPU and disk. There is no encryption: the password and all pictures can be read on the way.
Use it only in a network that you trust, or behind a reverse proxy with TLS (then --listen 127.0.0.1 --allow-host NAME)."""


def say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.py gui", description="The browser front end of LoRA Atelier.", allow_abbrev=False)
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or the next free one")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="D",
        help="where images, runs and settings are kept (default: LORA_ATELIER_DATA, or lora-atelier in your home folder)",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    parser.add_argument(
        "--listen",
        nargs="?",
        const="0.0.0.0",
        metavar="ADDRESS",
        help="let other machines in, at this address of this machine or at all; asks for a password (or takes LORA_ATELIER_PASSWORD)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="with --listen: a further name by which this server is reached, such as a reverse proxy's",
    )
    parser.add_argument("--set-password", action="store_true", help="ask for a new password, keep it, and end")
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; it must be 1 to 65535")
    if args.allow_host and not args.listen:
        parser.error("--allow-host needs --listen, which asks for a password")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return start(args)
    except (Problem, RunError) as problem:
        print(problem, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        say("\nEnded.")
        return 130


def start(args: argparse.Namespace) -> int:
    home = Home(args.data_dir)
    try:
        home.create()
    except OSError as error:
        raise Problem(f"The data folder {home.root} cannot be made: {error.strerror or error}. Choose another with --data-dir.") from None
    if args.set_password:
        set_password(home)
        say("The password is set.")
        return 0
    say("LoRA Atelier is starting ...")
    lock = Lock(RunDir(home.root))  # a data folder has one app, as a run's folder has one trainer
    try:
        lock.acquire()
    except RunError:
        return open_running(home, args)
    except OSError as error:
        raise Problem(f"The data folder {home.root} cannot be used: {error.strerror or error}. Choose another with --data-dir.") from None
    try:
        return serve(home, args)
    finally:
        home.server.unlink(missing_ok=True)
        lock.release()


# ---- the password -------------------------------------------------------------------------------------------------------------------


def set_password(home: Home) -> Any:
    """Ask for a new password, or take LORA_ATELIER_PASSWORD; the Auth that has it."""
    from app.auth import Auth

    auth, given = Auth(home), os.environ.get("LORA_ATELIER_PASSWORD")
    if given:
        if not auth.is_right(given):
            auth.set(given)
        del os.environ["LORA_ATELIER_PASSWORD"]  # trainings inherit the environment
        return auth
    if not sys.stdin.isatty():
        raise Problem(
            "A password is needed, and there is no terminal to ask for it: set LORA_ATELIER_PASSWORD, or run with --set-password once."
        )
    while True:
        password = getpass.getpass("A password for those who come from other machines (at least 8 characters): ")
        if password != getpass.getpass("Once more: "):
            say("Those were two different ones.")
            continue
        try:
            auth.set(password)
        except Problem as problem:
            say(problem.text)
            continue
        return auth


def password_for(home: Home) -> Any:
    from app.auth import Auth

    auth = Auth(home)
    return auth if auth.is_set and not os.environ.get("LORA_ATELIER_PASSWORD") else set_password(home)


# ---- addresses ----------------------------------------------------------------------------------------------------------------------


def bind(address: str, port: int | None) -> socket.socket:
    """A socket at this port, or, without one, at the first free one from PORT on. Raises Problem with what to do."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for candidate in [port] if port else range(PORT, PORT + TRIES):
        sock = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "nt":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)  # else two programs could share the port
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits a minute
        try:
            sock.bind((address, candidate))
            return sock
        except OSError as error:
            sock.close()
            busy = error.errno == errno.EADDRINUSE or (os.name == "nt" and error.errno == errno.EACCES)
            if busy and not port:
                continue
            if busy:
                raise Problem(f"Port {port} is in use by another program. Choose another with --port, or leave --port out.") from None
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise Problem(f"{address!r} is no address of this machine. Use --listen alone for all of its addresses.") from None
            raise Problem(f"Port {candidate} at {address} cannot be used: {error.strerror}. Choose another with --port.") from None
    raise Problem(f"The ports {PORT} to {PORT + TRIES - 1} are all in use. Choose another with --port.")


def own_addresses(listen: str) -> list[str]:
    """The addresses under which other machines reach a server that listens there."""
    if listen not in ("0.0.0.0", "::"):
        return [listen]
    found = {}
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # for documentation; nothing is sent
        if listen == "0.0.0.0" and family == socket.AF_INET6:
            continue
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                found[probe.getsockname()[0]] = None
        except OSError:  # no network of this kind
            continue
    found[socket.gethostname()] = None
    return list(found)


def host_check(listen: str | None, names: list[str]) -> Callable[[str], bool]:
    """Which Host names are this server. With --listen any plain address is (only names can be pointed here by others), and this
    machine's own names."""
    from app.guard import LOCAL

    if not listen:
        return LOCAL.__contains__
    host = socket.gethostname().lower()
    known = {*LOCAL, host, f"{host.partition('.')[0]}.local", listen.lower(), *(name.lower() for name in names)}

    def allowed(name: str) -> bool:
        if name in known:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    return allowed


def url_of(address: str, port: int) -> str:
    name = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


# ---- the running one ----------------------------------------------------------------------------------------------------------------


def answers(url: str, home: Home) -> bool:
    """Whether the app of this data folder answers there. One that asks for a password says its name alone."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/system", timeout=5) as answer:
            said = json.load(answer)
        return said.get("app") == "lora-atelier" and Path(said.get("data_dir", "")) == home.root
    except urllib.error.HTTPError as error:
        if error.code != 401:
            return False
        try:
            return json.load(error).get("app") == "lora-atelier"
        except ValueError:
            return False
    except (OSError, ValueError):
        return False


def open_running(home: Home, args: argparse.Namespace) -> int:
    """Another process holds the data folder: open its page, once it answers."""
    end = time.monotonic() + 40  # it may just be starting
    while time.monotonic() < end:
        try:
            url = json.loads(home.server.read_text(encoding="utf-8"))["url"]
        except (OSError, ValueError, KeyError):  # not written yet
            url = ""
        if url and answers(url, home):
            say(f"It is running already: {url}")
            if not args.no_browser:
                show(url)
            return 0
        time.sleep(0.3)
    try:
        pid = json.loads((home.root / "process.json").read_text(encoding="utf-8"))["pid"]
    except (OSError, ValueError, KeyError):
        pid = "unknown"
    raise Problem(
        f"Another LoRA Atelier (process {pid}) holds the data folder {home.root} and does not answer. "
        "End that process and start again, or choose another folder with --data-dir."
    )


def show(url: str) -> None:
    """Open the page, where there is a desktop to open it on: without one, webbrowser would take this terminal for a text browser."""
    desktop = os.name == "nt" or sys.platform == "darwin" or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if not desktop or not webbrowser.open(url):
        say("Open that address in a browser.")


# ---- serving ------------------------------------------------------------------------------------------------------------------------


def serve(home: Home, args: argparse.Namespace) -> int:
    auth = password_for(home) if args.listen else None
    sock = bind(args.listen or "127.0.0.1", args.port)
    with sock:
        port = sock.getsockname()[1]
        url = url_of(args.listen or "127.0.0.1", port)
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
            filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "localhost,127.0.0.1,::1"))
        )
        uploads = home.cache / "uploads"  # large uploads are written here, not to a /tmp that may be memory
        uploads.mkdir(parents=True, exist_ok=True)
        for left in uploads.iterdir():
            left.unlink(missing_ok=True)
        tempfile.tempdir = str(uploads)

        import uvicorn

        from app import server

        server.log_to(home.log)
        app = server.build(home, host_check(args.listen, args.allow_host), auth)
        # One second for answers on their way; trainings are processes of their own.
        config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1)
        uvicorn_server = uvicorn.Server(config)
        write_json(home.server, {"pid": os.getpid(), "port": port, "url": url, "data_dir": str(home.root)})
        threading.Thread(target=announce, args=(uvicorn_server, url, home, args), daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has closed
            uvicorn_server.run(sockets=[sock])
        if not uvicorn_server.started:
            raise Problem(f"The server did not start; why is written in {home.log}.")
    logging.shutdown()
    say("\nEnded. A training that runs goes on by itself; start again to see it.")
    return 0


def announce(server: Any, url: str, home: Home, args: argparse.Namespace) -> None:
    """Once the port answers: print the address, and open the page."""
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    port = int(url.rpartition(":")[2])
    if args.listen:
        lines = [f"  {url_of(address, port)}" for address in own_addresses(args.listen)]
        say(EXPOSED.format(addresses="\n".join(lines)))
    say(f"LoRA Atelier is at {url}  (data in {home.root}; Ctrl-C ends)")
    if not args.no_browser:
        show(url)


if __name__ == "__main__":
    sys.exit(main())
