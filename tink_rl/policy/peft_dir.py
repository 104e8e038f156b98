"""The one reader of PEFT directories: config, names, ranks and scaling, checked before a tensor is read.

Only `adapter_config.json`, `adapter_model.safetensors` and, if a run of ours wrote it, `tink_policy.json`
are opened. A pickle never is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink_rl.errors import (
    AdapterConfigInvalid,
    AdapterCorrupt,
    AdapterFilesInvalid,
    AdapterIncomplete,
    DtypeMismatch,
    PickleRefused,
    RankExceeded,
    RankMismatch,
    ShapeMismatch,
    UnsupportedAdapter,
)
from tink_rl.policy.paths import SourceDir, open_source
from tink_rl.policy.support import check_supported
from tink_rl.policy.tensor_file import TensorEntry, TensorFile, unique_pairs

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
POLICY_FILE = "tink_policy.json"
"""What a run of ours puts beside an adapter: policy, version, digest, and the base it was trained on."""
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."
"""What PEFT puts before the base model's own module names."""
MAX_CONFIG_BYTES = 64 << 10
MAX_FILE_BYTES = 512 << 20
MAX_ALPHA = 1e6
"""Largest lora_alpha: beyond it the adapter is not one that trained."""
MAX_NAME_LENGTH = 256
_MAX_MATCHES = 1_000_000
_FLOATS = ("F32", "F16", "BF16")
_PARTS = (".lora_A.weight", ".lora_B.weight")
_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


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
        self, config: Mapping[str, Any], file: TensorFile, where: str, base_fingerprint: str | None
    ) -> None:
        self.config = config
        self.base_fingerprint = base_fingerprint
        """Of the base that it was trained on; None if the directory does not say."""
        self.where = where
        self._file = file
        self.modules = _pair_up(config, file.entries, where)
        self.rank = max(module.rank for module in self.modules)
        """Largest rank of any module."""
        self.dtype = ", ".join(sorted({entry.dtype for entry in file.entries}))

    def read(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[R, in]` and B `[out, R]`, float32, with the scaling folded into B.

        Raises:
            AdapterCorrupt: the file was cut meanwhile.
        """
        lora_a = self._file.read(module.lora_a).float()
        return lora_a, self._file.read(module.lora_b).float() * module.scaling

    def check_unchanged(self) -> None:
        """Raise `AdapterCorrupt` if the weights were written to while they were read."""
        self._file.check_unchanged()


@contextmanager
def open_peft_dir(
    source: str | Path, *, roots: Sequence[Path] | None = None, max_rank: int | None = None
) -> Iterator[PeftDir]:
    """The PEFT directory `source`, open inside the block.

    Raises:
        PathNotAllowed, AdapterPathMissing: see `paths.open_source`.
        AdapterConfigInvalid, RankExceeded, UnsupportedAdapter: what the config says.
        PickleRefused: there are only pickled weights.
        AdapterCorrupt, AdapterIncomplete, AdapterTooLarge, RankMismatch, ShapeMismatch,
            DtypeMismatch: what the weights file is.
    """
    with open_source(source, roots) as directory:
        config = _read_config(directory, max_rank)
        check_supported(config, where=directory.label)
        file = directory.open(WEIGHTS_FILE, MAX_FILE_BYTES)
        if file is None:
            raise _no_weights(directory)
        with file:
            where = f"{directory.label}/{WEIGHTS_FILE}"
            yield PeftDir(config, TensorFile(file, where), where, _read_fingerprint(directory))


def _no_weights(directory: SourceDir) -> AdapterFilesInvalid:
    pickled = [name for name in PICKLE_FILES if directory.has(name)]
    if not pickled:
        return AdapterFilesInvalid(
            f"{directory.label} has no {WEIGHTS_FILE}; expected what PEFT's save_pretrained() writes"
        )
    return PickleRefused(
        f"{directory.label} has only {pickled[0]}, a pickle, which can run code and is never opened: "
        f"`tink-rl convert {directory.label}` writes {WEIGHTS_FILE} beside it without running any, or "
        "save the adapter again with save_pretrained(..., safe_serialization=True)"
    )


# -- the config -----------------------------------------------------------------------------------


def _read_config(directory: SourceDir, max_rank: int | None) -> dict[str, Any]:
    where = f"{directory.label}/{CONFIG_FILE}"
    file = directory.open(CONFIG_FILE, MAX_CONFIG_BYTES)
    if file is None:
        raise AdapterConfigInvalid(
            f"{directory.label} has no {CONFIG_FILE}; expected what PEFT's save_pretrained() writes"
        )
    with file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    config = strict_json(text, where)
    _check_numbers(config, where, max_rank)
    return config


def _read_fingerprint(directory: SourceDir) -> str | None:
    file = directory.open(POLICY_FILE, MAX_CONFIG_BYTES)
    if file is None:
        return None
    where = f"{directory.label}/{POLICY_FILE}"
    with file:
        found = strict_json(file.read(MAX_CONFIG_BYTES + 1), where).get("base_fingerprint")
    if found is not None and not isinstance(found, str):
        raise AdapterConfigInvalid(f"{where}: base_fingerprint is no text; remove the file")
    return found


def strict_json(text: bytes, where: str) -> dict[str, Any]:
    """The object that `text` holds; no NaN, no Infinity, no key twice.

    Raises:
        AdapterConfigInvalid: it is not strict JSON, or no object.
    """
    try:
        found = json.loads(
            text.decode(), parse_constant=_refuse_constant, object_pairs_hook=unique_pairs
        )
    except (ValueError, RecursionError) as error:
        what = str(error) if type(error) is ValueError else "malformed"
        raise AdapterConfigInvalid(
            f"{where} is not strict JSON: {what[:100]}; save the adapter again"
        ) from None
    if not isinstance(found, dict):
        raise AdapterConfigInvalid(
            f"{where} holds a {type(found).__name__}, expected a JSON object; save the adapter again"
        )
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _check_numbers(config: Mapping[str, Any], where: str, max_rank: int | None) -> None:
    ranks = {"r": config.get("r"), **_entries(config, "rank_pattern", where)}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise AdapterConfigInvalid(
                f"{where}: {name}={_brief(rank)}, expected a whole number > 0; save it again"
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
                f"{where}: {name}={_brief(alpha)}, expected a number > 0, at most {MAX_ALPHA:g}; save "
                "it again"
            )
    if type(config.get("use_rslora", False)) not in (bool, type(None)):
        raise AdapterConfigInvalid(f"{where}: use_rslora is no boolean; save it again")


def _entries(config: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise AdapterConfigInvalid(f"{where}: {field} is no object; save the adapter again")
    return {f"{field}[{key[:100]!r}]": value for key, value in pattern.items()}


def _brief(value: Any) -> str:
    return (
        repr(value)[:60] if not isinstance(value, int) or abs(value) < 10**15 else "a huge number"
    )


class _Pattern:
    """`rank_pattern` or `alpha_pattern`: a value per module, where it differs from the default."""

    def __init__(self, config: Mapping[str, Any], field: str, default: Any, where: str) -> None:
        self._default = default
        entries = config.get(field) or {}
        self._values = [(_compiled(key, field, where), value) for key, value in entries.items()]

    @property
    def cost(self) -> int:
        """Work of one lookup, about; a repetition tries every place of the name."""
        return sum(100 if ".*" in key.pattern[7:] else 1 for key, _ in self._values)

    def of(self, module: str) -> Any:
        """The value of `module`."""
        for key, value in self._values:
            if key.match(module):
                return value
        return self._default


def _compiled(key: str, field: str, where: str) -> re.Pattern[str]:
    # A repetition in a stranger's regular expression can take hours to match.
    if re.search(r"[*+?{(]", key.replace(".*", "", 1)) is None and len(key) <= 500:
        with suppress(re.error):
            # PEFT's own matching (peft.utils.other.get_pattern_key): a regex suffix of the name.
            return re.compile(rf"(.*\.)?({key})$")
    raise AdapterConfigInvalid(
        f"{where}: {field} has the key {_brief(key)}; expected a module name such as q_proj or "
        "layers.1.mlp.up_proj, with at most one '.*'; name the modules one by one"
    )


# -- the tensors ----------------------------------------------------------------------------------


def _pair_up(
    config: Mapping[str, Any], entries: Sequence[TensorEntry], where: str
) -> list[LoraModule]:
    if not entries:
        raise AdapterIncomplete(f"{where} holds no tensor; save the adapter again")
    found: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        module, part = _split(entry, where)
        if part in found.setdefault(module, {}):
            raise AdapterCorrupt(f"{where} holds {module}{part} twice; save the adapter again")
        found[module][part] = entry
    ranks = _Pattern(config, "rank_pattern", config["r"], where)
    alphas = _Pattern(config, "alpha_pattern", config["lora_alpha"], where)
    if len(found) * (ranks.cost + alphas.cost) > _MAX_MATCHES:
        raise AdapterConfigInvalid(
            f"{where}: too many rank or alpha patterns for {len(found)} modules; name fewer"
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


def _split(entry: TensorEntry, where: str) -> tuple[str, str]:
    short = entry.name.removeprefix(PREFIX)
    part = next((part for part in _PARTS if short.endswith(part)), None)
    module = short.removesuffix(part) if part else short
    last = module.rpartition(".")[2]
    if len(entry.name) > MAX_NAME_LENGTH:
        raise UnsupportedAdapter(
            f"{where}: a tensor's name has {len(entry.name)} characters; at most {MAX_NAME_LENGTH}"
        )
    if part is None or not module or last in _HEADS + _EMBEDDINGS:
        raise UnsupportedAdapter(
            f"{where}: tensor {entry.name!r} is no LoRA of a linear layer; leave embeddings and "
            "heads out of target_modules, and set modules_to_save=None"
        )
    if entry.dtype not in _FLOATS:
        raise DtypeMismatch(
            f"{where}: tensor {entry.name!r} is {entry.dtype}, expected {', '.join(_FLOATS)}; "
            "save the adapter in float32"
        )
    return module, part


def _checked_pair(
    name: str, parts: Mapping[str, TensorEntry], rank: int, where: str
) -> tuple[TensorEntry, TensorEntry]:
    lora_a, lora_b = (parts.get(part) for part in _PARTS)
    if lora_a is None or lora_b is None:
        raise AdapterIncomplete(f"{where}: {name} lacks lora_A or lora_B; save it again")
    if len(lora_a.shape) != 2 or len(lora_b.shape) != 2 or not all(lora_a.shape + lora_b.shape):
        raise ShapeMismatch(
            f"{where}: {name} has A {list(lora_a.shape)} and B {list(lora_b.shape)}, expected two "
            "matrices; save it again"
        )
    if not lora_a.shape[0] == lora_b.shape[1] == rank:
        raise RankMismatch(
            f"{where}: {name} has A {list(lora_a.shape)} and B {list(lora_b.shape)}, its config says "
            f"rank {rank}; save it again"
        )
    return lora_a, lora_b
