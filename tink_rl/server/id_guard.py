"""Keeps token ids from the engine for which the served model has no embedding: they would end it.

vLLM 0.31 lets ids pass up to its tokenizer's `max_token_id`. That is one too large where the tokenizer is
as large as the model, and larger still where tokens were added to it alone. The lookup of one such id, in
a prompt or in a tokenized bad word, ends the engine, for everybody who samples from it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tink_rl.server.ids_only import leave_out_texts


def look_at_requests() -> None:
    """Let vLLM's input processor answer such a request with a 400, on every route; idempotent.

    What nobody reads of an answer is left out there too.
    """
    from tink_rl.server.vllm_names import InputProcessor

    process = InputProcessor.process_inputs
    if getattr(process, "checks_ids", False):
        return

    @functools.wraps(process)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        check_request(request, self.model_config.get_vocab_size())
        leave_out_texts(request.sampling_params)
        return request

    checked.checks_ids = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = checked


def check_request(request: Any, vocab_size: int) -> None:
    """Raise vLLM's own error for a bad request unless the model knows all ids of `request`.

    Raises:
        VLLMValidationError: the id and the bound.
    """
    if not request.mm_features:  # the placeholders of images may lie beyond, and are replaced
        _check(request.prompt_token_ids, vocab_size, "the prompt")
    for word in getattr(request.sampling_params, "bad_words_token_ids", None) or ():
        _check(word, vocab_size, "bad_words")


def _check(ids: Sequence[int] | None, vocab_size: int, where: str) -> None:
    from tink_rl.server.vllm_names import VLLMValidationError

    if ids and max(ids) >= vocab_size:
        raise VLLMValidationError(
            f"{where} holds token id {max(ids)}, and the served model has ids from 0 to {vocab_size - 1}; "
            "tokenize with the tokenizer that the model was saved with"
        )
