"""Checks of `kernels.launching` on real compiled kernels, with Triton's own launcher class and no GPU: see `stub_driver`.

    python -m tests.kernels.launch_checks         prints {check: error, '' where there is none}

In a process of its own, so that each Triton can take its turn.
"""

from __future__ import annotations

import gc
import inspect
import json
import threading
import traceback
import weakref
from dataclasses import replace
from typing import Any

import torch
import triton

import narrowgemm as ng
from narrowgemm.kernels import binding, launching
from narrowgemm.kernels.bound import MAPS, Maps
from narrowgemm.kernels.launching import READY
from narrowgemm.ops import gemm as gemm_op
from narrowgemm.testing import stub_driver
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.stub_driver import CALLS

STUB = stub_driver.install()
DENSE, SPLIT = Case("launch", "dense", 1, 16, 256, 256), Case("launch", "dense", 1, 64, 512, 7168)
CASES = (DENSE, SPLIT, Case("launch", "dense", 1, 512, 256, 256), Case("launch", "offsets", 4, 8, 256, 256),
         Case("launch", "masked", 4, 8, 256, 256, max_m=64), Case("launch", "contiguous", 4, 128, 256, 256))
KERNELS = ("gluon_sm90.fp8_decode", "gluon_sm90.fp8_block", "triton.fp8_block")


def plain(x: Any) -> Any:
    """Tensors as addresses; what Triton hands to profilers left out."""
    if type(x) in (list, tuple):
        return tuple(map(plain, x))
    if type(x).__name__ in ("LazyDict", "HookChain"):
        return None
    return x.data_ptr() if hasattr(x, "data_ptr") else x


def launched(call: Any) -> list[Any]:
    """What the C launcher got."""
    CALLS.clear()
    call()
    return [plain(c) for c in CALLS]


def every_kernel_again_as_first() -> None:
    """A bound launch gives the C launcher what Triton's own did."""
    kernels = set()
    for case in CASES:
        i = build(case, "cpu")
        for name in KERNELS:
            try:
                plan = i.plan(backend=name)
            except ng.Unsupported:
                continue
            work = torch.empty(plan.workspace_bytes, dtype=torch.uint8)
            first, *more = (launched(lambda i=i, n=name, w=work: i.call(backend=n, workspace=w)) for _ in range(3))
            assert first and all(m == first for m in more), f"{case.id} {name}:\n{first}\n{more}"
            kernels.add(name)
    for fmt in (ng.FP8_1x128, ng.MXFP4, ng.FP8_128x128, ng.FP8_ROW, ng.FP8_TENSOR):
        x = torch.randn(3, 32, 256, dtype=torch.bfloat16)
        first, again = (without_pointers(launched(lambda f=fmt, x=x: ng.quantize(x, f))) for _ in range(2))
        assert first and first == again, f"quantize {fmt.name}:\n{first}\n{again}"
    assert kernels == set(KERNELS) and not launching.unbound(), launching.unbound()


def without_pointers(calls: Any) -> Any:
    """Outputs are new in every call: numbers that are none of sizes are not compared."""
    if type(calls) in (list, tuple):
        return tuple(map(without_pointers, calls))
    return None if type(calls) is int and calls > 1 << 32 else calls


