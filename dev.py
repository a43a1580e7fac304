#!/usr/bin/env python3
"""Everything a developer runs, on a plain Python 3.10+ with nothing installed.

    python dev.py demo              set up what is missing, draw pictures with GGUF models in a real ComfyUI
    python dev.py test [-- ARGS]    set up what is missing, then lint, types and tests; ARGS go to pytest
    python dev.py gpu [-- OPTIONS]  what only an NVIDIA GPU can show, side by side; `-- --help` says what else
    python dev.py setup             only the set-up, for every ComfyUI version that the tests use
    python dev.py where             one line of JSON: the interpreter and the ComfyUI folder
    python dev.py comfy [-- ARGS]   start ComfyUI with the pack and the demo models; ARGS go to its main.py
    python dev.py bench [NAME [-- ARGS]]   run benchmarks/NAME.py inside the host, or list the names
    python dev.py convert -- IN [OUT] [--type Q4_K_M]   a safetensors file to GGUF; `-- --help` says what else
    python dev.py screenshots       take the pictures of the live view in docs/ anew, with a browser

What these need goes into .venv/, .host/ and .cache/ of this checkout and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable

if sys.version_info < (3, 10):  # noqa: UP036  (whatever `python` is on this machine runs this file)
    sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]} at {sys.executable}")

from tools import checks, demo, gpu_checks, host
from tools.server import PromptFailed, ServerError, server_command
from tools.steps import SetupError
from tools.versions import HOSTS


def run_demo(args: argparse.Namespace) -> int:
    demo.run(_host(args, "run"))
    return 0


def run_test(args: argparse.Namespace) -> int:
    return checks.run(_host(args, "run", "test", versions=HOSTS), args.rest)


def run_gpu(args: argparse.Namespace) -> int:
    return gpu_checks.run(_host(args, "run"), args.rest)


def run_setup(args: argparse.Namespace) -> int:
    found = _host(args, versions=HOSTS)
    print(f"ready: {found.python} runs {found.comfyui}")
    return 0


def run_where(args: argparse.Namespace) -> int:
    found = _host(args)
    print(json.dumps({"python": str(found.python), "comfyui": str(found.comfyui)}))
    return 0


def run_comfy(args: argparse.Namespace) -> int:
    found = _host(args, "run")
    demo.prepare_models(found)
    cpu = [] if "--cpu" in args.rest or host.has_gpu(found) else ["--cpu"]
    return subprocess.call(server_command(found, demo.BASE, *cpu, *args.rest), env=found.env())


def run_bench(args: argparse.Namespace) -> int:
    names = sorted(path.stem for path in (host.ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("_"))
    if args.name not in names:
        print(f"benchmarks: {', '.join(names) or 'none yet'}", file=sys.stderr)
        return 0 if args.name is None else 2
    found = _host(args, "run")
    folder = host.ROOT / "benchmarks"
    env = found.env((found.comfyui, folder))  # also for the processes that they start; some take parts of others
    return subprocess.call(found.command(folder / f"{args.name}.py", *args.rest), env=env)


def run_convert(args: argparse.Namespace) -> int:
    found = _host(args, "run")
    command = found.command(host.ROOT / "tools" / "convert.py", *(args.rest or ["--help"]))
    with subprocess.Popen(command, env=found.env()) as process:
        try:
            return process.wait()
        except (KeyboardInterrupt, SystemExit) as end:
            process.terminate()  # and let it remove what it has half written
            process.wait()
            if not isinstance(end, KeyboardInterrupt):
                raise
            print("convert: interrupted, nothing was written", file=sys.stderr)
            return 130


def run_screenshots(args: argparse.Namespace) -> int:
    found = _host(args, "run", "test")
    # In the host's interpreter: it has the browser's driver and Pillow, which this one may lack.
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tools import screenshots; screenshots.run()"
    env = found.env() if found.ours else {**found.env(), "COMFYUI_PATH": str(found.comfyui)}
    return subprocess.call([str(found.python), "-c", code, str(host.ROOT)], env=env)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": run_demo,
    "test": run_test,
    "gpu": run_gpu,
    "setup": run_setup,
    "where": run_where,
    "comfy": run_comfy,
    "bench": run_bench,
    "convert": run_convert,
    "screenshots": run_screenshots,
}


def _host(args: argparse.Namespace, *uses: str, versions: tuple[str, ...] | dict = ()) -> host.Host:
    found = host.set_up(versions, args.comfyui, args.python)
    if not found.ours:
        print(f"using {found.comfyui} with {found.python}", file=sys.stderr)
        host.check_modules(found, *uses)
    return found


def _parse(argv: list[str]) -> argparse.Namespace:
    ours, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("name", nargs="?", help="of the benchmark, for `bench`")
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI folder (also COMFYUI_PATH); not changed")
    parser.add_argument("--python", metavar="PATH", help="the interpreter that runs that ComfyUI, if it is not found")
    args = parser.parse_args(ours)
    if args.name and args.command != "bench":
        parser.error(f"{args.command} takes no name; arguments to pass on go after `--`")
    if args.python and not (args.comfyui or host.named_by_environment()):
        parser.error("--python goes with --comfyui")
    args.rest = rest
    return args


def main(argv: list[str]) -> int:
    args = _parse(argv)
    # So that `finally` and `with` also run when something else ends us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return COMMANDS[args.command](args)
    except (SetupError, ServerError, PromptFailed) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args.command}: interrupted; running it again goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
