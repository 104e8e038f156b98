"""The one reader of PEFT directories: config, names, ranks and scaling, checked before a tensor is read.

Only `adapter_config.json`, `adapter_model.safetensors` and, if a run of ours wrote it, `tink_policy.json`
are opened. A pickle never is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl import strict_json
from tink_rl.errors import AdapterConfigInvalid, AdapterFilesInvalid, RankExceeded, ShapeMismatch
from tink_rl.policy.adapter_folder import CONFIG_FILE, open_adapter_folder
from tink_rl.policy.base_copies import check_copies
from tink_rl.policy.foreign import foreign_config, what_a_file_is, what_else_is_there, what_is_there
from tink_rl.policy.paths import SourceDir
from tink_rl.policy.patterns import MAX_MATCHES, Pattern
from tink_rl.policy.shapes import BaseShapes
from tink_rl.policy.support import check_supported
from tink_rl.policy.tensor_file import TensorEntry, TensorFile
from tink_rl.policy.tensor_names import Named, expert_shapes, sort_tensors

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
POLICY_FILE = "tink_policy.json"
"""What a run of ours puts beside an adapter: policy, version, digest, and the base it was trained on."""
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
MAX_CONFIG_BYTES = 8 << 20
"""Holds 50,000 full names in `target_modules`, and as many patterns; our own files keep to it too."""
_ANY_SIZE = 1 << 62
_MAX_POLICY_BYTES = 64 << 10
MAX_FILE_BYTES = 512 << 20
MAX_ALPHA = 1e6
"""Largest lora_alpha: beyond it the adapter is not one that trained."""
_FLOATS = ("F32", "F16", "BF16")
_SMALLER = (
    "register an adapter of lower rank or fewer modules, saved without copies of the base's embedding "
    "(save_embedding_layers=False)"
)
_SHORTER = (
    "name the modules in target_modules, rank_pattern and alpha_pattern by their last part (q_proj) or by "
    "regular expressions"
)


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One adapted module: `LoraModule(name="model.layers.0.self_attn.q_proj", rank=8, scaling=2.0, ...)`"""

    name: str
    """In the base model, without PEFT's prefix."""
    rank: int
    scaling: float
    """What PEFT multiplies B·A with."""
    lora_a: TensorEntry
    """`[R, in]`"""
    lora_b: TensorEntry
    """`[out, R]`"""

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight that it adapts."""
        return self.lora_b.shape[0], self.lora_a.shape[1]


class PeftDir:
    """An open PEFT directory whose config and header were checked."""

    def __init__(
        self,
        config: Mapping[str, Any],
        file: TensorFile,
        where: str,
        base_fingerprint: str | None,
        named: Named,
    ) -> None:
        self.config = config
        self.base_fingerprint = base_fingerprint
        """Of the base that it was trained on; None if the directory does not say."""
        self.where = where
        self._file = file
        self.modules = _pair_up(config, named.modules, where)
        self.rank = max(module.rank for module in self.modules)
        """Largest rank of any module."""
        tensors = [entry for m in self.modules for entry in (m.lora_a, m.lora_b)]
        self.dtype = ", ".join(sorted({entry.dtype for entry in tensors}))

    def read(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[R, in]` and B `[out, R]`, float32, with the scaling folded into B.

        Raises:
            AdapterFilesInvalid: the file was cut meanwhile.
        """
        lora_a = self._file.read(module.lora_a).float()
        return lora_a, self._file.read(module.lora_b).float() * module.scaling

    def check_unchanged(self) -> None:
        """Raise `AdapterFilesInvalid` if the weights were written to while they were read."""
        self._file.check_unchanged()


