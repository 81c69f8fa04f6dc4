"""Cross-compiles kernels with no GPU, each target in a process of its own (one AMD target a process: Triton keeps state).

A job is an ordinary launch on small CPU tensors; in the worker, launching compiles for the target and records the machine
code instead of running. Jobs are generators named by "module:function" that yield (id, callable). Workers are forked from a server
that has imported torch and Triton, which takes longer than compiling a kernel.

    reports = compile_jobs("gfx950", "tests.kernels.fp8_block_jobs:jobs")

TRITONS: the installed Triton is the oldest that is supported; the newest lies beside the environment, for these tests alone.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from tests._sass import unwritten
from tests._sass_slots import arrivals

ROOT = Path(__file__).resolve().parent.parent
TRITONS = ("oldest", "newest")
SECONDS = 1800      # that a worker may take: the longest lists, with their machine code listed, a quarter of an hour on two cores
ORDERED = re.compile(r"\b(LDG\.E[.\w]*|BAR\.SYNC|MUFU\.\w+|EXIT)")
NVIDIA_OPS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "cp.async", "cp.async.bulk.tensor", "e4m3", "setmaxnreg",
              "block_scale", "griddepcontrol.wait", "kind::mxf8f6f4", "kind::mxf4.",
              *(f"m64n{n}k32.f32.e4m3.e4m3" for n in (8, 16, 32, 64, 128, 192, 256)), "m64n64k16.f32.bf16.bf16", "m64n128k16.f32.bf16.bf16", "multicast::cluster")


def newest_triton() -> str:
    """The folder of the newest Triton that the kernels are held against, beside the installed, oldest one: where
    `tools/setup_env.py` put it, or NARROWGEMM_TEST_TRITON says. Skips the test where there is none."""
    found = os.environ.get("NARROWGEMM_TEST_TRITON") or f"{sys.prefix}-triton"
    if not (Path(found) / "triton").is_dir():
        pytest.skip(f"no second Triton in {found}: tools/setup_env.py installs it")
    return found


def with_triton(which: str) -> dict[str, str]:
    """The environment of a process with the 'oldest' (installed) or 'newest' Triton, and without the interpreter."""
    front = [newest_triton()] if which == "newest" else []
    return dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join([*front, str(ROOT), str(ROOT / "src")]))


def compile_jobs(target: str, jobs: str, *args: str, triton: str = "oldest", sass: bool = False) -> list[dict]:
    """One report a compiled kernel: job, kernel, shared (bytes), spills (bytes), registers, serialized (wgmma is), starved (for too few
    registers), ops (mnemonic: count); with `sass`, about a second a kernel, `unwritten`, too, see `_sass.py`, `order`: of loads, barriers,
    exits and what the special function unit computes, as they stand, and of arrivals at a slot's barrier their number, `arrivals`, and
    those with late loads, see `_sass_slots.py`: behind a barrier, `late`, or of a warp that arrives for itself, `late_own`."""
    env = {"NARROWGEMM_ARCH": target, "NARROWGEMM_TEST_SASS": str(int(sass))}
    with tempfile.TemporaryDirectory() as folder:
        status = server(triton).run({"env": env, "folder": folder, "arguments": (target, jobs, *args)})
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    assert status == 0, f"compiling {jobs} for {target} failed:\n{stdout[-2000:]}\n{stderr[-6000:]}"
    return json.loads(next(line for line in reversed(stdout.splitlines()) if line.startswith("[{") or line == "[]"))


def check_slots(report: dict) -> None:
    """Of a kernel with a ring, compiled with `sass`: no slot is given back in front of a load from it."""
    assert report["arrivals"], f"{report['job']}: {report['kernel']} arrives at no slot's barrier"
    assert not report["late"], f"{report['job']}: {report['kernel']} gives slots back before loads have come: {report['late']}"


class Server:
    """A process with one of the Tritons. Ends with this one, which closes its standard input."""

    def __init__(self, triton: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "tests._compile"], cwd=ROOT, env=with_triton(triton), text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, work: dict) -> int:
        """The exit status of a worker."""
        assert self.process.stdin and self.process.stdout
        answer = ""
        try:
            print(json.dumps(work), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        finally:        # a test that was interrupted must not leave its answer to the next one
            if not answer:
                self.process.kill()
                server.cache_clear()
        assert answer, "the server of compilations died"
        return int(answer)


@cache
def server(triton: str) -> Server:
    return Server(triton)


def serve() -> None:
    """Fork a worker for each line of standard input, one after the other; answer with its exit status."""
    import torch  # noqa: F401
    import triton  # noqa: F401

    import narrowgemm  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def work(env: dict[str, str], folder: str, arguments: list[str]) -> NoReturn:
    """A worker's life. Its output goes to files in `folder`."""
    signal.alarm(SECONDS)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with open(Path(folder) / name, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(env)
    status = 1
    try:
        main(*arguments)
        status = 0
    finally:        # whatever came of it: a forked process must not go on with what its parent was doing
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def gpu_target(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target[2:]), 32)


