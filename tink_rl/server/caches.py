"""What vLLM computed with old weights, forgotten wherever it is kept."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tink_rl.errors import TinkError

_RESET_S = 2.0
_AGAIN_S = 0.02
"""How long, and how often, vLLM is asked."""


async def forget_caches(engine: Any) -> None:
    """Drop keys, values and image embeddings, also those that a KV connector keeps outside of vLLM.

    A block that is still on its way to another cache is freed late, so vLLM is asked again. No request
    may be running.

    Raises:
        TinkError: vLLM did not.
    """
    if engine.vllm_config.model_config.is_multimodal_model:
        await engine.reset_encoder_cache()
    deadline = time.monotonic() + _RESET_S
    while await engine.reset_prefix_cache(reset_connector=True) is not True:
        if time.monotonic() > deadline:
            raise TinkError(
                f"vLLM did not reset its prefix cache within {_RESET_S:g} s: blocks of it are still in "
                "use, or its KV connector refused"
            )
        await asyncio.sleep(_AGAIN_S)
