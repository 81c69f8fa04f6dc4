"""Whether a change leaves kernels' machine code alone: compiles jobs of the compile tests to PTX, before it and after it.

    python tools/same_ptx.py gluon_sm90_mx8_jobs:jobs:mx8_decode:all             # the working tree against HEAD
    python tools/same_ptx.py --base main --keep /tmp/ptx gluon_sm90_bf16_jobs:jobs

A job is named as in `tests/_compile.py`: a module of tests/kernels, its function, what the function takes behind the target. PTX
is compared without comments, line numbers and debug sections, so the names of inlined functions don't count. Needs no GPU, and runs
no ptxas, whose registers hang on line numbers, too. Exits with 1 where a kernel differs, or is there only before or after. NVIDIA
targets only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINES = re.compile(r"\s*(\.(loc|file)\b.*|\$L__(tmp|func|info)\w*:.*)?")     # of debugging, or empty


def stripped(ptx: str) -> str:
    """What of PTX is code."""
    kept = []
    for line in ptx.splitlines():
        line = line.partition("//")[0].rstrip()
        if ".section" in line and "debug" in line:      # the last ones
            break
        if not LINES.fullmatch(line):
            kept.append(line)
    return "\n".join(kept)


def compiled(target: str, jobs: list[str]) -> Iterator[tuple[str, str]]:
    """(job and kernel, code) of all that the jobs launch, with the package and the tests that this process imports."""
    import triton
    from tests._compile import FakeDriver
    from triton.backends.nvidia import compiler

    compiler.CUDABackend.make_cubin = lambda *_: b"none"
    triton.runtime.driver.set_active(FakeDriver(target))
    run, found = triton.runtime.jit.JITFunction.run, []

    def keep(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, stripped(kernel.asm["ptx"])))
        return kernel

    triton.runtime.jit.JITFunction.run = keep
    for spec in jobs:
        module, function, *rest = spec.split(":")
        for name, job in getattr(import_module(f"tests.kernels.{module}"), function)(target, *rest):
            found.clear()
            job()
            for i, (kernel, code) in enumerate(found):
                yield f"{module} {name} | {kernel} {i}", code


def in_tree(tree: Path, cache: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that compiles with the package and the tests of that tree, and prints what it found."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tree), str(tree / "src")]), TRITON_INTERPRET="0",
               TRITON_CACHE_DIR=str(cache), NARROWGEMM_ARCH=arguments.target)
    keep = ["--keep", str(arguments.keep)] if arguments.keep else []
    return subprocess.Popen([sys.executable, __file__, "--target", arguments.target, "--worker", *keep, *arguments.jobs], cwd=tree,
                            env=env, text=True, stdout=subprocess.PIPE)


def worker(arguments: argparse.Namespace) -> None:
    side = "after" if Path.cwd() == ROOT else "before"
    digests = {}
    for number, (name, code) in enumerate(compiled(arguments.target, arguments.jobs)):
        digests[name] = hashlib.sha256(code.encode()).hexdigest()
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            (arguments.keep / f"{number:03d}-{side}.ptx").write_text(f"// {name}\n{code}\n")
    print(json.dumps(digests))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="MODULE:FUNCTION[:ARGUMENT...]")
    parser.add_argument("--base", default="HEAD", help="revision to compare with (default: HEAD)")
    parser.add_argument("--target", default="sm90")
    parser.add_argument("--keep", type=Path, help="folder for the PTX of both")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep = arguments.keep.resolve()
    if arguments.worker:
        worker(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        archive = subprocess.run(["git", "archive", arguments.base, "src", "tests"], cwd=ROOT, check=True, capture_output=True)
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
            tar.extractall(base, filter="data")
        processes = [in_tree(tree, Path(folder) / name, arguments) for tree, name in ((base, "before"), (ROOT, "after"))]
        outputs = [p.communicate()[0] for p in processes]
    if any(p.returncode for p in processes):
        return 1
    before, after = (json.loads(out.splitlines()[-1]) for out in outputs)
    names = dict.fromkeys((*before, *after))
    other = [n for n in names if before.get(n) != after.get(n)]
    for name in other:
        print("DIFFERS" if name in before and name in after else "ONLY BEFORE" if name in before else "ONLY AFTER", name)
    print(f"{len(names) - len(other)} of {len(names)} compiled kernels have the same PTX as in {arguments.base}")
    return 1 if other or not names else 0


if __name__ == "__main__":
    sys.exit(main())
