"""The one room that knows a server's URLs: sampling, control routes, and TRL's client interface.

`VLLMClient` keeps the method names and return shapes of TRL 1.16's client, so that it can stand where
that one stands, but every request has a deadline, no POST is retried blindly, a completion is taken
only if it names the model that was asked for, and vLLM need not be installed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from tink_rl import errors
from tink_rl.types import ServerStatus

_CONNECT_TIMEOUT_S = 5.0
_CONTROL = "/tink/v1"
CHUNK_BYTES = 8 * 2**20
_NEVER_FORWARDED = ("chat_template", "chat_template_kwargs", "extra_args")


class VLLMClient:
    """One vLLM server, seen from outside. Thread-safe; a context manager."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        api_key: str | None = None,
        request_timeout_s: float = 600.0,
        connection_timeout: float = 0.0,
        group_port: int | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Store; with `connection_timeout` > 0, wait that long for the server to answer.

        Args:
            base_url: `http://HOST:PORT` of the server.
            token: Bearer token of the control routes; sampling does not need it.
            api_key: vLLM's own `--api-key`, if it has one.
            request_timeout_s: Deadline of one sampling request.
            connection_timeout: Seconds to wait for the server (TRL's name).
            group_port: Accepted for TRL's sake and not needed: the server names the port at join.
            transport: For tests.

        Raises:
            ServerUnreachable: nobody answered within `connection_timeout`.
        """
        self.base_url = base_url.rstrip("/").replace("://0.0.0.0", "://127.0.0.1")
        self._token = token
        self._request_timeout_s = request_timeout_s
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            transport=transport,
            trust_env=False,
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=256),
        )
        self._communicator: Any = None
        self.model: str | None = None
        if connection_timeout > 0:
            self.wait_until_reachable(connection_timeout)

    def __enter__(self) -> VLLMClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close communicator and connections; using the client afterwards raises."""
        self.close_communicator()
        self._http.close()

    # -- one door ---------------------------------------------------------------------------------

    def _send(self, method: str, path: str, *, timeout_s: float, **kwargs: Any) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s))
        try:
            return self._http.request(method, path, timeout=timeout, **kwargs)
        except httpx.ConnectError as error:
            raise errors.ServerUnreachable(
                f"The vLLM server can't be reached at {self.base_url} ({error}); start one with "
                "`tink-rl serve MODEL`, or correct the URL",
                replica=self.base_url,
            ) from error
        except httpx.TimeoutException as error:
            raise errors.RequestTimeout(
                f"{method} {self.base_url}{path} was not answered within {timeout_s:g} s; is the "
                "server paused or overloaded? `tink-rl status` shows its state",
                replica=self.base_url,
            ) from error
        except httpx.TransportError as error:
            raise errors.ServerUnreachable(
                f"the connection to {self.base_url} broke during {method} {path} "
                f"({type(error).__name__}: {error}); look into the server's log",
                replica=self.base_url,
            ) from error

    def control(
        self,
        action: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """POST (GET without body) to a control route; its JSON.

        Raises:
            PluginMissing: the server runs without the tink_rl plugin.
            TinkError: what the server raised.
        """
        bearer = {"authorization": f"Bearer {self._token}"} if self._token else {}
        kwargs: dict[str, Any] = {"headers": bearer}
        if content is not None:
            kwargs |= {"content": content, "params": params}
        elif body is not None:
            kwargs["json"] = body
        method = "GET" if body is None and content is None else "POST"
        response = self._send(method, f"{_CONTROL}/{action}", timeout_s=timeout_s, **kwargs)
        if response.status_code == 200:
            data: dict[str, Any] = response.json()
            return data
        data = _json_or_text(response)
        if response.status_code == 404 and not _is_ours(data):
            raise errors.PluginMissing(
                f"the server at {self.base_url} runs without the tink_rl plugin; start it with "
                "`tink-rl serve MODEL` (its Python needs `pip install tink-rl`)",
                replica=self.base_url,
            )
        raise errors.from_wire(data, response.status_code)

    def status(self, timeout_s: float = 10.0) -> ServerStatus:
        """What the plugin says of its server.

        Raises:
            ServerUnreachable, PluginMissing, BadToken.
        """
        return ServerStatus.from_json(self.control("status", timeout_s=timeout_s))

    def wait_until_reachable(self, timeout_s: float) -> None:
        """Return once `/health` answers.

        Raises:
            ServerUnreachable: it did not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self._send("GET", "/health", timeout_s=5.0).status_code == 200:
                    return
            except errors.TinkError:
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise errors.ServerUnreachable(
                    f"The vLLM server can't be reached at {self.base_url}: /health did not answer "
                    f"200 within {timeout_s:g} s",
                    replica=self.base_url,
                )
            time.sleep(0.2)

    def clock_offset_s(self) -> float | None:
        """Seconds by which the server's clock is ahead of ours (to a second); None if it says no date.

        Raises:
            ServerUnreachable: nobody answers.
        """
        date = self._send("GET", "/health", timeout_s=10.0).headers.get("date")
        if date is None:
            return None
        return parsedate_to_datetime(date).timestamp() - time.time()

    # -- sampling ---------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names that can be sampled: the base or merged version, then the slots."""
        response = self._send("GET", "/v1/models", timeout_s=10.0)
        if response.status_code != 200:
            raise errors.from_wire(_json_or_text(response), response.status_code)
        return [item["id"] for item in response.json()["data"]]

    def _sample(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(set(payload) & set(_NEVER_FORWARDED))
        if refused:
            raise errors.SamplingRefused(
                f"{refused} are never sent to a server (vLLM 0.31 can be stopped by a template); "
                "apply the chat template in the trainer and send token ids"
            )
        response = self._send("POST", path, timeout_s=self._request_timeout_s, json=payload)
        data = _json_or_text(response)
        model = payload["model"]
        if response.status_code == 404:
            raise errors.UnknownVersion(
                f"the server at {self.base_url} does not serve {model!r}; it was dropped, replaced "
                "by a newer version, or the server was restarted",
                replica=self.base_url,
            )
        if response.status_code != 200:
            if _is_ours(data):
                raise errors.from_wire(data, response.status_code)
            raise errors.SamplingRefused(f"vLLM refused the request: {_message(data)}")
        if data["model"] != model:
            raise errors.UnknownVersion(
                f"{model!r} was asked for, the server answered as {data['model']!r}",
                replica=self.base_url,
            )
        return data  # type: ignore[no-any-return]

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
    ) -> dict[str, Any]:
        """`n` completions per prompt, prompt-major, from the version `model` (None: the first served).

        Returns:
            TRL's keys: `prompt_ids` [P][T], `completion_ids` [P*n][T], `logprobs` and
            `logprob_token_ids` [P*n][T][1 + logprobs] (None if `logprobs` is None), and ours: `model`
            (the version that sampled), `finish_reasons` [P*n], `texts` [P*n].

        Raises:
            UnknownVersion: the server does not serve `model`.
            SamplingRefused: vLLM refused the parameters.
        """
        if features is not None:
            raise errors.SamplingRefused(
                "images are not supported by this client; use a text model, or TRL's own client"
            )
        if not prompts:
            raise errors.SamplingRefused("prompts is empty; expected at least one")
        payload: dict[str, Any] = {
            "model": model or self.model or self.models()[0],
            "prompt": [p if isinstance(p, str) else list(p) for p in prompts],
            "n": n,
            "repetition_penalty": repetition_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if structured_outputs_regex is not None:
            payload["structured_outputs"] = {"regex": structured_outputs_regex}
        payload |= generation_kwargs or {}
        # The prefix cache must never answer one version with another one's keys and values.
        payload.setdefault("cache_salt", _salt(payload["model"]))
        choices = self._sample("/v1/completions", payload)["choices"]
        expected = len(prompts) * payload["n"]
        if len(choices) != expected:
            raise errors.TinkError(f"{len(choices)} completions came back, expected {expected}")
        return _as_trl(choices, payload["n"], payload["model"])

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
            "n": n,
            "repetition_penalty": repetition_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "logprobs": logprobs is not None,
            "top_logprobs": logprobs or 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **({"tools": list(tools)} if tools else {}),
        }
        if structured_outputs_regex is not None:
            shared["structured_outputs"] = {"regex": structured_outputs_regex}
        shared |= generation_kwargs or {}
        shared.setdefault("cache_salt", _salt(shared["model"]))
        choices: list[dict[str, Any]] = []
        for conversation in messages:
            data = self._sample("/v1/chat/completions", {**shared, "messages": list(conversation)})
            choices += [_chat_choice(c, data["prompt_token_ids"]) for c in data["choices"]]
        return _as_trl(choices, shared["n"], shared["model"])

    def prompt_logprobs(self, prompt_ids: Sequence[int], model: str) -> list[float]:
        """Logprob of every prompt token but the first, `[T - 1]`, under the version `model`."""
        payload = {
            "model": model,
            "prompt": list(prompt_ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
            "cache_salt": _salt(model),
        }
        rows = self._sample("/v1/completions", payload)["choices"][0]["prompt_logprobs"]
        pairs = zip(rows[1:], list(prompt_ids)[1:], strict=True)
        return [float(row[str(token)]["logprob"]) for row, token in pairs]

    # -- TRL's weight interface -------------------------------------------------------------------

    def init_communicator(self, device: Any = "cpu") -> None:
        """Nothing to do: a publish opens its own channel. Checks that the plugin is there.

        Raises:
            PluginMissing, BadToken, ServerUnreachable.
        """
        self.status()

    def close_communicator(self) -> None:
        """Nothing to close here: a channel belongs to `WeightSync`, which closes it."""

    def update_named_param(self, name: str, weights: Any) -> None:
        """Not available: whole tensors do not travel in this release.

        Raises:
            UnsupportedAdapter: always.
        """
        raise errors.UnsupportedAdapter(
            f"update_named_param({name!r}): single tensors cannot be replaced; publish a LoRA policy "
            "with tink_rl.WeightSync(...).publish()"
        )

    def update_model_params(self, model: Any) -> None:
        """Not available: whole models do not travel in this release.

        Raises:
            UnsupportedAdapter: always.
        """
        raise errors.UnsupportedAdapter(
            "update_model_params: whole models cannot be replaced; publish a LoRA policy with "
            "tink_rl.WeightSync(...).publish()"
        )

    def reset_prefix_cache(self) -> None:
        """Nothing to do: every version has a cache of its own (name and salt)."""


def _salt(model: str) -> str:
    # vLLM refuses '@' and '/' in a salt, and both occur in names.
    return hashlib.sha256(model.encode()).hexdigest()[:32]


def _json_or_text(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return response.text


def _is_ours(data: Any) -> bool:
    error = data.get("error") if isinstance(data, dict) else None
    return isinstance(error, dict) and isinstance(error.get("code"), str) and "details" in error


def _message(data: Any) -> str:
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


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
    rows = [_logprob_rows(choice) for choice in choices]
    asked = all(row is not None for row in rows)
    return {
        "prompt_ids": [choice["prompt_token_ids"] for choice in choices[::n]],
        "completion_ids": [choice["token_ids"] for choice in choices],
        "logprobs": [[values for values, _ in row or []] for row in rows] if asked else None,
        "logprob_token_ids": [[ids for _, ids in row or []] for row in rows] if asked else None,
        "model": model,
        "finish_reasons": [choice["finish_reason"] for choice in choices],
        "texts": [choice["text"] for choice in choices],
    }


def _logprob_rows(choice: dict[str, Any]) -> list[tuple[list[float], list[int]]] | None:
    """Per token the logprobs, most likely first (the sampled one always among them), and their ids."""
    found = choice["logprobs"]
    if found is None:
        return None
    rows = []
    tokens = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    for (token, logprob, top), token_id in zip(tokens, choice["token_ids"], strict=True):
        by_id = {_token_id(key): value for key, value in (top or {}).items()}
        by_id[_token_id(token)] = logprob
        if _token_id(token) != token_id:
            raise errors.TinkError(f"token {token!r} came back for id {token_id}")
        ordered = sorted(by_id.items(), key=lambda item: -item[1])
        rows.append(([_number(v) for _, v in ordered], [i for i, _ in ordered]))
    return rows


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
