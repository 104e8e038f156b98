"""The private names of vLLM that this package leans on, all of them, in one place.

`from tink_rl.server.vllm_names import LoRAModel` looks a name up on first use; `check` looks at all of
them when a server starts. `tests/unit/test_vllm_contract.py` holds what else is assumed of them.
Imported only inside vLLM's processes.
"""

from __future__ import annotations

from typing import Any

from tink_rl.seam import Name, judge, misfits

_LORA, _LOADER = "vllm.lora", "vllm.model_executor.model_loader"
_LINEAR = "vllm.model_executor.layers.linear"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"

NAMES = {
    "InputProcessor": "vllm.v1.engine.input_processor:InputProcessor",
    "KVConnectorBase_V1": f"{_CONNECTOR}.v1.base:KVConnectorBase_V1",
    "KVConnectorFactory": f"{_CONNECTOR}.factory:KVConnectorFactory",
    "LRUCacheWorkerLoRAManager": f"{_LORA}.worker_manager:LRUCacheWorkerLoRAManager",
    "LinearBase": f"{_LINEAR}:LinearBase",
    "LoRAAdapterNotFoundError": "vllm.exceptions:LoRAAdapterNotFoundError",
    "LoRAModel": f"{_LORA}.lora_model:LoRAModel",
    "LoRARequest": f"{_LORA}.request:LoRARequest",
    "LogitsProcessorWithLoRA": f"{_LORA}.layers:LogitsProcessorWithLoRA",
    "MergedColumnParallelLinear": f"{_LINEAR}:MergedColumnParallelLinear",
    "PEFTHelper": f"{_LORA}.peft_helper:PEFTHelper",
    "QKVParallelLinear": f"{_LINEAR}:QKVParallelLinear",
    "RowParallelLinear": f"{_LINEAR}:RowParallelLinear",
    "UnquantizedLinearMethod": f"{_LINEAR}:UnquantizedLinearMethod",
    "VLLMValidationError": "vllm.exceptions:VLLMValidationError",
    "default_loader": f"{_LOADER}.default_loader",
    "envs": "vllm.envs",
    "finalize_layerwise_reload": f"{_LOADER}.reload:finalize_layerwise_reload",
    "get_layerwise_info": f"{_LOADER}.reload.layerwise:get_layerwise_info",
    "initialize_layerwise_reload": f"{_LOADER}.reload:initialize_layerwise_reload",
    "is_deferred_attention_layer": (
        "vllm.model_executor.layers.attention:is_deferred_attention_layer"
    ),
    "lora_model_runner_mixin": "vllm.v1.worker.lora_model_runner_mixin",
    "place_kernel_tensors": f"{_LOADER}.reload.layerwise:_place_kernel_tensors",
    "set_current_vllm_config": "vllm.config:set_current_vllm_config",
    "shm_broadcast": "vllm.distributed.device_communicators.shm_broadcast",
    "to_meta_tensor": f"{_LOADER}.reload.meta:to_meta_tensor",
}
"""What is imported -> where it stands."""

_MANAGER, _ENGINE = NAMES["LRUCacheWorkerLoRAManager"], "vllm.v1.engine.async_llm:AsyncLLM"
_FILES = ("hf_weights_files", "hf_folder", "index_file")
_FILTER = "filter_duplicate_safetensors_files"
USED = (
    Name(f"{_MANAGER}._load_adapter", exactly=("self", "lora_request")),
    Name(f"{_MANAGER}.create_lora_manager", exactly=("self", "model", "vllm_config")),
    Name(
        f"{NAMES['LoRAModel']}.from_lora_tensors",
        accepts=(
            *("lora_model_id", "tensors", "peft_helper", "device", "dtype", "model_vocab_size"),
            "weights_mapper",
        ),
    ),
    Name(f"{NAMES['PEFTHelper']}.from_dict"),
    Name(f"{NAMES['PEFTHelper']}.validate_legal"),
    Name(NAMES["LoRARequest"], accepts=("lora_name", "lora_int_id", "lora_path")),
    Name(NAMES["initialize_layerwise_reload"], exactly=("model",)),
    Name(f"{NAMES['default_loader']}:{_FILTER}", exactly=_FILES),
    Name(f"{NAMES['InputProcessor']}.process_inputs"),
    Name(f"{NAMES['envs']}:enable_envs_cache"),
    Name(f"{NAMES['lora_model_runner_mixin']}:LRUCacheWorkerLoRAManager"),
    Name(f"{NAMES['shm_broadcast']}:sched_yield"),
    Name(f"{_ENGINE}.pause_generation", accepts=("mode",)),
    Name(f"{_ENGINE}.resume_generation"),
    Name(f"{_ENGINE}.collective_rpc", accepts=("args",)),
    Name(f"{_ENGINE}.reset_prefix_cache", accepts=("reset_connector",)),
    Name(f"{_ENGINE}.reset_encoder_cache"),
    Name("vllm.v1.worker.worker_base:WorkerBase.add_lora", exactly=("self", "lora_request")),
    Name("vllm.v1.worker.worker_base:WorkerBase.remove_lora", exactly=("self", "lora_id")),
    Name("vllm.entrypoints.openai.models.serving:OpenAIServingModels"),
)
"""What is called, replaced or set, and how."""


def check() -> None:
    """Look at every name, before the engine starts.

    Raises:
        ConfigError: one of them moved.
    """
    from vllm import __version__

    judge("vllm", __version__, misfits([*map(Name, NAMES.values()), *USED]))


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Name(NAMES[name]).find()
