"""install / uninstall: module specs, idempotence, what comes back, and the real package behind unknown names."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types

import pytest

from narrowgemm.compat import deep_gemm as compat
from narrowgemm.compat.deep_gemm import delegate

pytestmark = pytest.mark.usefixtures("clean_modules")

REAL = {
    "__init__.py": "from . import inner\nfrom .inner import fp8_mqa_logits\nlog = []\n__version__ = '9.9'\n"
                   "def fp8_gemm_nt(*a): return 'real'\n"
                   "def set_num_sms(n): log.append(('set_num_sms', n))\n"
                   "def set_mk_alignment_for_contiguous_layout(n): log.append(('alignment', n))\n",
    "inner.py": "def fp8_mqa_logits(): return __name__\n",
    "utils/__init__.py": "from . import dist\n",
    "utils/dist.py": "def init_dist(): return 'dist'\n",
}


def write_package(root, files: dict[str, str], name: str = "deep_gemm") -> None:
    for path, text in files.items():
        target = root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.fixture
def real(tmp_path, monkeypatch):
    write_package(tmp_path, REAL)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_import_forms():
    assert not compat.installed()
    with pytest.raises(ModuleNotFoundError):
        import deep_gemm
    made = compat.install()
    import deep_gemm
    import deep_gemm.testing.bench as bench
    import deep_gemm.utils.math
    from deep_gemm import fp8_gemm_nt
    from deep_gemm.utils.layout import get_tma_aligned_size

    assert compat.installed() and made is deep_gemm is sys.modules["deep_gemm"]
    assert fp8_gemm_nt is compat.fp8_gemm_nt and get_tma_aligned_size is deep_gemm.get_tma_aligned_size
    assert deep_gemm.utils.math is deep_gemm.math is importlib.import_module("deep_gemm.utils.math")
    assert deep_gemm.testing.bench is compat.testing.bench and bench is not None
    assert importlib.import_module("deep_gemm.testing.bench").bench_kineto is deep_gemm.testing.bench_kineto
    assert deep_gemm.__version__ == compat.__version__


def test_specs():
    compat.install()
    for name, package in (("deep_gemm", True), ("deep_gemm.utils", True), ("deep_gemm.testing", True),
                          ("deep_gemm.utils.math", False), ("deep_gemm.utils.layout", False)):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.name == name
        assert (spec.submodule_search_locations is not None) == package
        assert hasattr(sys.modules[name], "__path__") == package
    assert sys.modules["deep_gemm"].__path__ == []


def test_idempotent_and_reversible():
    first = compat.install()
    assert compat.install() is first
    compat.uninstall()
    assert not any(n.split(".")[0] == "deep_gemm" for n in sys.modules)
    compat.uninstall()
    assert compat.install() is not first


def test_what_was_imported_before_comes_back(real):
    before = importlib.import_module("deep_gemm")
    inner, utils = importlib.import_module("deep_gemm.inner"), importlib.import_module("deep_gemm.utils")
    made = compat.install()
    assert made.fp8_gemm_nt is compat.fp8_gemm_nt
    assert made.fp8_mqa_logits() == "deep_gemm.inner"
    assert sys.modules["deep_gemm.inner"] is inner and sys.modules["deep_gemm.utils"] is not utils
    assert made.utils.dist.init_dist() == "dist"
    assert delegate.PRIVATE not in sys.modules, "one copy is enough"
    compat.uninstall()
    assert sys.modules["deep_gemm"] is before and sys.modules["deep_gemm.utils"] is utils
    assert "deep_gemm.utils.math" not in sys.modules
    assert sys.modules["deep_gemm"].fp8_gemm_nt() == "real"


def test_uninstall_leaves_what_somebody_else_put_there():
    compat.install()
    other = types.ModuleType("deep_gemm")
    sys.modules["deep_gemm"] = other
    compat.uninstall()
    assert sys.modules["deep_gemm"] is other


def test_unknown_names_without_a_real_package():
    made = compat.install()
    for module, name in ((made, "fp8_mqa_logits"), (made.utils, "dist"), (compat, "fp8_mqa_logits")):
        with pytest.raises(AttributeError, match=r"no real deep_gemm is installed .* install one"):
            getattr(module, name)
    assert getattr(made, "fp8_paged_mqa_logits", None) is None
    with pytest.raises(ImportError):
        from deep_gemm import bf16_mega_moe  # noqa: F401


def test_unknown_names_come_from_the_real_package(real):
    made = compat.install()
    assert delegate.PRIVATE not in sys.modules, "it is loaded when it is needed"
    assert made.fp8_gemm_nt is compat.fp8_gemm_nt
    assert made.fp8_mqa_logits() == f"{delegate.PRIVATE}.inner"
    assert sys.modules["deep_gemm"] is made
    assert made.inner is sys.modules[delegate.PRIVATE].inner
    assert compat.fp8_mqa_logits is made.fp8_mqa_logits
    with pytest.raises(AttributeError, match=r"neither .* nor by the real deep_gemm 9\.9"):
        made.no_such_name  # noqa: B018
    loaded = sys.modules[delegate.PRIVATE]
    compat.uninstall()
    assert compat.install().log is loaded.log, "loaded once"


def test_settings_reach_the_real_package(real):
    made = compat.install()
    made.set_num_sms(3)
    made.set_pdl(True)  # the real one has no such setter
    assert made.log == [("set_num_sms", 3)]
    made.set_mk_alignment_for_contiguous_layout(64)
    assert made.log == [("set_num_sms", 3), ("alignment", 64)]


@pytest.mark.parametrize("text", ["assert cuda_home is not None", "assert None is not None", "import no_such_module",
                                  "raise RuntimeError('no driver')", "raise OSError('libcudart')"])
def test_a_real_package_that_fails_to_import(tmp_path, monkeypatch, text):
    write_package(tmp_path, {"__init__.py": "cuda_home = None\nfrom . import inner\n" + text, "inner.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    made = compat.install()
    with pytest.raises(AttributeError, match=r"the installed deep_gemm can't be imported \(.*repair it"):
        made.fp8_mqa_logits  # noqa: B018
    assert not any(n.startswith(delegate.PRIVATE) for n in sys.modules)
    assert not hasattr(made, "fp8_mqa_logits")
    assert made.align(5, 4) == 8


def test_a_real_package_that_imports_itself_by_name(tmp_path, monkeypatch):
    write_package(tmp_path, {"__init__.py": "import deep_gemm\nseen = hasattr(deep_gemm, 'extra')\n"
                                            "ours = deep_gemm.align\nextra = 1\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    made = compat.install()
    assert made.extra == 1 and made.seen is False and made.ours is compat.align


def test_a_folder_without_init_is_no_package(tmp_path, monkeypatch):
    write_package(tmp_path, {"notes.txt": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AttributeError, match="no real deep_gemm is installed"):
        compat.install().fp8_mqa_logits  # noqa: B018


def test_the_copy_inside_vllm(tmp_path, monkeypatch):
    write_package(tmp_path, {"__init__.py": "", "third_party/__init__.py": "",
                             "third_party/deep_gemm/__init__.py": "def fp8_mqa_logits(): return 'vendored'\n"}, "vllm")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = compat.install()
    assert not hasattr(made, "fp8_mqa_logits"), "vllm is not imported for it"
    importlib.import_module("vllm")
    assert made.fp8_mqa_logits() == "vendored"


def test_a_process_of_its_own():
    """What vLLM does: find_spec, import_module, getattr."""
    code = ("import narrowgemm.compat.deep_gemm as c, importlib, importlib.util; c.install();"
            "assert importlib.util.find_spec('deep_gemm') is not None; m = importlib.import_module('deep_gemm');"
            "assert callable(m.fp8_gemm_nt) and getattr(m, 'fp8_paged_mqa_logits', None) is None; print('ok')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok"