@contextmanager
def open_peft_dir(
    source: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    max_rank: int | None = None,
    base: BaseShapes | None = None,
    as_written: bool = False,
) -> Iterator[PeftDir]:
    """The PEFT directory `source`, or the one that is meant by it (`open_adapter_folder`), open inside.

    Args:
        source: The caller's path.
        roots: Directories that it must lie under; None trusts the caller.
        max_rank: Largest rank that is taken.
        base: The base, where it is known: tells its own names from a wrapper's, and copies of its
            embedding from trained ones.
        as_written: It is of our own store: names are taken as they are.

    Raises:
        PathNotAllowed, AdapterPathMissing: see `paths.open_source`.
        AdapterConfigInvalid, RankExceeded, UnsupportedAdapter: what the config says.
        AdapterFilesInvalid: there are only pickled weights.
        AdapterFilesInvalid, ShapeMismatch,
            ShapeMismatch: what the weights file is.
        BaseMismatch: an embedding beside the LoRA is larger than the base's.
    """
    with open_adapter_folder(source, roots) as directory:
        config = _read_config(directory, max_rank)
        file = directory.open(WEIGHTS_FILE, MAX_FILE_BYTES, _SMALLER)
        if file is None:
            raise _no_weights(directory)
        with file:
            where = f"{directory.label}/{WEIGHTS_FILE}"
            tensors = TensorFile(file, where)
            known = base.shapes if base is not None else None
            named = sort_tensors(tensors.entries, where, base=known, as_written=as_written)
            if not named.modules:
                raise AdapterFilesInvalid(
                    f"{where} holds no tensor of LoRA; save the adapter again",
                    code="adapter_incomplete",
                )
            check_copies(named.copies, tensors, base.tables if base is not None else None, where)
            yield PeftDir(config, tensors, where, _read_fingerprint(directory), named)


def read_config(source: str | Path) -> dict[str, Any]:
    """The config in the PEFT directory `source` of a trusted caller, of whatever kind of adapter.

    Raises:
        PathNotAllowed, AdapterPathMissing: see `paths.open_source`.
        AdapterConfigInvalid: there is none, or it is none of PEFT's.
    """
    with open_adapter_folder(source, None) as directory:
        return _parse_config(directory)


def read_tensors(source: str | Path) -> dict[str, torch.Tensor]:
    """The tensors in the PEFT directory `source` of a trusted caller, of whatever kind of adapter.

    Raises:
        PathNotAllowed, AdapterPathMissing: see `paths.open_source`.
        AdapterFilesInvalid: there is no whole file of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with open_adapter_folder(source, None) as directory:
        file = directory.open(WEIGHTS_FILE, _ANY_SIZE)
        if file is None:
            raise _no_weights(directory)
        path = directory.path / WEIGHTS_FILE
        with file:
            TensorFile(file, str(path))
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise AdapterFilesInvalid(
                f"{path} cannot be read: {error}; save the adapter again", code="adapter_corrupt"
            ) from error


def _no_weights(directory: SourceDir) -> AdapterFilesInvalid:
    pickled = [name for name in PICKLE_FILES if directory.has(name)]
    if not pickled:
        names = directory.names()
        said = what_is_there(names) or what_else_is_there(names)
        said = said or f"has no {WEIGHTS_FILE}; expected what PEFT's save_pretrained() writes"
        return AdapterFilesInvalid(f"{directory.label} {said}")
    return AdapterFilesInvalid(
        f"{directory.label} has only {pickled[0]}, a pickle, which can run code and is never opened: "
        f"`tink-rl convert {directory.label}` writes {WEIGHTS_FILE} beside it without running any, or "
        "save the adapter again with save_pretrained(..., safe_serialization=True)",
        code="pickle_refused",
    )


# -- the config -----------------------------------------------------------------------------------


def _read_config(directory: SourceDir, max_rank: int | None) -> dict[str, Any]:
    config = _parse_config(directory)
    check_supported(config, where=directory.label)
    _check_numbers(config, f"{directory.label}/{CONFIG_FILE}", max_rank)
    return config


def _parse_config(directory: SourceDir) -> dict[str, Any]:
    where = f"{directory.label}/{CONFIG_FILE}"
    file = directory.open(CONFIG_FILE, MAX_CONFIG_BYTES, _SHORTER)
    if file is None:
        raise AdapterConfigInvalid(
            f"{directory.label} has no {CONFIG_FILE}; expected what PEFT's save_pretrained() writes"
        )
    with file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    config = _json_object(text, where)
    if (foreign := foreign_config(config)) is not None:
        raise AdapterConfigInvalid(f"{where} {foreign}")
    return config


def _read_fingerprint(directory: SourceDir) -> str | None:
    file = directory.open(POLICY_FILE, _MAX_POLICY_BYTES, "remove the file")
    if file is None:
        return None
    where = f"{directory.label}/{POLICY_FILE}"
    with file:
        found = _json_object(file.read(_MAX_POLICY_BYTES + 1), where).get("base_fingerprint")
    if found is not None and not isinstance(found, str):
        raise AdapterConfigInvalid(f"{where}: base_fingerprint is not text; remove the file")
    return found


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that `text` holds; no NaN, no Infinity, no key twice.

    Raises:
        AdapterConfigInvalid: it is not strict JSON, or no object.
    """
    try:
        # utf-8-sig: an editor on Windows puts a mark in front
        found = strict_json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        what = _why_no_json(text, error)
        raise AdapterConfigInvalid(
            f"{where} is not strict JSON: {what[:200]}; save the adapter again"
        ) from None
    if not isinstance(found, dict):
        raise AdapterConfigInvalid(
            f"{where} holds a {type(found).__name__}, expected a JSON object; save the adapter again"
        )
    return found


