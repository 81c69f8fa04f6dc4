"""`tools/stamp_tables.py`; and the packaged tables themselves: a change to a kernel takes none of their rows away unnoticed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from narrowgemm.tuning import store
from narrowgemm.tuning.fingerprint import fingerprint

spec = importlib.util.spec_from_file_location("stamp_tables", Path(__file__).parents[1] / "tools" / "stamp_tables.py")
assert spec is not None and spec.loader is not None
stamp_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stamp_tables)


def test_every_adopted_row_is_of_its_kernel_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert any(r["adopted"] for path in store.PACKAGED.rglob("*.json") for r in store.read_rows(path))
    assert stamp_tables.main([]) == 0, f"{capsys.readouterr().out}docs/tuning.md, 'Rows that are older than a kernel', says what to do"


def test_a_changed_kernel_is_named_and_a_stamp_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(store.PACKAGED, tmp_path / "tables")
    table = next(p for p in (tmp_path / "tables").rglob("*.json") if any(r["adopted"] for r in store.read_rows(p)))
    kernel = next(r["kernel"] for r in store.read_rows(table) if r["adopted"])
    whole = table.read_text()
    table.write_text(whole.replace(f'"{kernel}": "{fingerprint(kernel)}"', f'"{kernel}": "0123456789ab"'))
    assert stamp_tables.main([], tmp_path / "tables") == 1
    assert table.name in (said := capsys.readouterr().out) and f"rows of {kernel}" in said
    assert stamp_tables.main([kernel], tmp_path / "tables") == 0
    assert table.read_text() == whole


def test_an_unknown_kernel_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert stamp_tables.main(["no.kernel"]) == 2
    assert "no.kernel" in capsys.readouterr().err