def a_wide_expert_layer_is_bound() -> None:
    """Experts in BF16, FP16, and stored `[E, K, N]`: all steps of a decode call are bound, and launch what the first call launched."""
    from narrowgemm.ops import experts as experts_op

    ids, weights = torch.arange(8).view(4, 2), torch.full((4, 2), 0.5)
    for dtype, transposed in ((torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
        gate_up, down = (torch.randn(8, n, k, dtype=dtype) for n, k in ((256, 128), (128, 128)))
        if transposed:
            gate_up, down = (w.mT.contiguous().mT for w in (gate_up, down))
        x, out = torch.randn(4, 128, dtype=dtype), torch.empty(4, 128, dtype=dtype)

        def call(x=x, gate_up=gate_up, down=down, out=out) -> Any:
            return ng.experts(x, gate_up, down, topk_ids=ids, topk_weights=weights, out=out)

        first, again = without_pointers(launched(call)), without_pointers(launched(call))
        plan = experts_op._plans.newest().memo["plan"]
        assert plan.whole is not None, {name: p.kernel for name, p in plan.steps.items()}
        assert {plan.steps[n].kernel for n in ("gate_up", "down")} == {"triton.bf16"}
        assert first and first == again, f"{dtype}:\n{first}\n{again}"


def addresses_are_the_call_s_own() -> None:
    """Other tensors of the same signature; one tensor that is two operands in the first call and one in the next."""
    q = ng.quantize(torch.randn(128, 128, dtype=torch.bfloat16), ng.FP8_128x128, backend="reference")
    wide = ng.ScaledTensor(q.data, q.scale.expand(128, 1).contiguous(), ng.FP8_1x128)
    shared = ng.ScaledTensor(q.data, q.scale, ng.FP8_128x128)
    out = torch.empty(128, 128, dtype=torch.bfloat16)
    for _ in range(2):
        ng.gemm(wide, shared, out=out, backend="gluon_sm90.fp8_block")      # both payloads are one tensor
    other = ng.ScaledTensor(q.data.clone(), q.scale.clone(), ng.FP8_128x128)
    got = launched(lambda: ng.gemm(wide, other, out=out, backend="gluon_sm90.fp8_block"))
    flat = str(got)
    for t in (wide.data, wide.scale, other.data, other.scale, out):
        assert str(t.data_ptr()) in flat, f"{t.shape} is not in {got}"
    maps = [m for m in walk(got) if isinstance(m, tuple) and m[:1] == ("map",)]
    assert wide.data.data_ptr() in {m[1] for m in maps} and other.data.data_ptr() in {m[1] for m in maps}, maps


def walk(x: Any) -> Any:
    yield x
    if type(x) in (list, tuple):
        for y in x:
            yield from walk(y)


def freed_and_reallocated() -> None:
    """A descriptor is never served for another tensor, though addresses come back with other shapes."""
    for m in (16, 8, 16, 4, 16):
        for _ in range(2):
            i = build(Case("launch", "dense", 1, m, 256, 256), "cpu")
            got = launched(lambda i=i: i.call(backend="gluon_sm90.fp8_decode"))
            maps = [t for t in walk(got) if isinstance(t, tuple) and t[:1] == ("map",)]
            assert {t[1] for t in maps} == {i.a.data.data_ptr(), i.b.data.data_ptr()}
            assert all(t[6][1] == m for t in maps if t[1] == i.a.data.data_ptr()), maps
            del i
            gc.collect()


def keeps_no_memory() -> None:
    i = build(Case("launch", "dense", 1, 24, 256, 256), "cpu")
    for _ in range(3):
        i.call(backend="gluon_sm90.fp8_decode")
    held = [weakref.ref(t.untyped_storage()) for t in (i.a.data, i.b.data)]
    data = [weakref.ref(t) for t in (i.a.data, i.b.data)]
    CALLS.clear()
    del i
    gc.collect()
    assert not any(r() is not None for r in (*held, *data))


def compiled_kernels_stay_loaded() -> None:
    """Newer Tritons unload a kernel when nothing holds it, and a bound launch holds a bare function."""
    from narrowgemm.kernels.gluon.sm90.fp8_decode_device import fp8_decode_kernel

    i = build(DENSE, "cpu")
    for _ in range(2):
        i.call(backend="gluon_sm90.fp8_decode")
    unloaded: list[Any] = []
    STUB.utils.unload_module = unloaded.append
    fp8_decode_kernel.device_caches.clear()
    gc.collect()
    assert len(launched(lambda: i.call(backend="gluon_sm90.fp8_decode"))) == 1 and not unloaded


def descriptors_are_bounded() -> None:
    maps = Maps(lambda d: d.base.data_ptr(), type("D", (), {"base": torch.zeros(1)})())
    for address in range(16, 16 * 3 * MAPS, 16):
        assert maps[address] == address
    assert len(maps) <= MAPS


def hooks_go_triton_s_way() -> None:
    i = build(DENSE, "cpu")
    for _ in range(2):
        i.call()
    seen: list[str] = []
    enter = triton.knobs.runtime.launch_enter_hook
    enter.add(hook := lambda metadata: seen.append(metadata.get()["name"]))
    try:
        CALLS.clear()
        i.call()
        given = CALLS[0]
    finally:
        enter.remove(hook)
    assert enter in given, "the C launcher was not given the hooks"
    CALLS.clear()
    i.call()
    assert enter not in CALLS[0], "still launched Triton's way"


def other_stream() -> None:
    i = build(DENSE, "cpu")
    for stream in (7, 7, 91, 7):
        STUB.stream = stream
        assert all(stream in c for c in launched(i.call))
    STUB.stream = 7


def other_device() -> None:
    """Where another device is current, nothing that is bound to this one is launched."""
    i = build(DENSE, "cpu")
    for _ in range(2):
        i.call()
    ready = gemm_op._plans.newest().memo[READY]
    assert ready is not None
    current, ready._current = ready._current, lambda: 3
    CALLS.clear()
    assert not ready.launch((0,) * 8) and not CALLS
    ready._current = current


def odd_pointers() -> None:
    """A pointer that is off 16 bytes is never given to a kernel that was compiled for one on them."""
    i = build(DENSE, "cpu")
    store = torch.empty(16 * 256 + 8, dtype=torch.bfloat16)
    outs = [store[s:s + 16 * 256].view(16, 256) for s in (0, 1, 0, 1)]
    held = torch.empty(i.a.data.numel() + 16, dtype=torch.uint8)
    tokens = [replace(i.a, data=held[s:s + i.a.data.numel()].view(i.a.data.dtype).view(i.a.shape)) for s in (0, 4, 0, 4)]
    functions: list[tuple[int, Any]] = []
    of_tokens: list[tuple[int, Any]] = []
    STUB.utils.load_binary, before = (lambda name, *rest: ("module", hash(rest[0]) & 0xFFFF, 0, 0, 1024)), STUB.utils.load_binary
    try:
        for out in outs:
            for _ in range(2):
                got = launched(lambda out=out: ng.gemm(i.a, i.b, out=out, backend="triton"))
                functions.append((out.data_ptr() % 16, got[0][4]))
        for a in tokens:
            for _ in range(2):
                got = launched(lambda a=a: ng.gemm(a, i.b, out=outs[0], backend="triton"))
                of_tokens.append((a.data.data_ptr() % 16, got[0][4]))
    finally:
        STUB.utils.load_binary = before
    for found in (functions, of_tokens):
        assert len({f for p, f in found if p}) == 1 and len({f for p, f in found if not p}) == 1
        assert len({f for _, f in found}) == 2, found
    # a workspace is in no signature
    split = build(SPLIT, "cpu")
    need = split.plan(backend="triton").workspace_bytes
    work = torch.empty(need + 16, dtype=torch.uint8)
    enter = triton.knobs.runtime.launch_enter_hook
    for start, bound in ((0, False), (0, True), (16, True)):
        CALLS.clear()
        split.call(backend="triton", workspace=work[start:start + need])
        assert all((enter not in c) == bound for c in CALLS), f"a workspace at {start}: {'not bound' if bound else 'bound'}"
    for start in (4, 8):
        try:
            split.call(backend="triton", workspace=work[start:start + need])
        except ValueError as e:
            assert "workspace, address" in str(e), e
        else:
            raise AssertionError(f"a workspace {start} bytes off 16 is taken")
    ready = gemm_op._plans.newest().memo[READY]
    assert ready.aligned(64) and not ready.aligned(68) and not ready((0,) * 7 + (4,))


def threads() -> None:
    """Eight threads with tensors of their own and one signature: each launch is of one thread's tensors alone."""
    own = [build(DENSE, "cpu", seed=s) for s in range(8)]
    own[0].call()
    own[0].call()
    CALLS.clear()
    start = threading.Barrier(8)

    def work(i: Any) -> None:
        start.wait()
        for _ in range(200):
            i.call()

    pool = [threading.Thread(target=work, args=(i,)) for i in own]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    sets = {frozenset(t.data_ptr() for t in (i.a.data, i.a.scale, i.b.data, i.b.scale, i.out.tensor)) for i in own}
    assert len(CALLS) == 1600
    known = frozenset().union(*sets)
    for call in CALLS:
        found = frozenset(x for x in walk(plain(call)) if type(x) is int) & known
        assert found in sets, found


def unknown_launchers_are_left_alone() -> None:
    """A launcher object that differs from what is known is launched Triton's way, and `unbound` says why."""
    class Other:
        global_scratch_size = profile_scratch_size = 0

        def __init__(self, change: Any) -> None:
            self.change = change

        def launch(self, *args: Any) -> None:
            raise AssertionError("launched")

        def __call__(self, *args: Any) -> None:
            self.launch(*self.change(args))

    kernel = type("K", (), {"arg_names": ["x", "n"], "__name__": "k", "signature": inspect.signature(lambda x, n: 0)})()
    x = torch.zeros(4)
    changes = {"reversed": lambda a: a[::-1], "one more": lambda a: (*a, 5), "one less": lambda a: a[:-1],
               "no stream": lambda a: tuple(0 if type(v) is int and v > 1 << 61 else v for v in a)}
    for name, change in changes.items():
        compiled = type("C", (), {"function": 1, "packed_metadata": (), "run": Other(change), "metadata": None})()
        assert binding.bind(compiled, launching.Launch(kernel, (1,), (x, 3), {}), {id(x): 4}) is None, name
        assert "another way" in launching.unbound().pop("k")
    scratch = Other(lambda a: a)
    scratch.global_scratch_size = 16
    for run, reason in ((scratch, "scratch"), (object(), "no `launch`")):
        compiled = type("C", (), {"function": 1, "packed_metadata": (), "run": run, "metadata": None})()
        assert binding.bind(compiled, launching.Launch(kernel, (1,), (x, 3), {}), {id(x): 4}) is None
        assert reason in launching.unbound()["k"]
    fine = type("C", (), {"function": 1, "packed_metadata": (), "run": Other(lambda a: a), "metadata": None})()
    assert binding.bind(fine, launching.Launch(kernel, (1,), (x, 3), {}), {id(x): 4}) is not None
    assert binding.bind(fine, launching.Launch(kernel, (1,), (x.clone(), 3), {}), {id(x): 4}) is None
    assert "made from operands" in launching.unbound()["k"]


def a_whole_layer_as_its_steps() -> None:
    """`experts`, all of whose launches are made as one, gives the C launcher what its steps did one by one, whatever tensors come."""
    from narrowgemm.ops import experts as op

    def layer() -> tuple[Any, ...]:
        up, down = (ng.quantize(torch.randn(4, *s), ng.FP8_128x128, backend="reference") for s in ((256, 256), (256, 128)))
        x, logits = torch.randn(3, 256).bfloat16(), torch.randn(3, 4)
        space = torch.empty(op.experts_workspace(3, up, down, top_k=2) + 64, dtype=torch.uint8)
        return x, up, down, logits, torch.empty_like(x), space[-space.data_ptr() % 64:]

    def call(x: Any, up: Any, down: Any, logits: Any, out: Any, space: Any) -> None:
        ng.experts(x, up, down, router_logits=logits, top_k=2, out=out, workspace=space)

    op._calls = type(op._calls)()
    one, two = layer(), layer()
    first = {id(t): launched(lambda t=t: call(*t)) for t in (one, two)}
    calls = op._calls
    assert len(calls.known) == 1 and len(first[id(one)]) == op._plans.newest().memo["plan"].launches
    for t in (two, one, two):
        assert launched(lambda t=t: call(*t)) == first[id(t)]
    op._calls = type(calls)()
    assert launched(lambda: call(*one)) == first[id(one)]       # step by step
    op._calls = calls


CHECKS = (every_kernel_again_as_first, a_wide_expert_layer_is_bound, addresses_are_the_call_s_own, freed_and_reallocated, keeps_no_memory,
          compiled_kernels_stay_loaded, descriptors_are_bounded, hooks_go_triton_s_way, other_stream, other_device, odd_pointers, threads,
          unknown_launchers_are_left_alone, a_whole_layer_as_its_steps)


def main() -> None:
    found = {"triton": triton.__version__}
    for check in CHECKS:
        try:
            check()
            found[check.__name__] = ""
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            found[check.__name__] = traceback.format_exc()[-3000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
