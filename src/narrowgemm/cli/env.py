"""`narrowgemm env`: what is installed, on what machine, with which settings. Meant to be pasted into an issue.

Standard library only. Whatever may be broken (torch, triton, narrowgemm itself) is imported in a child process with a
time limit, so that a crash or a hang there is a line of the report. The file runs on its own, too:
`python src/narrowgemm/cli/env.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = ("narrowgemm", "torch", "triton", "numpy", "safetensors", "click", "rich", "matplotlib", "transformers",
            "vllm", "sglang", "deep-gemm", "pytest")
OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_HOME", "ROCM_HOME", "TRITON_CACHE_DIR",
                   "TRITON_INTERPRET", "TRITON_PTXAS_PATH", "PYTHONPATH")
PROBE_SECONDS = 120
# Everything that reading metadata, files and child processes has been seen to raise on broken installs.
PROBE_ERRORS = (OSError, LookupError, ValueError, TypeError, ImportError, AttributeError, RuntimeError,
                subprocess.SubprocessError)

TORCH_PROBE = """
import json, torch
d = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "file": torch.__file__,
     "gpu": torch.cuda.is_available()}
if d["gpu"]:
    d["devices"] = [{"name": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
                     "memory_gib": round(p.total_memory / 2**30, 1)}
                    for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
print(json.dumps(d))
"""
TRITON_PROBE = """
import json, triton
from triton.backends import backends
print(json.dumps({"version": triton.__version__, "file": triton.__file__, "backends": sorted(backends)}))
"""
NARROWGEMM_PROBE = f"""
import json, sys
sys.path.append({str(PACKAGE.parent)!r})
import narrowgemm
from narrowgemm import arch
from narrowgemm.kernels.registry import kernels
a = arch.detect()
print(json.dumps(dict(file=narrowgemm.__file__, arch=a.name, target=a.target,
                      kernels=dict((n, k.BACKEND) for n, k in kernels().items()))))
"""
LAUNCH_PROBE = f"""
import json, sys, torch
sys.path.append({str(PACKAGE.parent)!r})
found = "no GPU here"
if torch.cuda.is_available():
    import narrowgemm as ng
    from narrowgemm.kernels import launching
    x = torch.zeros(16, 256, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        ng.quantize(x, ng.FP8_1x128, backend="triton")
    slow = launching.unbound()
    found = "bound to Triton's C launcher" if not slow else dict((n, "through Triton's own launch: " + r) for n, r in slow.items())
print(json.dumps(found))
"""


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain data. A probe that fails gives `{"error": ...}`."""
    probes = {name: _start(code) for name, code in
              (("torch", TORCH_PROBE), ("triton", TRITON_PROBE), ("narrowgemm", NARROWGEMM_PROBE))}
    launches = _start(LAUNCH_PROBE)
    return {
        "narrowgemm": guard(_version),
        "python": {"version": platform.python_version(), "executable": sys.executable,
                   "virtualenv": sys.prefix != sys.base_prefix},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "packages": {name: found for name in PACKAGES if (found := guard(lambda: _installed(name))) is not None},  # noqa: B023
        "driver": guard(_driver),
        **{f"import {name}": guard(lambda: _finish(p)) for name, p in probes.items()},  # noqa: B023
        "warm launches": guard(lambda: _finish(launches)),
        "variables": guard(_variables),
        "caches": guard(_caches),
        "tuned tables": guard(_tables),
    }


def guard(probe: Callable[[], Any]) -> Any:
    """What `probe` returns, or its failure as data."""
    try:
        return probe()
    except PROBE_ERRORS as e:
        return {"error": f"{type(e).__name__}: {e}"}


def _start(code: str) -> subprocess.Popen[str] | OSError:
    try:
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as e:
        return e


def _finish(child: subprocess.Popen[str] | OSError) -> Any:
    if isinstance(child, OSError):
        raise child
    try:
        out, err = child.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"error": f"importing it took more than {PROBE_SECONDS} s"}
    if child.returncode:
        lines = err.strip().splitlines()
        cause = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit status {child.returncode}"
        return {"error": lines[-1] if lines and child.returncode > 0 else cause}
    return json.loads(out.strip().splitlines()[-1])


def _module(relative: str) -> Any:
    """A module of this package from its file, so that the package's own `__init__` takes no part."""
    spec = importlib.util.spec_from_file_location(Path(relative).stem, PACKAGE / relative)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _version() -> dict[str, str]:
    found = {"version": _module("version.py").__version__, "folder": str(PACKAGE)}
    if (PACKAGE.parents[1] / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "-C", str(PACKAGE), "describe", "--always", "--dirty"], capture_output=True,
                              text=True, timeout=10)
        if done.returncode == 0:
            found["commit"] = done.stdout.strip()
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> list[str] | str:
    for tool, args in (("nvidia-smi", ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]),
                       ("rocm-smi", ["--showproductname", "--showdriverversion"])):
        if shutil.which(tool):
            done = subprocess.run([tool, *args], capture_output=True, text=True, timeout=30)
            return [f"{tool}: {line.strip()}" for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return "no GPU driver tool (nvidia-smi, rocm-smi) found"


def _variables() -> dict[str, str]:
    own = _module("runtime/env.py").VARIABLES
    return {name: os.environ.get(name, "(not set)") for name in own} | {
        name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ}


def _caches() -> dict[str, str]:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if not folder.is_dir():
        return {"triton": f"{folder} (not there yet)"}
    entries = sum(1 for _ in os.scandir(folder))
    return {"triton": f"{folder} ({entries} entries, {'writable' if os.access(folder, os.W_OK) else 'NOT writable'})"}


def _tables() -> dict[str, list[str]]:
    roots = [Path(os.environ["NARROWGEMM_TABLES"])] if os.environ.get("NARROWGEMM_TABLES") else []
    return {str(root): sorted(str(f.relative_to(root)) for f in root.glob("*/*.json"))
            for root in (*roots, PACKAGE / "tuning" / "tables")}


def text(report: dict[str, Any]) -> str:
    """The report as indented lines."""
    lines: list[str] = []

    def add(key: str, value: Any, depth: int) -> None:
        pad = "  " * depth
        if isinstance(value, dict):
            lines.append(f"{pad}{key}:")
            for k, v in value.items():
                add(str(k), v, depth + 1)
        elif isinstance(value, list):
            lines.append(f"{pad}{key}:" + ("" if value else " none"))
            lines.extend(f"{pad}  - {v}" for v in value)
        else:
            lines.append(f"{pad}{key}: {value}")

    for key, value in report.items():
        add(key, value, 0)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`narrowgemm env`, and `python -m narrowgemm env` where click is missing."""
    parser = argparse.ArgumentParser(prog="narrowgemm env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 0


def __getattr__(name: str) -> click.Command:
    """`command`, for the click group: made on demand because click may be missing."""
    if name != "command":
        raise AttributeError(name)
    import click

    @click.command("env")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    def command(as_json: bool) -> None:
        """Versions, devices, drivers, variables and caches."""
        main(["--json"] if as_json else [])

    return command


if __name__ == "__main__":
    sys.exit(main())