def _why_no_json(text: bytes, error: Exception) -> str:
    if not text.strip():
        return "it is empty"
    if (known := what_a_file_is(text[:32])) is not None:
        return f"it {known}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not in UTF-8"
    return str(error)


def _check_numbers(config: Mapping[str, Any], where: str, max_rank: int | None) -> None:
    ranks = {"r": config.get("r"), **_entries(config, "rank_pattern", where)}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise AdapterConfigInvalid(
                f"{where}: {_given(name, rank)}, expected a whole number > 0; save it again"
            )
        if max_rank is not None and rank > max_rank:
            raise RankExceeded(
                f"{where}: {name}={_brief(rank)}, at most {max_rank} is served; train with a lower r",
                given=rank,
                expected=max_rank,
            )
    alphas = {"lora_alpha": config.get("lora_alpha"), **_entries(config, "alpha_pattern", where)}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
            raise AdapterConfigInvalid(
                f"{where}: {_given(name, alpha)}, expected a number > 0, at most {MAX_ALPHA:g}; save "
                "it again"
            )
    if type(config.get("use_rslora", False)) not in (bool, type(None)):
        raise AdapterConfigInvalid(f"{where}: use_rslora is not a boolean; save it again")


def _entries(config: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise AdapterConfigInvalid(f"{where}: {field} is not an object; save the adapter again")
    return {f"{field}[{key[:100]!r}]": value for key, value in pattern.items()}


def _given(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name}={_brief(value)}"


def _brief(value: Any) -> str:
    return (
        repr(value)[:60] if not isinstance(value, int) or abs(value) < 10**15 else "a huge number"
    )


# -- the tensors ----------------------------------------------------------------------------------


def _pair_up(
    config: Mapping[str, Any], found: Mapping[str, Mapping[str, TensorEntry]], where: str
) -> list[LoraModule]:
    ranks = Pattern(config, "rank_pattern", config["r"], where)
    alphas = Pattern(config, "alpha_pattern", config["lora_alpha"], where)
    if len(found) * (ranks.cost + alphas.cost) > MAX_MATCHES:
        raise AdapterConfigInvalid(
            f"{where}: too many rank or alpha patterns for {len(found)} modules; name the modules one by "
            "one, without '.*'"
        )
    rslora = bool(config.get("use_rslora"))
    modules = []
    for name, parts in sorted(found.items()):
        rank = ranks.of(name)
        lora_a, lora_b = _checked_pair(name, parts, rank, where)
        scaling = alphas.of(name) / (math.sqrt(rank) if rslora else rank)
        modules.append(
            LoraModule(name=name, rank=rank, scaling=scaling, lora_a=lora_a, lora_b=lora_b)
        )
    return modules


def _checked_pair(
    name: str, parts: Mapping[str, TensorEntry], rank: int, where: str
) -> tuple[TensorEntry, TensorEntry]:
    lora_a, lora_b = parts.get("A"), parts.get("B")
    if lora_a is None or lora_b is None:
        missing = "lora_A" if lora_a is None else "lora_B"
        raise AdapterFilesInvalid(
            f"{where}: {name} lacks {missing}; save the adapter again", code="adapter_incomplete"
        )
    reason = expert_shapes(name, {part: entry.shape for part, entry in parts.items()})
    if reason is not None:
        raise ShapeMismatch(f"{where}: {reason}")
    if not lora_a.shape[0] == lora_b.shape[1] == rank:
        raise AdapterFilesInvalid(
            f"{where}: {name} has A {list(lora_a.shape)} and B {list(lora_b.shape)}, its config says "
            f"rank {rank}, expected A [{rank}, in] and B [out, {rank}]; save it again",
            code="rank_mismatch",
        )
    for entry in (lora_a, lora_b):
        if entry.dtype not in _FLOATS:
            raise ShapeMismatch(
                f"{where}: tensor {entry.name!r} is {entry.dtype}, expected {', '.join(_FLOATS)}; "
                "save the adapter in float32",
                code="dtype_mismatch",
            )
    return lora_a, lora_b
