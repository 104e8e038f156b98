"""Sampling from an event loop: the payloads of `completions`, checked already, over aiohttp.

Cancelling the task of a request closes its connection, and that is how vLLM learns to abort it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tink_rl import errors, tls
from tink_rl.sampling import completions
from tink_rl.transport import payloads
from tink_rl.urls import server_url

_PATH = "/v1/completions"
_MAX_LINE_BYTES = 2**22


class AsyncSampler:
    """One vLLM server, sampled from one event loop. Connections open on first use."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        ca_file: str | None = None,
    ) -> None:
        """Store.

        Args:
            base_url: `http://HOST:PORT` of the server.
            api_key: vLLM's own `--api-key`, if it has one.
            connect_timeout_s: Deadline of opening a connection.
            ca_file: Authorities to trust beside the system's (PEM); None: what TINK_CA_FILE names.

        Raises:
            ConfigError: `base_url` is not the URL of a server, or the CA file cannot be read.
        """
        self.base_url = server_url(base_url)
        self._ssl = tls.context_for(self.base_url, ca_file) or True
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                # The queue bounds what is under way; a limit here would only hide requests from it.
                connector=aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=payloads.IDLE_CONNECTION_S, ssl=self._ssl
                ),
                read_bufsize=_MAX_LINE_BYTES,
            )
        return self._session

    async def complete(
        self, payload: Mapping[str, Any], *, timeout_s: float, expected: int | None = None
    ) -> dict[str, Any]:
        """POST a sampling payload; the answer, once `payloads.read_answer` found nothing wrong.

        Raises:
            UnknownVersion: the server does not serve `payload["model"]`; nothing was generated.
            SamplingRefused, EngineUnavailable, BackendError, DeadlineExceeded.
        """
        async with self._post(payload, timeout_s) as response:
            data = payloads.json_or_text(await response.text())
            return payloads.read_answer(
                response.status,
                data,
                model=payload["model"],
                url=self.base_url,
                expected=expected,
            )

    async def stream(
        self, payload: Mapping[str, Any], *, timeout_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        """POST a payload with `stream` set; every choice of every chunk, as it comes.

        Raises:
            As `complete`; nothing was generated only if it raises before the first choice.
        """
        async with self._post(payload, timeout_s) as response:
            if response.status != 200:
                data = payloads.json_or_text(await response.text())
                payloads.read_answer(
                    response.status, data, model=payload["model"], url=self.base_url
                )
            async for raw in response.content:
                data = completions.event_data(raw.decode().strip())
                if data == "[DONE]":
                    return
                if data is not None:
                    payloads.check_model(data.get("model"), payload["model"], self.base_url)
                    for choice in data["choices"]:
                        yield choice
            raise errors.BackendError("the stream ended without [DONE]; look into vLLM's log")

    @asynccontextmanager
    async def _post(
        self, payload: Mapping[str, Any], timeout_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        body = payloads.encoded(payload)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._connect_timeout_s)
        try:
            async with self._open().post(
                self.base_url + _PATH,
                data=body,
                headers=payloads.JSON,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                if 300 <= response.status < 400:
                    location = response.headers.get("location", "")
                    raise errors.EngineUnavailable(
                        payloads.redirected(self.base_url, _PATH, location), replica=self.base_url
                    )
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            wrong = await asyncio.to_thread(tls.what_is_wrong, self.base_url, error)
            raise errors.EngineUnavailable(
                wrong or payloads.unreachable(self.base_url, str(error)), replica=self.base_url
            ) from error
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                f"vLLM at {self.base_url} did not answer within {timeout_s:g} s; raise the timeout of "
                "the request, or lower max_tokens",
                replica=self.base_url,
            ) from error
        except (aiohttp.ClientError, asyncio.IncompleteReadError) as error:
            raise errors.EngineUnavailable(
                f"the connection to {self.base_url} broke ({type(error).__name__}: {error}); look "
                "into the server's log",
                replica=self.base_url,
            ) from error

    async def close(self) -> None:
        """Close the connections; idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
