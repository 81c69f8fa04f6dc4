"""Expert parallelism over 2 and 4 gloo processes: against the same layer on one rank, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
ROOT = Path(__file__).parents[2]
FORWARD = ("random", "one", "some", "wire", "micro", "micro-wire", "mesh", "token", "token-some", "token-one")


def test_a_mesh_of_two_dimensions_is_refused() -> None:
    from narrowgemm.distributed import ExpertParallel

    class Mesh:
        ndim = 2

        def get_group(self) -> None:
            raise AssertionError("which of its dimensions?")

    with pytest.raises(ValueError, match="DeviceMesh of the experts, dimensions: got 2, expected 1: take a sub-mesh by name"):
        ExpertParallel(8, Mesh())


def launch(folder: Path, ranks: int, names: tuple[str, ...], wait_for: int | None = None) -> list[dict[str, Any]]:
    """What the checks found on each rank, or on the first `wait_for` of them; the others are ended then."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "0"}
    children = [subprocess.Popen([sys.executable, "-m", "tests.distributed._worker", str(r), str(ranks), str(folder / "store"),
                                  "120", *names], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True) for r in range(ranks)]
    found, failed = [], []
    try:
        for rank, child in enumerate(children[:wait_for]):
            out, err = child.communicate(timeout=180)
            if child.returncode:
                failed.append(f"rank {rank}: {err[-1500:]}")
            lines = [line[6:] for line in out.splitlines() if line.startswith("FOUND ")]
            found.append(json.loads(lines[-1]) if lines else {})
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert not failed, "\n".join(failed)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every check in one start of the processes: starting them is what takes time."""
    return launch(tmp_path_factory.mktemp("ep"), request.param, (*FORWARD, "wires", "backward", "backward-one", "trained"))


@pytest.mark.parametrize("check", FORWARD)
def test_forward(results: list[dict[str, Any]], check: str) -> None:
    """Uneven tokens, a rank without any, all slots on one expert, ids of no expert; FP8 products, FP32 in and out."""
    for rank, found in enumerate(results):
        assert found[check] < 1e-9, f"rank {rank} of {len(results)}"


def test_quantised_on_the_wire_is_the_same_to_the_bit(results: list[dict[str, Any]]) -> None:
    assert all(found["wires"] for found in results)


@pytest.mark.parametrize("check", ["backward", "backward-one"])
def test_backward(results: list[dict[str, Any]], check: str) -> None:
    """With 'one', all ranks but one hold experts without rows, and still take part in the backward's exchanges."""
    for rank, found in enumerate(results):
        assert set(found[check]) >= {"gate_up", "down"}
        for name, diff in found[check].items():
            assert diff < 1e-9, f"gradient of {name} on rank {rank} of {len(results)}"


def test_the_trainable_module_is_a_compute(results: list[dict[str, Any]]) -> None:
    """Each rank's sum of BF16 results is rounded once more than on one rank."""
    for found in results:
        assert {"gate_up", "down"} <= set(found["trained"]) and all(diff < 2e-5 for diff in found["trained"].values())


@pytest.mark.parametrize("how, least", [("dies", 0), ("hangs", 1)])
def test_a_lost_rank_ends_in_an_error(tmp_path: Path, how: str, least: float) -> None:
    """Within the group's timeout, 3 s here; a rank that died is noticed at once. A hung one would hang for two minutes."""
    found = launch(tmp_path, 2, (how,), wait_for=1)[0][how]
    assert found["error"] and least <= found["seconds"] <= 30
