"""Requests to one vLLM server: the control routes of our plugin, and what vLLM says of its models.

The one module that knows a server's URLs beside `sampling_client.py`, which adds sampling. Every request has
a deadline, no POST is retried blindly, and vLLM need not be installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

from tink_rl import errors, tls
from tink_rl.protocol import (
    FORGET_PREFIXES,
    PREFIX,
    A,
    ForgetPrefixesRequest,
    Q,
    Route,
    read_status,
)
from tink_rl.transport import payloads
from tink_rl.types import ServerStatus
from tink_rl.urls import server_url

logger = logging.getLogger("tink_rl")

_SAY_EVERY_S = 10.0
_CONNECT_TIMEOUT_S = 5.0


class ServerClient:
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
            ca_file: Authorities to trust beside the system's (PEM); None: what TINK_CA_FILE names.
            transport: For tests.

        Raises:
            ConfigError: `base_url` is not the URL of a server, or the CA file cannot be read.
            ServerUnreachable: nobody answered within `connection_timeout`.
        """
        self.base_url = server_url(base_url)
        self.settings: dict[str, Any] = {
            "token": token,
            "api_key": api_key,
            "request_timeout_s": request_timeout_s,
            "connect_timeout_s": connect_timeout_s,
            "ca_file": ca_file,
            "transport": transport,
        }
        """Arguments of another client of the same server."""
        self._was_answered = False
        self._token = token
        self.request_timeout_s = request_timeout_s
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
        if connection_timeout > 0:
            self.wait_until_reachable(connection_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; using the client afterwards raises."""
        self._http.close()

    # -- requests ---------------------------------------------------------------------------------

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
        response = self._send(method, f"{PREFIX}/{action}", timeout_s=timeout_s, **kwargs)
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
                f"{self.base_url} has neither {PREFIX}/{action} nor /v1/models (HTTP 404, {seen}): no vLLM "
                "server at this path. Correct the URL, or start one with `tink-rl serve MODEL`"
            )
        return (
            f"the server at {self.base_url} runs without the tink_rl plugin ({PREFIX}/{action}: HTTP "
            "404); start it with `tink-rl serve MODEL` (its Python needs `pip install tink-rl`)"
        )

    def ask(self, route: Route[Q, A], message: Q, *, timeout_s: float) -> A:
        """Send `message` to its route; what the server answered. See `control`."""
        answer = self.control(route.action, content=message.to_json(), timeout_s=timeout_s)
        return route.read_answer(answer)

    def status(self, timeout_s: float = 10.0) -> ServerStatus:
        """What the plugin says of its server.

        Raises:
            ServerUnreachable, PluginMissing, BadToken, ProtocolMismatch.
        """
        return read_status(self.control("status", timeout_s=timeout_s))

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

    # -- models -----------------------------------------------------------------------------------

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
            message = ForgetPrefixesRequest(timeout_s=timeout_s)
            self.ask(FORGET_PREFIXES, message, timeout_s=timeout_s + 5.0)
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
            PluginMissing: the server does not let adapters be loaded while it runs.
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
            raise errors.PluginMissing(
                f"the vLLM server at {self.base_url} has no tink_rl plugin and does not load adapters "
                "while it runs; start it with `tink-rl serve MODEL --mode adapter`, or set "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 for `vllm serve MODEL --enable-lora`",
                replica=self.base_url,
                code="runtime_loading_off",
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