class FakeDriver:
    """Just enough of a driver for a JIT function to compile."""

    def __init__(self, target: str) -> None:
        self.target = gpu_target(target)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


def nvidia_report(kernel, target: str, log: str) -> dict:
    """`log`: what ptxas said when it made the kernel; nothing where the kernel was cached, so that it is asked again, with Triton's options."""
    from triton.backends.nvidia.compiler import CUDABackend, get_ptxas, sm_arch_from_capability

    ptx, arch = kernel.asm["ptx"], sm_arch_from_capability(int(target[2:]))
    tool = Path((get_ptxas(int(target[2:])) if get_ptxas.__code__.co_argcount else get_ptxas()).path)
    with tempfile.TemporaryDirectory() as d:
        source, cubin = Path(d) / "kernel.ptx", Path(d) / "kernel.cubin"
        if "registers" not in log:
            source.write_text(ptx)
            options = ["-lineinfo", *re.findall(r"--regAllocOptLevel=\d", inspect.getsource(CUDABackend.make_cubin))]
            log = subprocess.run([tool, *options, "-v", f"--gpu-name={arch}", source, "-o", cubin], capture_output=True, text=True, check=True).stderr
        machine_code: dict[str, int | list[str]] = {}
        if os.environ.get("NARROWGEMM_TEST_SASS") == "1":
            cubin.write_bytes(kernel.asm["cubin"])
            dump = tool.with_name("cuobjdump")
            code = subprocess.run([dump, "-sass", cubin], capture_output=True, text=True).stdout if dump.exists() else ""
            machine_code["unwritten"] = unwritten(code)
            machine_code["order"] = ORDERED.findall(code)
            found = arrivals(code)
            machine_code["arrivals"] = len(found)
            machine_code["late"] = [str(x) for x in found if x.loads and x.barrier]
            machine_code["late_own"] = [str(x) for x in found if x.loads and not x.barrier]
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    return {"spills": int(spill[1]) + int(spill[2]) if spill else -1, "registers": int(registers[1]) if registers else -1,
            "serialized": "C7514" in log, "starved": "C7511" in log, "ops": {op: ptx.count(op) for op in NVIDIA_OPS}, **machine_code}


def amd_report(kernel) -> dict:
    asm = kernel.asm["amdgcn"]
    # scalar registers spill into lanes of vector registers, not to memory: the scratch size tells what reaches memory
    spills = sum(int(x) for x in re.findall(r"\.vgpr_spill_count:\s+(\d+)|\.private_segment_fixed_size:\s+(\d+)", asm)
                 for x in x if x)
    registers = re.search(r"\.vgpr_count:\s+(\d+)", asm)
    ops: dict[str, int] = {}
    for op, modifiers in re.findall(r"\b(v_mfma\w+|v_cvt_scalef32\w+|buffer_load\w+|global_load\w+|ds_read_b64_tr\w+)([^\n]*)", asm):
        # of a scaled product: which operands are of four bits
        op = " ".join([op, *re.findall(r"\b(?:cbsz|blgp):4", modifiers)])
        ops[op] = ops.get(op, 0) + 1
    return {"spills": spills, "registers": int(registers[1]) if registers else -1, "serialized": False, "ops": ops}


def main(target: str, jobs: str, *args: str) -> None:
    from importlib import import_module

    import triton

    triton.runtime.driver.set_active(FakeDriver(target))
    reports: list[dict] = []
    original = triton.runtime.jit.JITFunction.run
    current = ""

    triton.knobs.nvidia.dump_ptxas_log = True

    def compile_only(self, *run_args, grid, warmup, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = original(self, *run_args, grid=grid, warmup=True, **kwargs)
        report = amd_report(kernel) if target.startswith("gfx") else nvidia_report(kernel, target, said.getvalue())
        reports.append({"job": current, "kernel": self.fn.__name__, "shared": kernel.metadata.shared, **report})
        return kernel

    triton.runtime.jit.JITFunction.run = compile_only
    module, _, name = jobs.partition(":")
    for current, job in getattr(import_module(module), name)(target, *args):  # noqa: B007
        job()
    print(json.dumps(reports))


if __name__ == "__main__":
    serve()
