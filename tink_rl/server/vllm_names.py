"""The private names of vLLM that this package leans on, all of them, in one place.

Checked on vLLM 0.31.0 (CPU build). `tests/unit/test_vllm_contract.py` fails loudly when one moves.
Imported only inside vLLM's processes.
"""

from __future__ import annotations

from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader import default_loader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors as place_kernel_tensors,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker import lora_model_runner_mixin

TESTED_VLLM = ("0.31.0",)

__all__ = [
    "TESTED_VLLM",
    "InputProcessor",
    "KVConnectorBase_V1",
    "KVConnectorFactory",
    "LRUCacheWorkerLoRAManager",
    "LinearBase",
    "LoRAAdapterNotFoundError",
    "LoRAModel",
    "LogitsProcessorWithLoRA",
    "LoRARequest",
    "MergedColumnParallelLinear",
    "PEFTHelper",
    "QKVParallelLinear",
    "RowParallelLinear",
    "default_loader",
    "VLLMValidationError",
    "envs",
    "UnquantizedLinearMethod",
    "finalize_layerwise_reload",
    "get_layerwise_info",
    "initialize_layerwise_reload",
    "is_deferred_attention_layer",
    "lora_model_runner_mixin",
    "place_kernel_tensors",
    "set_current_vllm_config",
    "shm_broadcast",
    "to_meta_tensor",
]
