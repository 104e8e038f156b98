"""A base model from the Hub, before vLLM is started: with its progress shown, and nothing timing it.

vLLM would download in silence, and inside the time that it is given to start.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

from tink_rl.errors import LaunchFailed

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
# Other formats of the same weights: `original/`, `onnx/`, and Mistral's own file beside the shards.
_UNWANTED = ("*/*", "consolidated*")
_GIB = 2**30

Report = Callable[[str], None]


def is_from_hub(environment: Mapping[str, str]) -> bool:
    """Whether a model id is downloaded from the Hugging Face Hub, not from elsewhere and not at all."""
    yes = ("1", "true", "yes", "on")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE")
    return not any(environment.get(name, "").lower() in yes for name in names)


def download(
    model: str, *, report: Report, revision: str | None = None, cache_dir: str | None = None
) -> None:
    """Fetch what is missing of config, tokenizer and safetensors; goes on where a download stopped.

    Args:
        model: A hub id.
        report: Called with a text such as "downloading: 45 % of 2.9 GiB".
        revision: Branch, tag or commit; None: the default branch.
        cache_dir: Instead of the Hub's cache, as vLLM's --download-dir.

    Raises:
        LaunchFailed: no such model, not for this account, neither cached nor reachable, or the
            download broke off.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        snapshot_download(
            model,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            tqdm_class=_bar(report),
        )
    except GatedRepoError as error:
        raise LaunchFailed(
            f"model {model!r} is gated: accept its licence at https://huggingface.co/{model} and log in "
            "with `hf auth login` (or set HF_TOKEN)",
            code="model_not_found",
        ) from error
    except RevisionNotFoundError as error:
        raise LaunchFailed(
            f"model {model!r} has no revision {revision!r}; expected a branch, tag or commit of it",
            code="model_not_found",
        ) from error
    except RepositoryNotFoundError as error:
        raise LaunchFailed(
            f"model {model!r} is neither a directory nor a model of the Hub that you may read; check the "
            "spelling, or log in with `hf auth login` (or set HF_TOKEN)",
            code="model_not_found",
        ) from error
    except LocalEntryNotFoundError as error:
        raise LaunchFailed(
            f"model {model!r} is not in the local hub cache, and the Hub cannot be reached; check the "
            "network, or give a model directory",
            code="model_not_found",
        ) from error
    except (OSError, httpx.HTTPError) as error:
        raise LaunchFailed(
            f"downloading {model!r} broke off: {error}; start again, it goes on where it stopped "
            f"(it goes to {cache_dir or os.environ.get('HF_HOME') or '~/.cache/huggingface'})"
        ) from error


def _bar(report: Report) -> type[Any]:
    """A class of progress bars that report what is on the disk instead of drawing."""
    from tqdm import tqdm

    class Bar(tqdm):
        knows_bytes = False

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "file": io.StringIO(), "leave": False})

        def display(self, *_: Any, **__: Any) -> None:
            # One bar counts files; of the two of bytes, what came through the wire may be less than what
            # is written (the Hub leaves out what is there already), so it is not a share of anything.
            if self.unit == "B" and self.desc.startswith("Reconstruct"):
                if self.total and self.n:
                    Bar.knows_bytes = True
                    share = min(100, 100 * self.n // self.total)
                    report(f"downloading: {share:.0f} % of {self.total / _GIB:.2f} GiB")
            elif self.unit == "it" and self.total and not Bar.knows_bytes:
                report(f"downloading: {self.n} of {self.total} files")

    return Bar
