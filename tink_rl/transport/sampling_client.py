"""Sampling from one vLLM server, in TRL's shapes.

A completion is taken only if it names the model that was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tink_rl import errors
from tink_rl.transport import payloads
from tink_rl.transport.payloads import NO_LIMITS, Limits
from tink_rl.transport.server_client import ServerClient
from tink_rl.types import FULL_LOGPROBS, IDS_ONLY


class SamplingClient(ServerClient):
    """One vLLM server that is sampled from."""

    model: str | None = None
    """What is sampled where a call names no model; None: the first that the server names."""
    _limits: Limits | None = None

    def limits(self) -> Limits:
        """What a request to this server may hold, as far as it says; asked once, and after a failure."""
        if self._limits is None:
            try:
                self._limits = self._look_for_limits()
            except (ConnectionError, TimeoutError, errors.NotReady):
                return NO_LIMITS  # the request itself says why nobody answers
            except (errors.TinkError, LookupError, TypeError, ValueError):
                self._limits = NO_LIMITS  # a server that says nothing of itself that can be read
        return self._limits

    def _look_for_limits(self) -> Limits:
        from tink_rl.policy.shapes import vocab_size

        try:
            status = self.status()
        except (errors.PluginMissing, errors.BadToken):
            card = self.model_cards()[0]
            return Limits(
                vocab_size=vocab_size(card.get("root")), max_model_len=card.get("max_model_len")
            )
        return Limits(
            vocab_size=status.vocab_size,
            max_model_len=status.max_model_len,
            max_prompts=status.max_prompts,
        )

    def complete(
        self,
        payload: Mapping[str, Any],
        *,
        path: str = "/v1/completions",
        timeout_s: float | None = None,
        expected: int | None = None,
        limits: Limits = NO_LIMITS,
    ) -> dict[str, Any]:
        """POST a sampling payload; the answer, once `payloads.read_answer` found nothing wrong.

        More prompts than the server takes at once are asked for in several requests, in order.

        Raises:
            UnknownVersion: the server does not serve `payload["model"]`; nothing was generated.
            SamplingRefused, EngineUnavailable, BackendError, ServerUnreachable, RequestTimeout.
        """
        deadline_s = self.request_timeout_s if timeout_s is None else timeout_s
        body = payloads.check_payload(payload, limits)
        parts = payloads.split(payload, limits.max_prompts)
        if len(parts) == 1:
            return self._complete(payload, body, path, deadline_s, expected)
        deadline = time.monotonic() + deadline_s
        answers = [
            self._complete(
                part,
                payloads.check_payload(part, limits),
                path,
                max(0.001, deadline - time.monotonic()),
                len(part["prompt"]) * part.get("n", 1),
            )
            for part in parts
        ]
        choices = [choice for answer in answers for choice in answer["choices"]]
        return {**answers[0], "choices": choices}

    def _sample(self, payload: Mapping[str, Any], expected: int) -> dict[str, Any]:
        """`complete` within the server's limits, which it is asked for before the first request."""
        if self._limits is None:
            payloads.check_payload(payload)  # what is wrong anywhere needs no server
        return self.complete(payload, expected=expected, limits=self.limits())

    def _complete(
        self,
        payload: Mapping[str, Any],
        body: bytes,
        path: str,
        timeout_s: float,
        expected: int | None,
    ) -> dict[str, Any]:
        try:
            response = self._send(
                "POST", path, timeout_s=timeout_s, content=body, headers=payloads.JSON
            )
            return payloads.read_answer(
                response.status_code,
                payloads.json_or_text(response.text),
                model=payload["model"],
                url=self.base_url,
                expected=expected,
            )
        except (errors.UnknownVersion, ConnectionError, errors.NotReady):
            self._limits = None  # another server may answer here next
            raise

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        features: Sequence[Any] | None = None,
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        model: str | None = None,
        full_logprobs: bool = False,
        ids_only: bool = False,
    ) -> dict[str, Any]:
        """`n` completions per prompt, prompt-major, from the version `model` (None: the first served).

        With `full_logprobs`, logprobs are log softmax(logits / temperature) over the
        whole vocabulary, whatever top_k, a grammar, ... left of it to draw from; a server whose status
        says `no_full_logprobs` ignores this. With `ids_only`, `texts` may be empty: the server need not
        decode what nobody reads.

        Returns:
            TRL's keys: `prompt_ids` [P][T], `completion_ids` [P*n][T], `logprobs` and
            `logprob_token_ids` [P*n][T][<= 1 + logprobs], the sampled token's first, then the most likely
            ones (None if `logprobs` is None), and ours: `model` (the version that sampled),
            `finish_reasons` [P*n], `texts` [P*n]; `prompt_logprobs` [P], as vLLM writes them, if asked for.

        Raises:
            UnknownVersion: the server does not serve `model`.
            SamplingRefused: what the server must not get, by name, or what vLLM refused.
        """
        if features is not None:
            raise errors.SamplingRefused(
                "images are not supported by this client; use a text model, or TRL's own client"
            )
        payload: dict[str, Any] = {
            "model": model or self.model or self.models()[0],
            "prompt": payloads.as_prompts(prompts),
            **payloads.sampling_fields(
                n=n,
                repetition_penalty=repetition_penalty,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                max_tokens=max_tokens,
                logprobs=logprobs,
                structured_outputs_regex=structured_outputs_regex,
                generation_kwargs=generation_kwargs,
            ),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        asked = {FULL_LOGPROBS: full_logprobs, IDS_ONLY: ids_only}
        if any(asked.values()):
            payload["vllm_xargs"] = {name: 1 for name, is_asked in asked.items() if is_asked}
        # The prefix cache must never answer one version with another one's keys and values.
        payload["cache_salt"] = payloads.salt(payload["model"])
        n = payload.get("n", 1)
        choices = self._sample(payload, len(payload["prompt"]) * n)["choices"]
        return _as_trl(choices, n, payload["model"])

    def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        *,
        model: str | None = None,
    ) -> dict[str, Any]:
        """As `generate`, from conversations, rendered by the server's own chat template.

        Raises:
            SamplingRefused: a template was given, or vLLM refused the request.
        """
        if chat_template is not None or chat_template_kwargs:
            raise errors.SamplingRefused(
                "a chat template is never sent to a server (vLLM 0.31 can be stopped by one); "
                "apply it in the trainer and use generate() with token ids"
            )
        shared: dict[str, Any] = {
            "model": model or self.model or self.models()[0],
            **payloads.sampling_fields(
                chat=True,
                n=n,
                repetition_penalty=repetition_penalty,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                max_tokens=max_tokens,
                logprobs=logprobs is not None,
                top_logprobs=logprobs or 0,
                structured_outputs_regex=structured_outputs_regex,
                generation_kwargs=generation_kwargs,
            ),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **({"tools": list(tools)} if tools else {}),
        }
        shared["cache_salt"] = payloads.salt(shared["model"])
        choices: list[dict[str, Any]] = []
        for i, conversation in enumerate(messages):
            if isinstance(conversation, (str, Mapping)):
                raise errors.SamplingRefused(
                    f"messages[{i}] is a {type(conversation).__name__}: expected a list of messages for each "
                    "conversation, [[{'role': 'user', 'content': '...'}], ...]"
                )
            payload = {**shared, "messages": list(conversation)}
            data = self.complete(payload, path="/v1/chat/completions")
            choices += [_chat_choice(c, data["prompt_token_ids"]) for c in data["choices"]]
        return _as_trl(choices, shared.get("n", 1), shared["model"])

    def continuation(
        self, prompt_ids: Sequence[int], model: str, num_tokens: int
    ) -> tuple[list[int], list[float]]:
        """The prompt and `num_tokens` that `model` adds, and the logprob of each but the first.

        Raises:
            BackendError: fewer tokens came back.
        """
        payload = {
            "model": model,
            "prompt": list(prompt_ids),
            "max_tokens": num_tokens,
            "temperature": 1.0,
            "seed": 0,
            "ignore_eos": True,
            "prompt_logprobs": 0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": payloads.salt(model),
        }
        [choice] = self._sample(payload, 1)["choices"]
        pairs = zip(choice["prompt_logprobs"][1:], list(prompt_ids)[1:], strict=True)
        read = [float(row[str(token)]["logprob"]) for row, token in pairs]
        added = [int(token) for token in choice["token_ids"]]
        rows = payloads.logprob_rows(choice)
        if rows is None or len(added) != num_tokens:
            raise errors.BackendError(
                f"{self.base_url} was asked for {num_tokens} tokens with logprobs, {len(added)} came back",
                replica=self.base_url,
            )
        written = [row[token] for row, token in zip(rows, added, strict=True)]
        return [*prompt_ids, *added], read + written


