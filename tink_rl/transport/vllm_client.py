"""The one room that knows a server's URLs: sampling, control routes, and TRL's client interface.

`VLLMClient` keeps the method names and return shapes of TRL 1.16's client, so that it can stand where
that one stands, but every request has a deadline, no POST is retried blindly, a completion is taken
only if it names the model that was asked for, and vLLM need not be installed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx

from tink_rl import errors, tls
from tink_rl.transport import payloads
from tink_rl.transport.payloads import NO_LIMITS, Limits
from tink_rl.types import FULL_LOGPROBS, ServerStatus, SyncMode
from tink_rl.urls import server_url

if TYPE_CHECKING:
    from tink_rl.transport.fleet import Fleet, Replica
    from tink_rl.transport.whole_update import WholeUpdate

logger = logging.getLogger("tink_rl")

_SAY_EVERY_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
_CONTROL = "/tink/v1"
CHUNK_BYTES = 8 * 2**20


class VLLMClient:
    """One vLLM server, seen from outside. Thread-safe; a context manager."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        api_key: str | None = None,
        request_timeout_s: float = 600.0,
        connect_timeout_s: float = _CONNECT_TIMEOUT_S,
        connection_timeout: float = 0.0,
        group_port: int | None = None,
        policy: str = "policy",
        ca_file: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Store; with `connection_timeout` > 0, wait that long for the server to answer.

        Args:
            base_url: `http://HOST:PORT` of the server, or https; `/v1` behind it is taken off.
            token: Bearer token of the control routes; sampling does not need it.
            api_key: vLLM's own `--api-key`, if it has one.
            request_timeout_s: Deadline of one sampling request.
            connect_timeout_s: Deadline of opening one connection.
            connection_timeout: Seconds to wait for the server (TRL's name).
            group_port: Accepted for TRL's sake and not needed: the server names the port at join.
            policy: Name under which whole tensors are served that TRL's weight interface sends.
            ca_file: Authorities to trust beside the system's (PEM); None: what TINK_CA_FILE names.
            transport: For tests.

        Raises:
            ConfigError: `base_url` is no URL of a server, or the CA file cannot be read.
            ServerUnreachable: nobody answered within `connection_timeout`.
        """
        self.base_url = server_url(base_url)
        self._was_answered = False
        self._token = token
        self._request_timeout_s = request_timeout_s
        self._connect_timeout_s = connect_timeout_s
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            transport=transport,
            verify=tls.context_for(self.base_url, ca_file) or True,
            trust_env=False,  # no proxies
            limits=httpx.Limits(
                max_connections=256,
                max_keepalive_connections=256,
                keepalive_expiry=payloads.IDLE_CONNECTION_S,
            ),
        )
        self.policy = policy
        self._fleet: Fleet | None = None
        self._update: WholeUpdate | None = None
        self.model: str | None = None
        self._limits: Limits | None = None
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
        timeout = httpx.Timeout(timeout_s, connect=min(self._connect_timeout_s, timeout_s))
        try:
            response = self._http.request(method, path, timeout=timeout, **kwargs)
        except httpx.ConnectError as error:
            wrong = tls.what_is_wrong(self.base_url, error)
            if wrong is not None:
                raise errors.TLSFailed(wrong, replica=self.base_url) from error
            raise errors.ServerUnreachable(
                payloads.unreachable(self.base_url, str(error)), replica=self.base_url
            ) from error
        except httpx.TimeoutException as error:
            raise errors.RequestTimeout(
                f"{method} {self.base_url}{path} was not answered within {timeout_s:g} s; is the "
                "server paused or overloaded? `tink-rl status` shows its state",
                replica=self.base_url,
            ) from error
        except httpx.TransportError as error:
            wrong = None if self._was_answered else tls.what_is_wrong(self.base_url, error)
            if wrong is not None:
                raise errors.TLSFailed(wrong, replica=self.base_url) from error
            raise errors.ServerUnreachable(
                f"the connection to {self.base_url} broke during {method} {path} "
                f"({type(error).__name__}: {error}); look into the server's log",
                replica=self.base_url,
            ) from error
        except RuntimeError as error:
            if not self._http.is_closed:
                raise
            raise errors.ConfigError(
                f"{method} {path}: this client of {self.base_url} was closed; make a new VLLMClient"
            ) from error
        if response.is_redirect:
            raise errors.ServerUnreachable(
                payloads.redirected(self.base_url, path, response.headers.get("location", "")),
                replica=self.base_url,
            )
        self._was_answered = True
        return response

    def control(
        self,
        action: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        when_sent: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """POST (GET without body) to a control route; its JSON.

        `when_sent` is called when the last byte is on its way, to do something while the server does.

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
        if when_sent is not None:
            kwargs["extensions"] = {"trace": _at_the_end_of_sending(when_sent)}
        method = "GET" if body is None and content is None else "POST"
        response = self._send(method, f"{_CONTROL}/{action}", timeout_s=timeout_s, **kwargs)
        data = payloads.json_or_text(response.text)
        if response.status_code == 200 and isinstance(data, dict):
            return data
        if response.status_code == 404 and not payloads.is_ours(data):
            raise errors.PluginMissing(self._without_plugin(action), replica=self.base_url)
        raise errors.from_wire(data, response.status_code)

    def _without_plugin(self, action: str) -> str:
        """What was seen where our route should be: a vLLM of another start, or none at all."""
        seen = self._send("GET", "/v1/models", timeout_s=10.0).status_code
        if seen in (404, 405):
            return (
                f"{self.base_url} has neither {_CONTROL}/{action} nor /v1/models (HTTP 404, {seen}): no vLLM "
                "server at this path. Correct the URL, or start one with `tink-rl serve MODEL`"
            )
        return (
            f"the server at {self.base_url} runs without the tink_rl plugin ({_CONTROL}/{action}: HTTP "
            "404); start it with `tink-rl serve MODEL` (its Python needs `pip install tink-rl`)"
        )

    def status(self, timeout_s: float = 10.0) -> ServerStatus:
        """What the plugin says of its server.

        Raises:
            ServerUnreachable, PluginMissing, BadToken.
        """
        return ServerStatus.from_json(self.control("status", timeout_s=timeout_s))

    def wait_until_reachable(self, timeout_s: float) -> None:
        """Return once `/health` answers; logs every ten seconds what is waited for.

        Raises:
            ServerUnreachable: it did not within `timeout_s`.
        """
        start = said = time.monotonic()
        deadline = start + timeout_s
        while True:
            seen = 0
            try:
                seen = self._send("GET", "/health", timeout_s=5.0).status_code
                if seen == 200:
                    return
            except errors.TLSFailed:
                raise  # waiting does not mend it
            except errors.TinkError:
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                why = f"GET /health gave HTTP {seen} for {timeout_s:g} s; is its path right?"
                raise errors.ServerUnreachable(
                    payloads.unreachable(self.base_url, why), replica=self.base_url
                )
            if time.monotonic() - said >= _SAY_EVERY_S:
                said = time.monotonic()
                logger.info(
                    "waiting for the vLLM server at %s (%.0f of %g s); start one with `tink-rl serve MODEL`",
                    self.base_url,
                    said - start,
                    timeout_s,
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
        return [card["id"] for card in self.model_cards()]

    def model_cards(self) -> list[dict[str, Any]]:
        """vLLM's cards of what can be sampled, the base first: `id`, `root`, `max_model_len`, ...

        Raises:
            BadToken: vLLM has an --api-key of its own, and it was not sent.
            ServerUnreachable, BackendError: no vLLM server answers at this path.
        """
        response = self._send("GET", "/v1/models", timeout_s=10.0)
        if response.status_code != 200:
            data = payloads.json_or_text(response.text)
            payloads.check_key(response.status_code, data, self.base_url)
            if response.status_code == 404:
                raise errors.ServerUnreachable(
                    f"{self.base_url} has no /v1/models (HTTP 404): no vLLM server at this path. Correct "
                    "the URL (VLLM_BASE_URL), or start one with `tink-rl serve MODEL`",
                    replica=self.base_url,
                )
            raise errors.from_wire(data, response.status_code)
        data = payloads.json_or_text(response.text)
        if not isinstance(data, dict) or not isinstance(data.get("data"), list):
            raise errors.BackendError(
                f"GET {self.base_url}/v1/models gave no list of models but {response.text[:100]!r}; "
                "correct the URL: what answers there is no vLLM server"
            )
        cards: list[dict[str, Any]] = data["data"]
        return cards

    def forget_prefixes(self, timeout_s: float = 30.0) -> None:
        """Let the server forget every cached prefix; running requests end first.

        Raises:
            NotSupportedByBackend: it has no route for this.
            DrainTimeout: requests that run did not end within `timeout_s`.
        """
        try:
            self.control("forget_prefixes", {"timeout_s": timeout_s}, timeout_s=timeout_s + 5.0)
        except errors.PluginMissing:
            self._forget_prefixes_of_stock_vllm(timeout_s)

    def _forget_prefixes_of_stock_vllm(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            response = self._send("POST", "/reset_prefix_cache", timeout_s=timeout_s)
            if response.status_code != 200:
                raise errors.NotSupportedByBackend(
                    f"the vLLM server at {self.base_url} has no route that resets its prefix cache "
                    "(none is needed: every version has a cache of its own); start it with "
                    "`tink-rl serve MODEL`, or in vLLM's dev mode"
                )
            if payloads.json_or_text(response.text) == {"success": True}:
                return
            if time.monotonic() > deadline:
                raise errors.DrainTimeout(
                    f"running requests at {self.base_url} kept their prefixes for {timeout_s:g} s; "
                    "try again when it is idle"
                )
            time.sleep(0.2)

    # -- adapters by path: a server without the plugin ----------------------------------------------

    def load_lora(self, name: str, path: str, *, timeout_s: float = 60.0) -> None:
        """Let a stock server load the PEFT directory `path` under `name`, which must be fresh.

        Raises:
            RuntimeLoadingOff: the server does not let adapters be loaded while it runs.
            AdapterConflict: `name` is loaded already.
            BadToken: vLLM has an --api-key of its own, and it was not sent.
            BackendError: vLLM refused the adapter.
        """
        body = {"lora_name": name, "lora_path": path}
        response = self._send("POST", "/v1/load_lora_adapter", timeout_s=timeout_s, json=body)
        if response.status_code == 200:
            return
        data = payloads.json_or_text(response.text)
        payloads.check_key(response.status_code, data, self.base_url)
        text = payloads.error_text(data)
        if response.status_code in (404, 405) and "NotFoundError" not in response.text:
            raise errors.RuntimeLoadingOff(
                f"the vLLM server at {self.base_url} has no tink_rl plugin and does not load adapters "
                "while it runs; start it with `tink-rl serve MODEL --mode adapter`, or set "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 for `vllm serve MODEL --enable-lora`",
                replica=self.base_url,
            )
        if "already been" in text:
            raise errors.AdapterConflict(f"{name} is loaded already: {text}")
        raise errors.BackendError(f"vLLM at {self.base_url} refused adapter {name}: {text}")

    def unload_lora(self, name: str, *, timeout_s: float = 30.0) -> None:
        """Let a stock server forget `name`; one that it does not know is fine."""
        body = {"lora_name": name}
        response = self._send("POST", "/v1/unload_lora_adapter", timeout_s=timeout_s, json=body)
        if response.status_code not in (200, 404):
            data = payloads.json_or_text(response.text)
            payloads.check_key(response.status_code, data, self.base_url)
            text = payloads.error_text(data)
            raise errors.BackendError(f"vLLM at {self.base_url} did not unload {name}: {text}")

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
        deadline_s = self._request_timeout_s if timeout_s is None else timeout_s
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
    ) -> dict[str, Any]:
        """`n` completions per prompt, prompt-major, from the version `model` (None: the first served).

        With `full_logprobs`, logprobs are log softmax(logits / temperature) over the
        whole vocabulary, whatever top_k, a grammar, ... left of it to draw from; a server whose status
        says `no_full_logprobs` ignores this.

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
        if full_logprobs:
            payload["vllm_xargs"] = {FULL_LOGPROBS: 1}
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

    # -- TRL's weight interface -------------------------------------------------------------------

    def init_communicator(self, device: Any = "cpu") -> None:
        """Check that whole tensors can be sent here; the channel itself opens with the first of them.

        Raises:
            PluginMissing, BadToken, ServerUnreachable.
            ModeUnavailable: the server does not offer full mode.
        """
        modes = self.status().modes
        if SyncMode.FULL not in modes:
            raise errors.ModeUnavailable(
                f"mode 'full': the server at {self.base_url} offers {', '.join(modes)}; restart it with "
                "`tink-rl serve` of this release (a quantised server does not offer it)",
                replica=self.base_url,
            )

    def close_communicator(self) -> None:
        """Give lease and channel back. An update that `reset_prefix_cache` did not end is aborted."""
        update, self._update = self._update, None
        fleet, self._fleet = self._fleet, None
        if update is not None:
            update.abort("close_communicator() came before reset_prefix_cache()")
        if fleet is not None:
            fleet.close()

    def update_named_param(self, name: str, weights: Any) -> None:
        """Send one whole tensor under its name in the checkpoint.

        The first one opens an update: the server holds requests and is NOT READY until
        `reset_prefix_cache()`, with which TRL ends a series of these calls, makes what was sent the
        served policy, `policy@N`. Tensors that were not sent are the checkpoint's then. Nothing half
        is ever served.

        Raises:
            UnknownModules, ShapeMismatch, NonFiniteWeights, ...: the update has ended; if something was
                written already, the server is NOT READY until the next whole one.
        """
        if self._update is None:
            self._update = self._begin_update(None)
        try:
            self._update.add(name, weights)
        except BaseException:
            self._update = None
            raise

    def update_model_params(self, model: Any) -> None:
        """Send all tensors of `model` (transformers, or PEFT: merged on the fly) and serve them.

        Names, shapes and groups are checked before the first byte.

        Raises:
            TinkError: what is wrong, or the update that `update_named_param` has under way.
        """
        from tink_rl.policy.whole import whole_source

        if self._update is not None:
            raise errors.ConfigError(
                "update_named_param() has an update under way; end it with reset_prefix_cache()"
            )
        replica = self._replica()
        source = whole_source(model, replica.layout())
        update = self._begin_update(source.plan(self.status().dtype))
        update.add_all(source.pairs())
        update.finish()

    def reset_prefix_cache(self) -> None:
        """End the update that `update_named_param` began: serve what was sent, under `policy@N`.

        Without one there is nothing to do: every version has a cache of its own (name and salt).

        Raises:
            IncompleteGroup: some tensors were sent without others of the same module.
            CommitFailed: the server is NOT READY until the next whole update.
        """
        update, self._update = self._update, None
        if update is not None:
            update.finish()

    def _replica(self) -> Replica:
        from tink_rl.config import SyncConfig
        from tink_rl.transport.fleet import Fleet, Replica

        if self._fleet is None:
            config = SyncConfig(policy=self.policy, mode=SyncMode.FULL)
            self._fleet = Fleet([Replica(self, config, writer=f"client-{uuid.uuid4().hex[:12]}")])
        replica = self._fleet.replicas[0]
        replica.ensure_channel()
        return replica

    def _begin_update(self, plan: list[dict[str, Any]] | None) -> WholeUpdate:
        from tink_rl.transport.whole_update import BUCKET_BYTES, WholeUpdate

        replica, status = self._replica(), self.status()
        assert self._fleet is not None
        last = max([replica.last_version, *(_version(n, self.policy) for n in status.served)])
        replica.last_version = last + 1
        update = WholeUpdate(
            self._fleet,
            policy=self.policy,
            version=last + 1,
            base_fingerprint=status.base_fingerprint,
            dtype=status.dtype,
            bucket_bytes=BUCKET_BYTES,
        )
        update.begin(plan)
        return update


def _version(name: str, policy: str) -> int:
    head, _, number = name.rpartition("@")
    return int(number) if head == policy and number.isdecimal() else 0


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
        "logprobs": [[list(t.values()) for t in row] for row in rows] if asked else None,
        "logprob_token_ids": [[list(t) for t in row] for row in rows] if asked else None,
        "model": model,
        "finish_reasons": [choice["finish_reason"] for choice in choices],
        "texts": [choice["text"] for choice in choices],
    }
    if any(choice.get("prompt_logprobs") is not None for choice in choices[::n]):
        answer["prompt_logprobs"] = [choice["prompt_logprobs"] for choice in choices[::n]]
    return answer


def _sampled_first(row: dict[int, float], token: int) -> dict[int, float]:
    """As TRL takes the first of a token's logprobs, whatever more was asked for."""
    return {token: row[token], **row}


def _at_the_end_of_sending(call: Callable[[], Any]) -> Callable[[str, Any], None]:
    """An httpx trace that calls `call` when a request has been written."""

    def trace(event: str, _: Any) -> None:
        if event.endswith("send_request_body.complete"):
            call()

    return trace
