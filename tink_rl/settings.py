"""Settings of the sampling service: the earlier integration's names and defaults, and ours with `TINK_`.

Every field is an environment variable of the same name in capitals; what is given in code wins over the
environment, which wins over the default. `.env.example` lists them all. A leaf: imports neither torch,
TRL nor vLLM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tink_rl.errors import ConfigError
from tink_rl.loopback import http_url, is_local
from tink_rl.tokens import vllm_api_key
from tink_rl.urls import server_url

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM 0.31 has kernels."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]", "": "127.0.0.1"}
_SHORT = ("base_url", "host", "port", "group_port", "timeout", "enable_lora", "max_loras")


class Settings(BaseSettings):
    """What the sampling client and the worker need to know.

    Example: `Settings.load({"base_url": "http://10.0.0.7:8000", "timeout": 2.0})`
    """

    model_config = SettingsConfigDict(
        env_prefix="", case_sensitive=False, env_ignore_empty=True, extra="forbid", frozen=True
    )

    use_vllm: bool | None = Field(
        default=None,
        description="Sample from a vLLM server. Unset: true, unless USE_MEGATRON=true.",
    )
    vllm_base_url: str = Field(
        default="http://localhost:8000",
        description="URL of the vLLM server. Wins over VLLM_HOST and VLLM_PORT.",
    )
    vllm_host: str = Field(
        default="0.0.0.0",
        description="Host of the vLLM server; 0.0.0.0 is dialled as loopback.",
    )
    vllm_port: int = Field(
        default=8000,
        ge=1,
        le=65535,
        description="Port of the vLLM server; `tink-rl serve` binds it unless --port says otherwise.",
    )
    vllm_group_port: int = Field(
        default=51216,
        ge=0,
        le=65535,
        description="Port of the weight channel; if set, `tink-rl serve` pins it (--channel-port). "
        "Clients need no such setting: the server names its port when they join.",
    )
    vllm_timeout: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="Seconds within which a connection to the vLLM server must open.",
    )
    vllm_enable_lora: bool = Field(
        default=True,
        description="Whether adapters may be registered and sampled. Names that the server itself serves "
        "may be in any case.",
    )
    vllm_max_loras: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Adapters that `tink-rl serve` lets one batch hold (--max-loras). Any number can be "
        "registered.",
    )
    vllm_max_lora_rank: int = Field(
        default=64,
        description="Largest rank that is registered, never above the server's slots; unset, a server with "
        "the plugin decides by them. `tink-rl serve` takes it as --max-lora-rank if set.",
        json_schema_extra={"enum": list(LORA_RANKS)},
    )
    use_megatron: bool = Field(default=False, description="Train with (or sample from) Megatron.")
    megatron_server_url: str = Field(
        default="http://localhost:5000", description="URL of Megatron's text generation server."
    )
    tink_store_dir: Path | None = Field(
        default=None,
        description="Private directory of registered adapters and their registry; unset: "
        "$XDG_DATA_HOME/tink_rl/adapters. Processes that share it share their adapters.",
    )
    tink_adapter_roots: str = Field(
        default="",
        description=f"Directories below which adapters may be registered, separated by {os.pathsep!r}; "
        "empty: anywhere for `tink_rl.vllm_backend`, nowhere over HTTP.",
    )
    tink_max_resident_adapters: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Adapters that are kept on the vLLM server; the least recently used leaves first.",
    )
    tink_base_model: str | None = Field(
        default=None,
        description="Directory of the served base model, where the server's own answer does not name "
        "one that can be read here; adapters are checked against it.",
    )
    tink_allow_unverified_base: bool = Field(
        default=False,
        description="Register adapters even if no base model can be read to check their shapes.",
    )
    tink_token_file: str | None = Field(
        default=None,
        description="File with the token of the vLLM server's control routes; unset: the one that "
        "`tink-rl serve` makes.",
    )
    tink_vllm_api_key_file: str | None = Field(
        default=None, description="File with vLLM's own --api-key, if it has one."
    )
    tink_ca_file: str | None = Field(
        default=None,
        description="PEM file (or OpenSSL's directory) of the authorities to trust for https URLs, beside "
        "the system's or those of SSL_CERT_FILE and SSL_CERT_DIR.",
    )
    tink_request_timeout: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        description="Seconds within which one sample must be answered.",
    )

    @field_validator("vllm_base_url", "megatron_server_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        return server_url(value)

    @field_validator("vllm_max_lora_rank")
    @classmethod
    def _is_rank(cls, value: int) -> int:
        if value not in LORA_RANKS:
            raise ValueError(_one_of(LORA_RANKS))
        return value

    # -- reading ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, config: Settings | Mapping[str, Any] | None = None) -> Settings:
        """Settings from code, the environment and the defaults, in this order of precedence.

        Args:
            config: Names as above in any case, with or without `vllm_` (`{"host": "10.0.0.7"}`).

        Raises:
            ConfigError: names the variable, its value and what is allowed.
        """
        if isinstance(config, Settings):
            return config
        given = {_field_name(key): value for key, value in (config or {}).items()}
        unknown = sorted(set(given) - set(cls.model_fields))
        if unknown:
            names = ", ".join(sorted(cls.model_fields))
            raise ConfigError(f"unknown settings {unknown}; expected some of {names}")
        if {"vllm_host", "vllm_port"} & set(given) and "vllm_base_url" not in given:
            # What code says wins: a VLLM_BASE_URL in the environment must not override its host.
            return cls._checked({**given, "vllm_base_url": cls._checked(given).host_url})
        return cls._checked(given)

    @classmethod
    def _checked(cls, given: Mapping[str, Any]) -> Settings:
        try:
            return cls(**given)
        except ValidationError as error:
            raise refused(cls, error) from error

    # -- what follows -----------------------------------------------------------------------------

    def set_value(self, name: str) -> Any:
        """The value of a field if code or the environment gave one; else None."""
        return getattr(self, name) if name in self.model_fields_set else None

    @property
    def host_url(self) -> str:
        """URL by VLLM_HOST and VLLM_PORT."""
        return http_url(_WILDCARDS.get(self.vllm_host, self.vllm_host), self.vllm_port)

    @property
    def url(self) -> str:
        """Where the vLLM server is dialled."""
        named = {"vllm_host", "vllm_port"} & self.model_fields_set
        if "vllm_base_url" not in self.model_fields_set and named:
            return self.host_url
        return self.vllm_base_url

    @property
    def samples_with(self) -> Literal["vllm", "megatron"]:
        """The backend that answers requests; with both enabled vLLM samples and Megatron trains.

        Raises:
            ConfigError: both are off.
        """
        if self.use_vllm is False and not self.use_megatron:
            raise ConfigError(
                "USE_VLLM=False and USE_MEGATRON=False: nothing can sample; set one of them to true"
            )
        use_vllm = not self.use_megatron if self.use_vllm is None else self.use_vllm
        return "vllm" if use_vllm else "megatron"

    @property
    def shares_machine(self) -> bool:
        """Whether the vLLM server that samples is dialled by a loopback address."""
        return self.samples_with == "vllm" and is_local(self.url)

    @property
    def adapter_roots(self) -> tuple[Path, ...]:
        """The directories of TINK_ADAPTER_ROOTS."""
        return tuple(
            Path(part).expanduser() for part in self.tink_adapter_roots.split(os.pathsep) if part
        )

    def api_key(self) -> str | None:
        """vLLM's own key; without TINK_VLLM_API_KEY_FILE the VLLM_API_KEY of the environment.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        return vllm_api_key(file=self.tink_vllm_api_key_file)


