"""How a worker is set up: `TINK_WORKER_*` in the environment, or `tink-rl worker` flags."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tink_rl.errors import ConfigError
from tink_rl.loopback import is_loopback
from tink_rl.settings import refused


class WorkerOptions(BaseSettings):
    """Where a worker listens, whom it lets in and how much it takes on.

    Example: `WorkerOptions(port=8001, max_queued=256)`; `TINK_WORKER_PORT=8001` says the same.
    """

    model_config = SettingsConfigDict(
        env_prefix="TINK_WORKER_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,  # they are the help of `tink-rl worker`, too
    )

    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs a token for sampling."""
    port: int = Field(default=8001, ge=0, le=65535)
    """Port to listen on; 0 takes any free one."""
    sample_token_file: str | None = None
    """File with the token for sampling, made (mode 0600) if missing; unset: none, on a loopback address."""
    admin_token_file: str | None = None
    """File with the token for registering and metrics; unset: the one that `tink-rl serve` makes."""
    max_running: int = Field(default=128, ge=1, le=2048)
    """Sequences (prompts x n) that the backend works on at once."""
    max_queued: int = Field(default=256, ge=1, le=4096)
    """Requests that wait for their turn; the next one gets 429."""
    timeout_s: float = Field(default=300.0, gt=0, le=86_400)
    """Deadline of a request that names none."""
    drain_s: float = Field(default=20.0, ge=0, le=3600)
    """What running requests get to finish when the worker is asked to stop."""
    replay_s: float = Field(default=600.0, ge=0, le=86_400)
    """How long the answer of a request with a `request_id` is kept for a retry."""
    ledger: str | None = None
    """File to which every admitted request and its end are appended, one JSON object a line."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def max_waiting(self) -> int:
        """Requests that may hold a connection open: all that run and queue, and some that join them."""
        return self.max_running + self.max_queued + 16

    @property
    def num_threads(self) -> int:
        """Threads of the HTTP server: more than can wait, so that nothing waits in front of the queue."""
        return self.max_waiting + 16


def load_options(**given: Any) -> WorkerOptions:
    """The options, from `given` (None: not given) over the environment over the defaults.

    Raises:
        ConfigError: names the variable, the value and what is allowed.
    """
    try:
        options = WorkerOptions(**{k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        raise refused(WorkerOptions, error) from error
    if not options.is_loopback and options.sample_token_file is None:
        raise ConfigError(
            f"--host {options.host} is reachable from other machines and sampling has no token: give "
            "--sample-token-file FILE (made if it does not exist), or listen on 127.0.0.1"
        )
    return options
