"""A trained policy in the Hub's format: the adapter, or the base with the adapter folded in.

Folding is done in fp32 into a temporary, tensor by tensor, and rounded once to the base's dtype; the
base's files are never written to, and one of them at a time is in memory, where PEFT's own merge would
hold the whole base: in fp32 28 GB for one of 7B, beside files of 5 GB. What is more than a delta of linear
layers is merged by PEFT's arithmetic, for which the base is loaded as a model as well, in its own dtype.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl import __version__
from tink_rl.errors import (
    AdapterConfigInvalid,
    AdapterPathMissing,
    ConfigError,
    PathNotAllowed,
    UnknownModules,
    UnsupportedAdapter,
)
from tink_rl.policy import adapter_folder
from tink_rl.policy.adapter import Adapter, check_values, from_peft_dir
from tink_rl.policy.fingerprint import (
    CheckpointTensor,
    base_fingerprint,
    checkpoint_index,
)
from tink_rl.policy.full import full_source
from tink_rl.policy.model_dir import local_model_dir
from tink_rl.policy.peft_dir import POLICY_FILE, read_config, read_tensors
from tink_rl.policy.shapes import BaseShapes, check_trained_on
from tink_rl.policy.support import changes_base, needs, unsupported_reasons
from tink_rl.policy.tensor_names import adapts_table, renamed

if TYPE_CHECKING:
    import torch

    Fold = Callable[[torch.Tensor], torch.Tensor]
    """From a tensor of the base to the merged one, in any dtype not below the base's."""

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
    source: str | Path,
    output: str | Path,
    *,
    merged: bool = False,
    base: str | None = None,
    revision: str | None = None,
) -> Exported:
    """Write the policy of `source` to the new directory `output`.

    Args:
        source: A run's output directory, a checkpoint, or a PEFT directory.
        output: Must not exist, or be empty; appears whole or not at all.
        merged: Fold the adapter into the base instead of writing the adapter.
        base: Directory or hub id of the base; None: what the adapter's config names.
        revision: Branch, tag or commit of a hub id; None: what the run trained on, where it says.

    Raises:
        ConfigError: no adapter in `source`, `output` is taken, or the base is not at hand.
        AdapterFilesInvalid, NonFiniteWeights: the adapter's files are damaged.
        UnsupportedAdapter: `merged`, and nothing can express the adapter, or its initialisation changed
            the base and its files do not say how.
        UnknownModules: `merged`, and the base lacks a module of the adapter.
        BaseMismatch: `merged`, and the run says that it trained on another base.
    """
    directory = find_adapter(source)
    run = Path(source).expanduser()
    if not run.is_dir():  # a hub id, or a file of the directory
        run = directory
    config = read_config(directory)
    base_name = base or str(config.get("base_model_name_or_path") or "")
    if not base_name:
        raise ConfigError(f"{directory} does not name its base; give --base DIRECTORY_OR_HUB_ID")
    target = _free(Path(output))
    places = _places(run, directory)
    policy = next(filter(None, (_read(place / POLICY_FILE) for place in places)), {})
    published = policy.get("digest") is not None
    exported = Exported(
        path=target,
        merged=merged,
        base=base_name,
        policy=f"{policy['policy']}@{policy['version']}" if published else None,
        digest=policy.get("digest"),
        figures=_figures(run, places),
    )
    with _whole(target) as partial:
        if merged:
            base_dir = _base_dir(base_name, revision, {**config, **policy} if base is None else {})
            trained_on = policy.get("base_fingerprint")
            check_trained_on(
                trained_on,
                base_fingerprint(base_dir),
                where=str(directory),
                remedy="give the one that it was trained on with --base",
            )
            _write_merged(_folds(directory, config, base_dir), base_dir, partial)
            _copy(base_dir, partial, _TOKENIZER_FILES)
        else:
            _write_adapter(directory, config | {"base_model_name_or_path": base_name}, partial)
        for place in reversed(places):
            _copy(place, partial, (*_TOKENIZER_FILES, POLICY_FILE))
        (partial / "README.md").write_text(model_card(exported))
    return exported


def _base_dir(name: str, revision: str | None, said: Mapping[str, Any]) -> Path:
    pinned = revision or said.get("base_revision") or said.get("revision")
    subfolder = str(said.get("base_subfolder") or "")
    return local_model_dir(name, revision=pinned, subfolder=subfolder)


def find_adapter(source: str | Path) -> Path:
    """The PEFT directory of `source`: itself, a named adapter's in it, or its newest checkpoint's.

    Raises:
        ConfigError: there is none, or there are several.
    """
    try:
        return adapter_folder.find_adapter(source)
    except (AdapterConfigInvalid, AdapterPathMissing, PathNotAllowed) as error:
        raise ConfigError(error.message) from error


