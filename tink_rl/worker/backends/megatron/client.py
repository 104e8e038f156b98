"""The one module that knows the URLs of Megatron-LM's text-generation servers.

There are two kinds, told apart by a probe. The *static* one (`tools/run_text_generation_server.py`)
answers `PUT /api`, one request at a time, text prompts only. The *dynamic* one
(`tools/run_dynamic_text_generation_server.py`) answers `POST /v1/completions`. Neither selects an
adapter, takes weights over HTTP or honours most sampling parameters: what a kind would drop in silence
is refused here by name. `contract.py` has the HTTP contract, as read from their sources.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tink_rl import errors, tls
from tink_rl.transport import payloads
from tink_rl.transport.sampling_params import SamplingParams
from tink_rl.urls import server_url
from tink_rl.worker.backends.megatron.contract import (
    Generated,
    Kind,
    Prompt,
    Scored,
    check_supported,
    dynamic_fields,
    dynamic_row,
    scored_row,
    static_fields,
    static_row,
)

_CONNECT_TIMEOUT_S = 5.0
_MAX_BODY_BYTES = 256 * 2**20
_MAX_PROMPTS = 128
"""The static server refuses more in one request."""
_REMEMBERED_PROMPTS = 4096
_MISSING = "prompts argument required"
"""What the static server says of an empty body: nothing else says that, and it costs no generation."""


@dataclass
class _Answer:
    status: int
    data: Any
    """The JSON, or the text where the body is none."""


class MegatronClient:
    """One Megatron-LM server, seen from outside. Used from one event loop; every call has a deadline."""

    def __init__(
        self, base_url: str = "http://localhost:5000", *, ca_file: str | None = None
    ) -> None:
        """Store. The first request opens connections and probes which kind of server answers.

        Args:
            base_url: `http://HOST:PORT`; a path such as `/api` or `/v1` behind it is dropped.
            ca_file: Authorities to trust beside the system's (PEM); None: what TINK_CA_FILE names.

        Raises:
            ConfigError: `base_url` is not the URL of a server, or the CA file cannot be read.
        """
        self.base_url = server_url(base_url).removesuffix("/api")
        self._ssl = tls.context_for(self.base_url, ca_file) or True
        self.kind: Kind | None = None
        self._session: aiohttp.ClientSession | None = None
        # The static server holds one global lock: queueing here keeps a cancelled request out of it.
        self._static_turn = asyncio.Lock()
        self._prompts: OrderedDict[str, Scored] = OrderedDict()

    async def close(self) -> None:
        """Close the connections; idempotent. A later request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # `total` off: the deadline is the caller's, and cancelling closes the connection.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
            # The queue bounds what is under way; a limit here would only hide requests from it.
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=payloads.IDLE_CONNECTION_S, ssl=self._ssl
            )
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
            # aiohttp takes PUT for idempotent and sends it again when a connection breaks, but here a
            # PUT is a generation, and that would run twice. No public switch; its test_utils does this.
            self._session._retry_connection = False
        return self._session

    # -- requests ---------------------------------------------------------------------------------

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> _Answer:
        """Status and body of one request; the caller holds the deadline (`asyncio.timeout`)."""
        url = f"{self.base_url}{path}"
        try:
            async with self._open().request(
                method, url, json=body, allow_redirects=False
            ) as response:
                return _Answer(response.status, await _read(response))
        except (aiohttp.ClientError, TimeoutError) as error:
            self._forget()
            wrong = await asyncio.to_thread(tls.what_is_wrong, self.base_url, error)
            raise errors.EngineUnavailable(
                wrong
                or f"no Megatron server can be reached at {self.base_url} ({method} {path}: "
                f"{type(error).__name__}: {error}); start tools/run_dynamic_text_generation_server.py, "
                "or correct MEGATRON_SERVER_URL",
                backend="megatron",
            ) from error

    def _forget(self) -> None:
        """The next request probes again: what answers then may be another server."""
        self.kind = None
        self._prompts.clear()

    async def probe(self) -> Kind:
        """Which kind of server answers at the URL; asked once, and again after a failure.

        Raises:
            EngineUnavailable: nobody answers, or the dynamic server says that it is not ready.
            BackendError: what answers is not a Megatron text-generation server.
        """
        if self.kind is not None:
            return self.kind
        api = await self._send("PUT", "/api", {})
        if api.status == 400 and isinstance(api.data, str) and _MISSING in api.data:
            self.kind = Kind.STATIC
            return self.kind
        health = await self._send("GET", "/health")
        if api.status in (404, 405) and health.status == 503:
            raise errors.EngineUnavailable(
                f"the Megatron server at {self.base_url} is not ready: {_words(health.data)}",
                backend="megatron",
            )
        if api.status in (404, 405) and health.status == 200 and _is_health(health.data):
            self.kind = Kind.DYNAMIC
            return self.kind
        raise errors.BackendError(
            f"{self.base_url} is no Megatron text-generation server: PUT /api gave HTTP {api.status}, "
            f"GET /health gave HTTP {health.status} {_words(health.data)}; correct MEGATRON_SERVER_URL",
            backend="megatron",
        )

    # -- sampling ---------------------------------------------------------------------------------

    async def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, timeout_s: float
    ) -> list[Generated]:
        """`len(prompts) * params.n` completions, prompt-major; all or none.

        Raises:
            NotSupportedByBackend: a parameter or a kind of prompt that this server would ignore.
            SamplingRefused: the server refused the request; its words are in the message.
            EngineUnavailable, BackendError, DeadlineExceeded: the server's fault.
        """
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await self._generate(prompts, params)
                except _OtherKind:
                    # Nothing was generated: another kind of server took the place of the probed one.
                    self._forget()
                    return await self._generate(prompts, params)
        except _OtherKind as error:
            raise errors.BackendError(
                f"the Megatron server at {self.base_url} has no {error.path} (HTTP {error.status})",
                backend="megatron",
            ) from error
        except TimeoutError as error:
            if isinstance(error, errors.TinkError):
                raise
            if not self._static_turn.locked():  # else it waited for another request of ours
                self._forget()
            raise errors.DeadlineExceeded(
                f"the Megatron server at {self.base_url} did not finish {len(prompts)} prompts within "
                f"{timeout_s:g} s; lower max_tokens or raise the timeout",
                backend="megatron",
            ) from error

    async def _generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generated]:
        kind = await self.probe()
        check_supported(kind, prompts, params)
        if kind is Kind.STATIC:
            async with self._static_turn:
                return await self._static([str(p) for p in prompts], params)
        return await self._dynamic(prompts, params)

    # -- static: PUT /api -------------------------------------------------------------------------

    async def _static(self, prompts: list[str], params: SamplingParams) -> list[Generated]:
        scored = await self._score(prompts)
        found: list[Generated] = []
        for chunk in _chunks([p for p in prompts for _ in range(params.n)]):
            data = await self._api({"prompts": chunk, **static_fields(params)}, len(chunk))
            with self._reading("PUT /api", data):
                found += [static_row(data, i, scored[p], params) for i, p in enumerate(chunk)]
        return found

    async def _score(self, prompts: list[str]) -> dict[str, Scored]:
        """What the server makes of each prompt: its answers do not say where one ends.

        Its tokeniser is not ours, and the text that it returns may be a detokenised prompt, so neither
        counting nor `len(prompt)` would be right. Scoring costs one prefill per new prompt.
        """
        known = {p: self._prompts[p] for p in prompts if p in self._prompts}
        for chunk in _chunks([p for p in dict.fromkeys(prompts) if p not in known]):
            body = {"prompts": chunk, "tokens_to_generate": 0, "logprobs": True, "no_log": True}
            data = await self._api(body, len(chunk))
            with self._reading("PUT /api", data):
                known |= {prompt: scored_row(data, i) for i, prompt in enumerate(chunk)}
        for prompt in known:
            self._prompts[prompt] = known[prompt]
            self._prompts.move_to_end(prompt)
        while len(self._prompts) > _REMEMBERED_PROMPTS:
            self._prompts.popitem(last=False)
        return known

    async def _api(self, body: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
        answer = await self._send("PUT", "/api", body)
        if answer.status in (404, 405):
            raise _OtherKind("PUT /api", answer.status)
        # Most validation failures come as HTTP 200 with a JSON string: that is not a completion.
        if answer.status == 400 or (answer.status == 200 and isinstance(answer.data, str)):
            raise errors.SamplingRefused(f"Megatron refused the request: {_words(answer.data)}")
        texts = answer.data.get("text") if isinstance(answer.data, dict) else None
        if answer.status != 200 or not isinstance(texts, list) or len(texts) != num_rows:
            raise self._no_completion("PUT /api", answer)
        for field in ("tokens", "segments", "logprobs"):
            rows = answer.data.get(field)
            if rows is not None and (not isinstance(rows, list) or len(rows) != num_rows):
                raise self._no_completion("PUT /api", answer)
        return answer.data  # type: ignore[no-any-return]

    # -- dynamic: POST /v1/completions ------------------------------------------------------------

    async def _dynamic(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generated]:
        """Text and token ids cannot travel in one list: each group is a request of its own."""
        copies = [p for p in prompts for _ in range(params.n)]
        found: dict[int, Generated] = {}
        for text in (True, False):
            rows = [i for i, p in enumerate(copies) if isinstance(p, str) is text]
            if rows:
                found |= dict(zip(rows, await self._completions(copies, rows, params), strict=True))
        return [found[i] for i in range(len(copies))]

    async def _completions(
        self, copies: Sequence[Prompt], rows: list[int], params: SamplingParams
    ) -> list[Generated]:
        prompts = [p if isinstance(p, str) else list(p) for p in (copies[i] for i in rows)]
        answer = await self._send(
            "POST", "/v1/completions", {"prompt": prompts, **dynamic_fields(params)}
        )
        if answer.status in (404, 405):
            raise _OtherKind("POST /v1/completions", answer.status)
        if 400 <= answer.status < 500:
            raise errors.SamplingRefused(f"Megatron refused the request: {_words(answer.data)}")
        if answer.status == 503:
            self._forget()
            raise errors.EngineUnavailable(
                f"the Megatron server at {self.base_url} is not ready: {_words(answer.data)}",
                backend="megatron",
            )
        choices = answer.data.get("choices") if isinstance(answer.data, dict) else None
        if answer.status != 200 or not isinstance(choices, list) or len(choices) != len(rows):
            raise self._no_completion("POST /v1/completions", answer)
        with self._reading("POST /v1/completions", choices):
            by_index = {choice["index"]: choice for choice in choices}
            return [dynamic_row(by_index[i], params) for i in range(len(rows))]

    @contextmanager
    def _reading(self, route: str, data: object) -> Iterator[None]:
        """An answer that has not the contract's form is the server's fault, not ours."""
        try:
            yield
        except errors.TinkError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._no_completion(route, _Answer(200, data)) from error

    def _no_completion(self, route: str, answer: _Answer) -> errors.BackendError:
        self._forget()
        return errors.BackendError(
            f"{route} of the Megatron server at {self.base_url} gave no completion: HTTP "
            f"{answer.status}, {_words(answer.data)}; look into the server's log",
            backend="megatron",
        )


class _OtherKind(Exception):
    """The route of the probed kind is not there (any more); nothing was generated."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(path, status)
        self.path, self.status = path, status


async def _read(response: aiohttp.ClientResponse) -> Any:
    body = bytearray()
    async for piece in response.content.iter_chunked(2**16):
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            raise aiohttp.ClientPayloadError(f"the answer exceeds {_MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


def _chunks(prompts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(prompts), _MAX_PROMPTS):
        yield list(prompts[start : start + _MAX_PROMPTS])


def _is_health(data: object) -> bool:
    return isinstance(data, dict) and "service" in data and data.get("ready") is not False


def _words(data: object) -> str:
    if isinstance(data, dict) and isinstance(data.get("message"), str):
        data = data["message"]
    text = data if isinstance(data, str) else json.dumps(data)
    return " ".join(text[:2000].split())[:300]