def _chat_choice(choice: dict[str, Any], prompt_ids: list[int]) -> dict[str, Any]:
    content = (choice.get("logprobs") or {}).get("content")
    logprobs = None
    if content is not None:
        logprobs = {
            "tokens": [item["token"] for item in content],
            "token_logprobs": [item["logprob"] for item in content],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in item["top_logprobs"]} for item in content
            ],
        }
    return {
        "prompt_token_ids": prompt_ids,
        "token_ids": choice["token_ids"],
        "logprobs": logprobs,
        "finish_reason": choice["finish_reason"],
        "text": choice["message"].get("content") or "",
    }


def _as_trl(choices: list[dict[str, Any]], n: int, model: str) -> dict[str, Any]:
    found = [payloads.logprob_rows(choice) for choice in choices]
    rows = [
        [_sampled_first(*pair) for pair in zip(row, choice["token_ids"], strict=True)]
        for row, choice in zip(found, choices, strict=True)
        if row is not None
    ]
    asked = len(rows) == len(found)
    answer = {
        "prompt_ids": [choice["prompt_token_ids"] for choice in choices[::n]],
        "completion_ids": [choice["token_ids"] for choice in choices],
        "logprobs": [[[*t.values()] for t in row] for row in rows] if asked else None,
        "logprob_token_ids": [[[*t] for t in row] for row in rows] if asked else None,
        "model": model,
        "finish_reasons": [choice["finish_reason"] for choice in choices],
        "texts": [choice["text"] for choice in choices],
    }
    if any(choice.get("prompt_logprobs") is not None for choice in choices[::n]):
        answer["prompt_logprobs"] = [choice["prompt_logprobs"] for choice in choices[::n]]
    return answer


def _sampled_first(row: dict[int, float], token: int) -> dict[int, float]:
    """As TRL takes the first of a token's logprobs, whatever more was asked for."""
    return row if len(row) == 1 else {token: row[token], **row}
