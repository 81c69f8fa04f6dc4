"""The one printed command: a torchrun of two processes."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from narrowgemm.cli.group import cli

SIZES = ["--tokens", "16", "--hidden", "128", "--inter", "128", "--rounds", "1"]
ROOT = Path(__file__).parents[2]


def printed(*arguments: str) -> list[str]:
    result = CliRunner().invoke(cli, ["parallel", *arguments])
    assert result.exit_code == 0 and result.output.count("\n") == 1, result.output
    return shlex.split(result.output)


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"} | env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_says_how_many_processes() -> None:
    command = printed("--processes", "4", "--tokens", "8")
    assert command[command.index("--nproc-per-node") + 1] == "4" and command[-2:] == ["--tokens", "8"]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
def test_two_processes() -> None:
    out = run(printed(*SIZES), CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    assert "over 2 processes" in out and "calc_diff" in out


@pytest.mark.multigpu
@pytest.mark.parametrize("micro_batches", ["1", "2"])
def test_every_gpu(micro_batches: str) -> None:
    gpus = torch.cuda.device_count()
    assert gpus > 1, "needs several GPUs"
    out = run(printed("--processes", str(gpus), "--tokens", "512", "--experts", "16", "--micro-batches", micro_batches))
    assert f"over {gpus} processes, NVIDIA" in out
