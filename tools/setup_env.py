"""Make the virtual environment that `make demo` and `make test` run in. Standard library only.

    python3 tools/setup_env.py VENV EXTRAS        e.g. .venv dev

Without a GPU: torch and Triton as constraints/ci.txt pins them, torch in its CPU build where an index has one. With a
GPU whose torch is installed already: the environment sees that torch and keeps it, whatever its version.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints" / "ci.txt"
NEWEST_TRITON = "triton==3.9.0"     # kernels are cross-compiled on it, too; constraints/ci.txt has the oldest
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MODULES = {"cli": ("click", "rich"), "hf": ("safetensors",),
           "dev": ("click", "rich", "safetensors", "pytest", "xdist", "pytest_timeout", "hypothesis", "ruff", "mypy")}


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - it may be started by an older one
        print(f"narrowgemm needs Python 3.10 or newer; {sys.executable} is {platform.python_version()}. "
              "Name another one: make PYTHON=python3.11 ...", file=sys.stderr)
        return 1
    venv, extras = Path(sys.argv[1]), sys.argv[2]
    python = venv / "bin" / "python"
    keep_torch = torch_sees_gpu(sys.executable)
    if not python.exists():
        run(sys.executable, "-m", "venv", *(["--system-site-packages"] if keep_torch else []), str(venv))
    constraints, gpu = CONSTRAINTS, keep_torch or has_gpu_driver()
    if gpu:
        constraints = venv / "constraints.txt"
        constraints.write_text("".join(line for line in CONSTRAINTS.read_text().splitlines(keepends=True)
                                       if not line.startswith(("torch==", "triton=="))))
    elif not installed(python, "torch"):
        install_cpu_torch(python)
    target = f"{ROOT}[{extras}]"
    status = 0 if pip(python, "-c", str(constraints), "-e", target) == 0 else link(python, extras)
    if status == 0 and "dev" in extras.split(",") and not gpu:
        install_newest_triton(python, venv)
    return status


def install_newest_triton(python: Path, venv: Path) -> None:
    """Into a folder of its own beside the environment, which keeps the oldest; tests put it in front for a process."""
    folder = venv.resolve().with_name(f"{venv.resolve().name}-triton")
    wanted = folder / f"triton-{NEWEST_TRITON.partition('==')[2]}.dist-info"
    if platform.system() != "Linux" or wanted.is_dir():
        return
    if folder.exists():
        shutil.rmtree(folder)
    if pip(python, "--no-deps", "--target", str(folder), NEWEST_TRITON) != 0:
        print(f"{NEWEST_TRITON} could not be installed: tests that compile kernels on it are skipped", file=sys.stderr)


def torch_sees_gpu(python: str | Path) -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def has_gpu_driver() -> bool:
    return any(shutil.which(tool) and subprocess.run([tool], capture_output=True).returncode == 0
               for tool in ("nvidia-smi", "rocm-smi"))


def installed(python: Path, *modules: str) -> bool:
    code = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))"
    return subprocess.run([str(python), "-c", code, *modules]).returncode == 0


def install_cpu_torch(python: Path) -> None:
    """The pinned torch, CPU build first: from the configured indexes, from PyTorch's own, then whatever there is."""
    pin = next(line for line in CONSTRAINTS.read_text().split() if line.startswith("torch=="))
    attempts: list[tuple[str, ...]] = [(pin,)]
    if platform.system() == "Linux":
        own_index = ("--index-url", CPU_INDEX, "--retries", "1", "--timeout", "20")
        attempts = [(f"{pin}+cpu",), (f"{pin}+cpu", *own_index), (pin,)]
    for attempt in attempts:
        if pip(python, *attempt) == 0:
            return
    raise SystemExit(f"{pin} could not be installed; the lines above say why")


def link(python: Path, extras: str) -> int:
    """Without a package index, use what the machine has: a link to src/ is enough where nothing else is missing."""
    needed = ("torch", "triton", *(m for extra in extras.split(",") for m in MODULES.get(extra, ())))
    missing = [m for m in needed if not installed(python, m)]
    if missing:
        print(f"narrowgemm could not be installed, and these are missing here: {', '.join(missing)}", file=sys.stderr)
        return 1
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "narrowgemm.pth").write_text(f"{ROOT / 'src'}\n")
    print("No package index can be reached; everything needed is installed, so src/ was linked into the environment.")
    return 0


def pip(python: Path, *args: str) -> int:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *args]
    print("+", " ".join(command), flush=True)
    return subprocess.run(command).returncode


def run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"failed: {' '.join(command)} (on Debian and Ubuntu, venv is in the package python3-venv)")


if __name__ == "__main__":
    sys.exit(main())
