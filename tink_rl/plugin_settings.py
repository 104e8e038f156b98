"""What `tink-rl serve` tells the plugin inside vLLM, in the environment: written and read here."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tink_rl.settings import refused

KEEP_IDLE_S = 86400.0
_PREFIX = "TINK_SERVER_"


class PluginSettings(BaseSettings):
    """`TINK_SERVER_*`. Example: `PluginSettings.load(modes="adapter,full", token_file="token")`"""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True)

    modes: str | None = None
    """Sync modes, separated by commas; None: what vLLM's flags allow."""
    launch_id: str | None = None
    """What the launcher knows its own server by."""
    token_file: str | None = None
    """Token of the control routes; without one the server does not start."""
    channel_host: str = "127.0.0.1"
    channel_port: int = Field(default=0, ge=0, le=65535)
    """0 takes any free one."""
    golden_tier: str = "auto"
    golden_budget_gib: float | None = None
    shared: bool = True
    """What the server leaves free of a GPU is the trainer's: golden weights go to host memory then."""
    keep_idle_s: float = Field(default=KEEP_IDLE_S, ge=0)
    """For so long what nobody owns or samples stays served; 0: until something needs its place."""
    waits_asleep: str = ""
    """See `placement.who_waits_asleep`."""

    @classmethod
    def load(cls, **given: Any) -> Self:
        """The settings, from `given` over the environment over the defaults.

        Raises:
            ConfigError: names the variable, its value and what is allowed.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise refused(cls, error) from error

    def as_environment(self) -> dict[str, str]:
        """The variables that say them."""
        named = {f"{_PREFIX}{name.upper()}": value for name, value in self if value is not None}
        return {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in named.items()}
