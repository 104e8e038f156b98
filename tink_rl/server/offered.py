"""Which sync modes a server can offer, by how vLLM was started: pure, over vLLM's config."""

from __future__ import annotations

from typing import Any

from tink_rl.errors import ConfigError
from tink_rl.types import SyncMode


def check_layout(config: Any, args: Any) -> None:
    """Raise unless every worker and every adapter name is where this package looks for it.

    Raises:
        ConfigError: a parallel layout that is not proven.
    """
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"data parallel {parallel.data_parallel_size}, pipeline parallel "
            f"{parallel.pipeline_parallel_size}: only tensor parallel is proven here; start one "
            "server per replica instead"
        )
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise ConfigError("--api-server-count must be 1: each API server has its own adapter names")


def offered_modes(config: Any, asked: str | None) -> tuple[SyncMode, ...]:
    """The modes of `asked` (`"adapter,merged,full"`; None: what vLLM's flags allow) that work here.

    Full mode is left out where weights cannot be written, if something else is left.

    Raises:
        ConfigError: merged mode was asked for and cannot work, or nothing is left.
    """
    default = "adapter,full" if config.lora_config else "merged,full"
    modes = tuple(SyncMode(part.strip()) for part in (asked or default).split(","))
    if SyncMode.ADAPTER in modes and config.lora_config is None:
        raise ConfigError("TINK_SERVER_MODES names 'adapter'; start vLLM with --enable-lora")
    why = why_not_written(config)
    if why is None:
        return modes
    if SyncMode.MERGED in modes:
        raise ConfigError(f"merged mode {why}; use --mode adapter")
    if modes == (SyncMode.FULL,):
        raise ConfigError(f"full mode {why}; use --mode adapter")
    return tuple(mode for mode in modes if mode is not SyncMode.FULL)


def why_not_written(config: Any) -> str | None:
    """Why new weights cannot be written into the served ones, to follow "merged mode"; None: they can."""
    quantization = config.model_config.quantization
    if quantization is not None:
        return (
            f"on a server quantised with {quantization!r}: the layout of its weights is not the "
            "checkpoint's"
        )
    offload = config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        return (
            "with weights offloaded to the host (--cpu-offload-gb, --offload-group-size): what is "
            "written is gone at the next prefetch"
        )
    if config.parallel_config.enable_eplb:
        return "with --enable-eplb: experts move between workers"
    if config.model_config.enable_sleep_mode:
        return "with --enable-sleep-mode: a server that slept (level 2) has no weights, and would not know"
    if config.ec_transfer_config is not None:
        return (
            "with an encoder cache outside of vLLM, which nobody can tell to forget old embeddings"
        )
    return _why_kv_stays(config.kv_transfer_config)


def _why_kv_stays(transfer: Any) -> str | None:
    """Why keys and values of old weights would outlive them, in a cache outside of vLLM."""
    if transfer is None or transfer.kv_connector is None:
        return None
    from tink_rl.server.vllm_names import KVConnectorBase_V1, KVConnectorFactory

    parts = transfer.kv_connector_extra_config.get("connectors", ())
    names = [str(part.get("kv_connector")) for part in parts] or [transfer.kv_connector]
    for name in names:
        if transfer.kv_connector_module_path is not None and not parts:
            found = KVConnectorFactory.get_connector_class(transfer)
        else:
            found = KVConnectorFactory.get_connector_class_by_name(name)
        if found.reset_cache is KVConnectorBase_V1.reset_cache:
            return (
                f"with the KV connector {name}, which cannot forget the keys and values of old weights "
                "(it has no reset_cache)"
            )
    return None
