"""How kernel tests run.

Triton decides at import whether `@triton.jit` makes a compiled or an interpreted function, so a test process is one of
two:

* the interpreter process (the default): TRITON_INTERPRET=1 is set before anything imports Triton. A test marked
  `interpret` calls `kernel.launch(...)`, or an op, with CPU tensors, and it just works; the interpreter's faults are
  repaired first (`_interpreter.py`).
* the device process: as soon as the marker expression can select a `gpu` or `multigpu` test (`pytest -m gpu`),
  TRITON_INTERPRET is 0, and tests marked `interpret` are skipped. TRITON_INTERPRET in the environment decides where the
  expression should not.

A kernel test takes the `device` fixture and runs in both: the fixture is "cpu" marked `interpret` and "cuda" marked
`gpu`. Tests marked `compile` cross-compile in subprocesses without TRITON_INTERPRET (`_compile.py`), so they run in
either.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter, defaultdict

import pytest
from hypothesis import settings

HAS_TRITON = importlib.util.find_spec("triton") is not None


settings.register_profile("narrowgemm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("narrowgemm")


def wants_device(expression: str) -> bool:
    """Whether a marker expression selects a test that is marked `gpu` (or `multigpu`) and nothing else."""
    if not expression.strip():
        return False
    code = compile(expression.strip(), "<-m>", "eval")
    return any(eval(code, {"__builtins__": {}}, defaultdict(bool, {marker: True})) for marker in ("gpu", "multigpu"))


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TRITON_INTERPRET", "0" if wants_device(config.getoption("markexpr") or "") else "1")
    if interpreting():      # small tensors in several processes: threads that wait for each other took most of the time
        os.environ.setdefault("OMP_NUM_THREADS", "1")


# Cases that emulate or interpret device code take seconds each on a CPU. Of each function of these modules one case in so many
# runs by default, the others are marked slow: `pytest -m ''` runs all of them. Nothing changes on a GPU, nor for what is compiled.
ONE_IN = {"kernels/test_gluon_sm90_prefill.py": 4, "kernels/test_gluon_sm90_decode.py": 6, "kernels/test_gluon_sm90_scaled.py": 6,
          "kernels/test_steps.py": 4, "kernels/test_bf16.py": 2, "kernels/test_quantize_both.py": 4,
          "kernels/test_activate_both.py": 4, "ops/test_expert_mlp.py": 3, "ops/test_experts.py": 3,
          "ops/test_grouped_linear.py": 2, "testing/test_selftest.py": 4}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        share = next((n for name, n in ONE_IN.items() if item.path.as_posix().endswith(f"tests/{name}")), 1)
        if share > 1 and not any(map(item.get_closest_marker, ("gpu", "compile"))):
            function = item.nodeid.split("[")[0]
            if seen[function] % share:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test keeps its tensors: the CPU with interpreted kernels, or the GPU."""
    return request.param


@pytest.fixture
def interpret() -> tuple[str, ...]:
    """Makes kernels run on CPU tensors; the faults of the interpreter that were repaired. Skips in a device process."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if not interpreting():
        pytest.skip("this is a device process: Triton's functions are compiled, not interpreted")
    from ._interpreter import repair

    return repair()


@pytest.fixture(autouse=True)
def _kernel_process(request: pytest.FixtureRequest):
    """Applies the markers: `interpret` tests get the repaired interpreter, `gpu` tests a GPU and compiled kernels."""
    if request.node.get_closest_marker("interpret"):
        import numpy as np

        request.getfixturevalue("interpret")
        with np.errstate(all="ignore"):  # masked lanes divide by zero, as on the device
            yield
        return
    if request.node.get_closest_marker("gpu") or request.node.get_closest_marker("multigpu"):
        import torch

        if interpreting():
            pytest.skip("this is an interpreter process; run `pytest -m gpu`")
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
    yield


@pytest.fixture
def hopper(_kernel_process) -> None:
    """For a module's `pytestmark`: its kernels run on Hopper only. Every test draws the same numbers."""
    import torch

    from narrowgemm.arch import detect

    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("the kernels are for Hopper")
    torch.manual_seed(0)