def _places(run: Path, directory: Path) -> list[Path]:
    """Where a run's files about its adapter may lie, the nearest first."""
    between = [directory.parent] if run in directory.parents else []
    return list(dict.fromkeys([directory, *between, run]))


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
    """The adapter's own tensors under PEFT's names; also of kinds that cannot be published (DoRA, ...)."""
    tensors = _checked_tensors(directory)
    names = {name: renamed(name) for name in tensors}
    if len(set(names.values())) < len(names):
        raise UnsupportedAdapter(
            f"{directory} holds the tensors of several adapters in one file; save one of them alone, with "
            "save_pretrained(DIR, selected_adapters=[NAME])"
        )
    if all(old == new for old, new in names.items()):
        shutil.copyfile(directory / _ADAPTER_FILES[1], target / _ADAPTER_FILES[1])
    else:  # as they are, PEFT and vLLM would load none of them, and say nothing
        from safetensors.torch import save_file

        cleaned = {new: tensors[old] for old, new in names.items()}
        save_file(cleaned, target / _ADAPTER_FILES[1], metadata={"format": "pt"})
    (target / _ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _checked_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors = read_tensors(directory)
    if not tensors:
        raise ConfigError(
            f"{directory / _ADAPTER_FILES[1]} holds no tensor; save the adapter again"
        )
    check_values(tensors)
    return tensors


def _write_merged(folds: Mapping[str, Fold], base: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    index = checkpoint_index(base)
    for file in sorted({entry.file for entry in index.values()}):
        with safe_open(file, framework="pt") as handle:
            tensors = {
                name: _folded(folds.get(name), handle.get_tensor(name))
                for name, entry in index.items()
                if entry.file == file
            }
            save_file(tensors, target / file.name, metadata=handle.metadata() or {"format": "pt"})
    _copy(base, target, _MODEL_FILES)


def _folded(fold: Fold | None, weight: torch.Tensor) -> torch.Tensor:
    """Rounded once to the base's dtype, in memory of its own; `weight` itself without a fold."""
    if fold is None:
        return weight
    return fold(weight).to(weight.dtype, copy=True).contiguous()


def _folds(directory: Path, config: Mapping[str, Any], base: Path) -> dict[str, Fold]:
    """What becomes of each tensor of the base that the adapter changes.

    Raises:
        UnsupportedAdapter: nothing can express it, or its files alone say something else.
        UnknownModules: the base lacks a module of the adapter.
    """
    index = checkpoint_index(base)
    if not unsupported_reasons(config):
        try:
            adapter = from_peft_dir(directory, base=BaseShapes.from_model_dir(base))
            return _folds_of_delta(adapter, base, index)
        except UnsupportedAdapter:  # LoRA of an embedding or a head, which only its tensors tell
            if not any(adapts_table(name) for name in _checked_tensors(directory)):
                raise
    reasons = list(needs(config).refused)
    if changes_base(config):
        reasons.append(
            f"init_lora_weights={config['init_lora_weights']!r} changed the base weights, so A and B alone "
            "are wrong: save it again from the trainer's model with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge that model "
            "with merge_and_unload()"
        )
    if reasons:
        raise UnsupportedAdapter(f"{directory} cannot be merged: {'; '.join(reasons)}")
    return _folds_of_peft(directory, base, index)


def _folds_of_delta(
    adapter: Adapter, base: Path, index: Mapping[str, CheckpointTensor]
) -> dict[str, Fold]:
    check_values(adapter.tensors)
    unknown = [module for module in adapter.modules if f"{module}.weight" not in index]
    if unknown:
        raise UnknownModules(
            f"the base {base} has no {unknown[0]}.weight ({len(unknown)} of {len(adapter.modules)} "
            "modules are missing); give the --base that the adapter was trained on"
        )

    def fold(module: str) -> Fold:
        lora_a, lora_b = (adapter.tensors[f"{module}.lora_{part}.weight"] for part in "AB")
        return lambda weight: weight.float() + lora_b.float() @ lora_a.float()

    return {f"{module}.weight": fold(module) for module in adapter.modules}


def _folds_of_peft(
    directory: Path, base: Path, index: Mapping[str, CheckpointTensor]
) -> dict[str, Fold]:
    """Whole tensors, as a publish in full mode sends them: merged in fp32, one module at a time."""
    _checked_tensors(directory)
    entries = full_source(_load(directory, base), [[name] for name in index]).entries or []

    def fold(make: Callable[[], torch.Tensor]) -> Fold:
        return lambda _: make()

    return {entry.name: fold(entry.make) for entry in entries}


def _load(directory: Path, base: Path) -> Any:
    """The base in its own dtype with the adapter on it, on the CPU.

    Raises:
        UnknownModules: the adapter does not fit this base.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    # Trainable: that is how a publish knows which biases beside the adapted layers were trained.
    how = {"is_trainable": True, "torch_device": "cpu"}
    try:
        peft_model = PeftModel.from_pretrained(model, str(directory), **how)
        # The same again, for what the first one keeps to itself.
        loaded = peft_model.load_adapter(str(directory), "default", **how)
        lost = [*loaded.unexpected_keys, *loaded.missing_keys]
    except (KeyError, RuntimeError, ValueError) as error:
        lost = [str(error)]
    if lost:
        raise UnknownModules(
            f"{directory} does not fit the base {base} ({len(lost)} misfits, first {lost[0]!r}); give the "
            "--base that it was trained on"
        )
    return peft_model.eval()


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


def _figures(run: Path, places: Sequence[Path]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    summary = _read(run / "summary.json")
    if "heldout_before" in summary and "heldout_after" in summary:
        found["held-out accuracy"] = (summary["heldout_before"], summary["heldout_after"])
    states = (_read(place / "trainer_state.json") for place in places)
    state = next(filter(None, states), {})
    rewards = [row["reward"] for row in state.get("log_history", []) if "reward" in row]
    if len(rewards) >= 2:
        width = min(_WINDOW, len(rewards) // 2)
        found["training reward"] = (
            statistics.mean(rewards[:width]),
            statistics.mean(rewards[-width:]),
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy it again, or remove it") from error
    return data
