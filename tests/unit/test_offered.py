"""Which modes a server offers, by how vLLM was started; what it forgets when weights change."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the server extra is not installed")
from tink_rl.errors import ConfigError, TinkError
from tink_rl.server import caches
from tink_rl.server.offered import check_layout, offered_modes
from tink_rl.types import SyncMode


def config(**changes):
    """What is read of vLLM's config; by dotted name: `model_config__quantization="fp8"`."""
    found = SimpleNamespace(
        lora_config=object(),
        model_config=SimpleNamespace(quantization=None, enable_sleep_mode=False),
        parallel_config=SimpleNamespace(
            enable_eplb=False, data_parallel_size=1, pipeline_parallel_size=1
        ),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        kv_transfer_config=None,
        ec_transfer_config=None,
    )
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = found
        for part in path:
            place = getattr(place, part)
        setattr(place, last, value)
    return found


def transfer(name: str, *parts: str):
    from vllm.config import KVTransferConfig

    extra = {"connectors": [{"kv_connector": part} for part in parts]} if parts else {}
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra)


NOT_WRITTEN = {
    "quantised with 'fp8'": {"model_config__quantization": "fp8"},
    "--cpu-offload-gb": {"offload_config__uva__cpu_offload_gb": 4},
    "--offload-group-size": {"offload_config__prefetch__offload_group_size": 8},
    "--enable-eplb": {"parallel_config__enable_eplb": True},
    "--enable-sleep-mode": {"model_config__enable_sleep_mode": True},
    "encoder cache": {"ec_transfer_config": object()},
    "NixlConnector, which cannot forget": {"kv_transfer_config": transfer("NixlConnector")},
    "LMCacheConnectorV1, which": {
        "kv_transfer_config": transfer(
            "MultiConnector", "OffloadingConnector", "LMCacheConnectorV1"
        )
    },
}


@pytest.mark.parametrize("why", NOT_WRITTEN)
def test_weights_are_written_only_where_that_lasts_and_nothing_old_survives(why):
    found = config(**NOT_WRITTEN[why])
    for asked in ("adapter,merged,full", "merged"):
        with pytest.raises(ConfigError, match=r"merged mode .*use --mode adapter") as caught:
            offered_modes(found, asked)
        assert why in str(caught.value)
    with pytest.raises(ConfigError, match=r"full mode .*use --mode adapter"):
        offered_modes(found, "full")
    assert offered_modes(found, None) == (SyncMode.ADAPTER,)
    assert offered_modes(found, "adapter") == (SyncMode.ADAPTER,)


@pytest.mark.parametrize("connector", [None, "OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_connectors_that_can_forget_allow_every_mode(connector):
    found = config(kv_transfer_config=transfer(connector) if connector else None)
    assert offered_modes(found, "adapter,merged,full") == ("adapter", "merged", "full")
    assert offered_modes(config(lora_config=None), None) == (SyncMode.MERGED, SyncMode.FULL)


def test_slots_need_vllms_own_flag():
    with pytest.raises(ConfigError, match="--enable-lora"):
        offered_modes(config(lora_config=None), "adapter")


@pytest.mark.parametrize("size", ["data_parallel_size", "pipeline_parallel_size"])
def test_layouts_that_are_not_proven_are_refused(size):
    with pytest.raises(ConfigError, match="only tensor parallel is proven"):
        check_layout(config(**{f"parallel_config__{size}": 2}), SimpleNamespace())
    with pytest.raises(ConfigError, match="--api-server-count"):
        check_layout(config(), SimpleNamespace(api_server_count=2))
    check_layout(config(), SimpleNamespace())


# -- what old weights computed --------------------------------------------------------------------


class Engine:
    """vLLM's client, whose prefix cache is reset at the `resets_at`th request."""

    def __init__(self, resets_at: int, *, sees: bool = False) -> None:
        self.resets_at, self.asked = resets_at, []
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=sees))

    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.asked.append("connector" if reset_connector else "own")
        return self.asked.count("connector") >= self.resets_at

    async def reset_encoder_cache(self):
        self.asked.append("encoder")


def test_prefix_cache_that_is_busy_is_asked_again_with_its_connector():
    engine = Engine(resets_at=3)
    asyncio.run(caches.forget_caches(engine))
    assert engine.asked == ["connector"] * 3


def test_prefix_cache_that_is_never_reset_is_an_error(monkeypatch):
    monkeypatch.setattr(caches, "_RESET_S", 0.05)
    with pytest.raises(TinkError, match=r"did not reset its prefix cache within 0\.05 s"):
        asyncio.run(caches.forget_caches(Engine(resets_at=10**9)))


def test_models_that_see_forget_their_image_embeddings_too():
    engine = Engine(resets_at=1, sees=True)
    asyncio.run(caches.forget_caches(engine))
    assert engine.asked == ["encoder", "connector"]
