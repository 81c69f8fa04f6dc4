"""Which chip a device is taken for, by its name and target, and what an override may say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from narrowgemm import arch


@pytest.mark.parametrize(("name", "major", "minor", "sms", "found"), [
    ("NVIDIA H200", 9, 0, 132, "h200"),
    ("NVIDIA H20", 9, 0, 78, "h20"),
    ("NVIDIA H100 80GB HBM3", 9, 0, 132, "h100"),
    ("NVIDIA H100 PCIe", 9, 0, 114, "h100"),
    ("NVIDIA B200", 10, 0, 148, "b200"),
    ("NVIDIA L40S", 8, 9, 142, "l40s"),
    ("NVIDIA A100-SXM4-80GB", 8, 0, 108, "a100"),
])
def test_devices_of_the_table(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int, sms: int, found: str) -> None:
    got = seen(monkeypatch, SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=sms))
    assert (got.name, got.target, got.sms) == (found, f"sm{major}{minor}", sms) and got.bandwidth == arch.ARCHS[found].bandwidth


def test_another_device_has_its_target_s_rates_and_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    got = seen(monkeypatch, SimpleNamespace(name="NVIDIA GeForce RTX 5070", major=12, minor=0, multi_processor_count=48,
                                            shared_memory_per_block_optin=101376, L2_cache_size=48 << 20))
    assert (got.name, got.target, got.sms, got.l2) == ("geforce-rtx-5070", "sm120", 48, 48 << 20)
    assert got.bandwidth == arch.ARCHS["rtx5090"].bandwidth


def test_an_amd_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    got = seen(monkeypatch, SimpleNamespace(name="AMD Instinct MI350X", gcnArchName="gfx950:sramecc+:xnack-", multi_processor_count=250))
    assert (got.name, got.target, got.sms, got.vendor, got.capability) == ("mi350x", "gfx950", 250, "amd", 0)


def seen(monkeypatch: pytest.MonkeyPatch, properties: SimpleNamespace) -> arch.Arch:
    monkeypatch.delenv("NARROWGEMM_ARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    arch._detect_gpu.cache_clear()
    try:
        return arch.detect(torch.device("cuda", 0))
    finally:
        arch._detect_gpu.cache_clear()


def test_the_override_names_a_device_or_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWGEMM_ARCH", "gfx942")
    assert arch.detect().name == "mi300x"
    monkeypatch.setenv("NARROWGEMM_ARCH", "h300")
    with pytest.raises(ValueError, match="NARROWGEMM_ARCH: got 'h300', expected one of"):
        arch.detect()
    monkeypatch.delenv("NARROWGEMM_ARCH")
    assert arch.detect(torch.device("cpu")).name == "cpu"