def slot_for(rank: int) -> int | None:
    """The smallest of vLLM's LoRA slots that holds `rank`; None if none does."""
    return next((slot for slot in LORA_RANKS if slot >= rank), None)


def _field_name(key: str) -> str:
    name = key.lower()
    return f"vllm_{name}" if name in _SHORT or name == "max_lora_rank" else name


def _one_of(values: Iterable[Any]) -> str:
    return f"expected one of {', '.join(map(str, values))}"


def refused(model: type[BaseSettings], error: ValidationError) -> ConfigError:
    """Names each variable of `model` that is wrong, its value and what is allowed."""
    return ConfigError("; ".join(_explain(model, item) for item in error.errors()))


def _explain(model: type[BaseSettings], item: Any) -> str:
    name = str(item["loc"][0]).lower() if item["loc"] else "settings"
    shown = repr(item["input"])
    if name.endswith("_url"):
        shown = re.sub(r"^(.).*@", r"\1...@", shown)  # never a password
    prefix = model.model_config["env_prefix"]
    return f"{prefix}{name.upper()}={shown}: {_allowed(model, name, item)}"


def _allowed(model: type[BaseSettings], name: str, item: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    schema = model.model_json_schema()["properties"].get(name, {})
    if "enum" in schema:
        return _one_of(schema["enum"])
    kinds = {schema.get("type")} | {option.get("type") for option in schema.get("anyOf", [])}
    if "boolean" in kinds:
        return "expected true or false"
    if "integer" in kinds or "number" in kinds:
        kind = "a whole number" if "integer" in kinds else "a number"
        above = schema.get("exclusiveMinimum")
        low = f"above {above:g}" if above is not None else f"from {schema.get('minimum')}"
        end = f" to {schema['maximum']:g}" if "maximum" in schema else ""
        return f"expected {kind} {low}{end}"
    return str(item["msg"])
