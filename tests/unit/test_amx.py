"""AMX's tile registers: every process of vLLM asks for them, and says it when it may not use them."""

from __future__ import annotations

import inspect
import multiprocessing
import platform

import pytest
import torch

from tink_rl.server import amx


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with AMX, whose kernel answers `cpu["grants"]`; counts who asked."""
    found = {"amx": True, "grants": True, "asked": 0}

    def init():
        found["asked"] += 1
        return found["grants"]

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: found["amx"])
    monkeypatch.setattr(torch.cpu, "_init_amx", init)
    return found


def test_plugin_asks_for_the_tiles_before_anything_else_of_vllm_is_loaded(
    cpu, stock_vllm, monkeypatch, caplog
):
    from tink_rl.server import plugin

    def loaded():
        assert cpu["asked"] == 1

    monkeypatch.setattr(plugin, "_wait_asleep", loaded)
    plugin.register()
    assert cpu["asked"] == 1 and "AMX" not in caplog.text


def test_refusal_is_one_line_with_what_works_instead(cpu, caplog):
    cpu["grants"] = False
    amx.ask_for_tiles()
    [record] = caplog.records
    assert "--dtype float32" in record.getMessage() and "illegal" in record.getMessage()


def test_cpu_without_tiles_is_asked_nothing(cpu, caplog):
    cpu["amx"] = False
    amx.ask_for_tiles()
    assert cpu["asked"] == 0 and not caplog.records and amx.may_use_tiles() is None


@pytest.mark.parametrize(("bits", "may"), [(0b11, False), (1 << 18 | 0b11, True)])
def test_permission_is_read_from_its_bit(cpu, monkeypatch, bits, may):
    monkeypatch.setattr(amx, "permitted_features", lambda: bits)
    assert amx.may_use_tiles() is may


def test_kernel_says_what_a_process_may_use():
    found = amx.permitted_features()
    # x87 and SSE are everybody's; other machines have no such call.
    assert found & 0b11 == (0b11 if platform.machine() == "x86_64" else 0)


def _permission_after_asking(answers):
    amx.ask_for_tiles()
    answers.put((amx.may_use_tiles(), torch.cpu._is_amx_tile_supported()))


def test_process_that_is_spawned_has_the_permission_once_it_asked():
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_permission_after_asking, args=(answers,))
    child.start()
    may, has_amx = answers.get(timeout=60)
    child.join(10)
    assert may is (True if has_amx else None)


def test_vllm_takes_the_tiles_by_the_function_that_is_asked_here():
    attention = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    source = inspect.getsource(attention._get_attn_isa)
    assert "torch.cpu._is_amx_tile_supported()" in source
    assert isinstance(torch.cpu._init_amx(), bool)
