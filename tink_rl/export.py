"""A trained policy in the Hub's format: the adapter, or the base with the adapter folded in.

Folding is done in fp32 into a temporary, tensor by tensor, and rounded once to the base's dtype; the
base's files are never written to, and one of them at a time is in memory.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl import __version__
from tink_rl.errors import ConfigError, UnknownModules
from tink_rl.policy.adapter import Adapter, check_values, from_peft_dir
from tink_rl.policy.fingerprint import base_fingerprint, checkpoint_index, local_model_dir
from tink_rl.policy.peft_dir import POLICY_FILE
from tink_rl.policy.shapes import check_trained_on

if TYPE_CHECKING:
    import torch

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_WINDOW = 5


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what its card says.

    Example: `Exported(path=Path("out"), merged=False, base="Qwen/Qwen2.5-1.5B", policy="math@200",
    digest="9f..", figures={"held-out accuracy": (0.41, 0.63)})`
    """

    path: Path
    merged: bool
    base: str
    policy: str | None
    """`NAME@VERSION`, where the run's files say it."""
    digest: str | None
    """Of the packet that was published under that name."""
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Before and after training."""


def export(
    source: str | Path, output: str | Path, *, merged: bool = False, base: str | None = None
) -> Exported:
    """Write the policy of `source` to the new directory `output`.

    Args:
        source: A run's output directory, a checkpoint, or a PEFT directory.
        output: Must not exist, or be empty; appears whole or not at all.
        merged: Fold the adapter into the base instead of writing the adapter.
        base: Directory or hub id of the base; None: what the adapter's config names.

    Raises:
        ConfigError: no adapter in `source`, `output` is taken, or the base is not at hand.
        AdapterFilesInvalid, NonFiniteWeights: the adapter's files are damaged.
        UnsupportedAdapter: `merged`, and the adapter is more than a delta of linear layers.
        UnknownModules: `merged`, and the base lacks a module of the adapter.
        BaseMismatch: `merged`, and the run says that it trained on another base.
    """
    run, directory = Path(source), find_adapter(source)
    config = json.loads((directory / _ADAPTER_FILES[0]).read_text())
    base_name = base or str(config.get("base_model_name_or_path") or "")
    if not base_name:
        raise ConfigError(f"{directory} does not name its base; give --base DIRECTORY_OR_HUB_ID")
    target = _free(Path(output))
    policy = _read(directory / POLICY_FILE) or _read(run / POLICY_FILE)
    published = policy.get("digest") is not None
    exported = Exported(
        path=target,
        merged=merged,
        base=base_name,
        policy=f"{policy['policy']}@{policy['version']}" if published else None,
        digest=policy.get("digest"),
        figures=_figures(run, directory),
    )
    with _whole(target) as partial:
        if merged:
            base_dir = local_model_dir(base_name)
            trained_on = policy.get("base_fingerprint")
            check_trained_on(
                trained_on,
                base_fingerprint(base_dir),
                where=str(directory),
                remedy="give the one that it was trained on with --base",
            )
            _write_merged(from_peft_dir(directory), base_dir, partial)
            _copy(base_dir, partial, _TOKENIZER_FILES)
        else:
            _write_adapter(directory, config | {"base_model_name_or_path": base_name}, partial)
        _copy(directory, partial, (*_TOKENIZER_FILES, POLICY_FILE))
        (partial / "README.md").write_text(model_card(exported))
    return exported


def find_adapter(source: str | Path) -> Path:
    """The PEFT directory of `source`: itself, or its newest checkpoint.

    Raises:
        ConfigError: there is none.
    """
    path = Path(source)
    if (path / _ADAPTER_FILES[0]).is_file():
        return path
    found = [p.parent for p in path.glob(f"checkpoint-*/{_ADAPTER_FILES[0]}")]
    if not found:
        raise ConfigError(
            f"{path} holds no adapter_config.json, nor does a checkpoint in it; give the output_dir of "
            "a run, or a PEFT directory"
        )
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _free(target: Path) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output {target} exists and is not empty; give another folder")
    return target


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it if the block ends well, and vanishes if not."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# -- weights ----------------------------------------------------------------------------------------


def _write_adapter(directory: Path, config: dict[str, Any], target: Path) -> None:
    """The adapter's own bytes; also of kinds that cannot be published (DoRA, ...)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / _ADAPTER_FILES[1]
    try:
        check_values(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; save the adapter again") from error
    shutil.copyfile(path, target / path.name)
    (target / _ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_merged(adapter: Adapter, base: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    check_values(adapter.tensors)
    index = checkpoint_index(base)
    unknown = [module for module in adapter.modules if f"{module}.weight" not in index]
    if unknown:
        raise UnknownModules(
            f"the base {base} has no {unknown[0]}.weight ({len(unknown)} of {len(adapter.modules)} "
            "modules are missing); give the --base that the adapter was trained on"
        )
    for file in sorted({entry.file for entry in index.values()}):
        with safe_open(file, framework="pt") as handle:  # type: ignore[no-untyped-call]
            names = [name for name, entry in index.items() if entry.file == file]
            tensors = {name: _folded(adapter, name, handle.get_tensor(name)) for name in names}
            save_file(tensors, target / file.name, metadata=handle.metadata() or {"format": "pt"})
    _copy(base, target, _MODEL_FILES)


def _folded(adapter: Adapter, name: str, weight: torch.Tensor) -> torch.Tensor:
    """W + B·A, accumulated in fp32 and rounded once; `weight` itself where it has no adapter."""
    module = name.removesuffix(".weight")
    lora_a = adapter.tensors.get(f"{module}.lora_A.weight")
    if lora_a is None:
        return weight
    lora_b = adapter.tensors[f"{module}.lora_B.weight"]
    return (weight.float() + lora_b.float() @ lora_a.float()).to(weight.dtype)


# -- the card ---------------------------------------------------------------------------------------


def model_card(exported: Exported) -> str:
    """README.md with the Hub's metadata."""
    from huggingface_hub import ModelCardData

    hub_id = not Path(exported.base).exists()
    data = ModelCardData(
        base_model=exported.base if hub_id else None,
        library_name="transformers" if exported.merged else "peft",
        pipeline_tag="text-generation",
        tags=["lora", "reinforcement-learning", "trl", "tink-rl"],
    )
    base = exported.base if hub_id else f"a local model ({Path(exported.base).name})"
    kind = "Merged model" if exported.merged else "LoRA adapter"
    rows = [("base model", base)]
    rows += [("policy version", exported.policy)] if exported.policy else []
    rows += (
        [("digest (blake3 of the published packet)", exported.digest)] if exported.digest else []
    )
    rows += [
        (name, f"{before:.3f} before, {after:.3f} after training")
        for name, (before, after) in exported.figures.items()
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {kind} trained by reinforcement learning\n\n"
        f"| | |\n|---|---|\n{table}\n\nExported by tink-rl {__version__}. {_how_to_load(exported)}"
    )


def _how_to_load(exported: Exported) -> str:
    if exported.merged:
        code = 'AutoModelForCausalLM.from_pretrained("PATH")'
        names = "from transformers import AutoModelForCausalLM"
    else:
        code = 'AutoPeftModelForCausalLM.from_pretrained("PATH")'
        names = "from peft import AutoPeftModelForCausalLM"
    return f"Load it with:\n\n```python\n{names}\n\nmodel = {code}\n```\n"


def _figures(run: Path, directory: Path) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    summary = _read(run / "summary.json")
    if "heldout_before" in summary and "heldout_after" in summary:
        found["held-out accuracy"] = (summary["heldout_before"], summary["heldout_after"])
    state = _read(directory / "trainer_state.json") or _read(run / "trainer_state.json")
    rewards = [row["reward"] for row in state.get("log_history", []) if "reward" in row]
    if len(rewards) >= 2:
        width = min(_WINDOW, len(rewards) // 2)
        found["training reward"] = (
            statistics.mean(rewards[:width]),
            statistics.mean(rewards[-width:]),
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return data
