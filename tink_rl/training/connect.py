"""From a trainer to its link: which servers, which clients, which model."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tink_rl.config import SyncConfig
from tink_rl.errors import ConfigError
from tink_rl.loopback import http_url
from tink_rl.policy.model_dir import loaded_from
from tink_rl.policy.peft_names import PeftModel
from tink_rl.publish.vllm_client import VLLMClient
from tink_rl.training import live
from tink_rl.training.policy_publisher import PolicyPublisher
from tink_rl.training.probe import Prober
from tink_rl.training.publishing import leaving_checkpoint
from tink_rl.training.ranks import Ranks
from tink_rl.training.saving import whole_or_none
from tink_rl.training.trl_names import Arguments, Trainer

logger = logging.getLogger("tink_rl")
Servers = str | VLLMClient | list[str | VLLMClient] | None
"""URL(s) or client(s); None: `SyncConfig.servers`, else TRL's `vllm_server_*` arguments."""


def clients_of(servers: Servers, sync: SyncConfig, args: Arguments) -> list[VLLMClient]:
    """A client per server; waits `args.vllm_server_timeout` (where the trainer has that) for each.

    Raises:
        ServerUnreachable: one did not answer in that time.
        ConfigError: there is no token for the control routes.
    """
    _be_heard()
    given = [servers] if isinstance(servers, (str, VLLMClient)) else list(servers or sync.servers)
    if not given:
        given = [_url_of(args)]
    return [
        server
        if isinstance(server, VLLMClient)
        else VLLMClient(
            server,
            token=sync.read_token(),
            api_key=sync.read_api_key(),
            ca_file=sync.ca_file,
            request_timeout_s=sync.request_timeout_s,
            connection_timeout=getattr(args, "vllm_server_timeout", 0.0),
        )
        for server in given
    ]


def _be_heard() -> None:
    """Show what is waited for and which mode was taken, where nobody has set up logging."""
    if logger.level == logging.NOTSET and not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tink_rl: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _url_of(args: Arguments) -> str:
    given = getattr(args, "vllm_server_base_url", None)
    host, port = (getattr(args, f"vllm_server_{name}", None) for name in ("host", "port"))
    if not given and host and ("/" in host or (re.search(r":\d+$", host) and host.count(":") == 1)):
        raise ConfigError(
            f"vllm_server_host={host!r}: expected a host alone; give a URL with vllm_server_base_url"
        )
    return given or http_url(host or "127.0.0.1", port or 8000)


def link_to(trainer: Trainer, clients: list[VLLMClient], sync: SyncConfig) -> PolicyPublisher:
    """The link of a trainer's model to `clients`, also kept as `trainer.policy_link`.

    When `trainer.train` fails, the link gives lease and model back, so that both can be used again; with
    several processes, what fails on one fails on all with the same error.

    Raises:
        UnsupportedAdapter: the adapter cannot be published.
        SecondPublisher: this model is published already.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    ranks = Ranks(
        trainer.accelerator.process_index,
        trainer.accelerator.num_processes,
        timeout_s=float(getattr(trainer.args, "ddp_timeout", 1800)),
    )
    vocab_size = model.config.get_text_config().vocab_size
    link = PolicyPublisher(
        model,
        trainer.accelerator,
        clients=clients,
        config=sync,
        base_model=_base_of(model, trainer.args),
        prober=Prober(model, vocab_size=vocab_size, ranks=ranks),
        ranks=ranks,
        tokenizer=getattr(trainer, "processing_class", None),
    )
    trainer.policy_link = link
    live.keep_offline_without_login(trainer.args)
    trainer.train = _closing_on_error(trainer, link)
    trainer._save_checkpoint = whole_or_none(trainer)
    return link


def _base_of(model: PeftModel, args: Arguments) -> str:
    if not hasattr(model, "get_base_model"):
        return ""
    return loaded_from(model.get_base_model(), getattr(args, "model_init_kwargs", None))


def _closing_on_error(trainer: Trainer, link: PolicyPublisher) -> Callable[..., Any]:
    train = trainer.train

    @functools.wraps(train)
    def closing(*args: object, **kwargs: object) -> Any:
        given = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        link.resumed_from = Path(given) if isinstance(given, (str, os.PathLike)) else None
        link.is_training = True
        try:
            with link.ranks.failing_together(), leaving_checkpoint(trainer, link):
                return train(*args, **kwargs)
        except BaseException:  # an interrupted notebook cell too
            link.close()
            raise
        finally:
            link.is_training = False

    return closing
