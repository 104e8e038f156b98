"""Which linear modules a base model has, and of which shapes: what an adapter must fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tink_rl.errors import BaseMismatch, ConfigError, UnknownModules
from tink_rl.policy.fingerprint import CheckpointTensor, base_fingerprint, checkpoint_index
from tink_rl.policy.model_dir import local_model_dir

_NOT_ADAPTED = ("lm_head", "embed_out", "embed_tokens", "wte", "wpe", "embed_in")
# A packed (4-bit, GPTQ, AWQ) weight does not say the shape of the matrix that it stands for.
_PLAIN = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# Models of text and images are saved under the first prefix and live in transformers under the second,
# which is what PEFT writes; vLLM takes both.
_SAVED_TEXT, _LIVE_TEXT = "language_model.model.", "model.language_model."


def check_trained_on(
    trained_on: str | None,
    served: str,
    *,
    where: str,
    remedy: str = "serve the base that it was trained on",
) -> None:
    """Raise if the adapter `where` says that it was trained on another base than `served`.

    Raises:
        BaseMismatch: by the fingerprints.
    """
    if trained_on not in (None, served):
        raise BaseMismatch(
            f"{where}: the adapter was trained on base {str(trained_on)[:12]}, the base here is "
            f"{served[:12]}; {remedy}",
            given=str(trained_on)[:64],
            expected=served,
        )


def vocab_size(model: str | Path | None) -> int | None:
    """Size of the vocabulary by the `config.json` of `model`, a directory or a cached hub id.

    None if it cannot be read.
    """
    if model is None:
        return None
    try:
        config = json.loads((local_model_dir(model) / "config.json").read_text())
    except (ConfigError, OSError, ValueError):
        return None
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return found if type(found) is int else None


@dataclass(frozen=True, kw_only=True)
class BaseShapes:
    """`BaseShapes(name="my-base", shapes={"model.layers.0.self_attn.q_proj": (128, 128), ...})`"""

    name: str
    """What error texts call the base."""
    shapes: Mapping[str, tuple[int, int] | None]
    """Module -> `(out, in)`; None where the checkpoint is packed and does not say."""
    tables: Mapping[str, CheckpointTensor] = field(default_factory=dict)
    """Embeddings and heads, by name."""
    fingerprint: str | None = None
    """See `fingerprint.base_fingerprint`; None: not known, or packed."""

    @classmethod
    def from_model_dir(cls, model: str | Path) -> BaseShapes:
        """Read from the headers of the checkpoint of `model`, a directory or a cached hub id.

        Raises:
            ConfigError: there is no readable safetensors checkpoint.
        """
        shapes: dict[str, tuple[int, int] | None] = {}
        tables: dict[str, CheckpointTensor] = {}
        for name, entry in checkpoint_index(model).items():
            module, _, kind = name.rpartition(".")
            if module.rpartition(".")[2] in _NOT_ADAPTED:
                tables[name] = entry
                continue
            if kind in ("qweight", "weight_packed") or (
                kind == "weight" and entry.dtype not in _PLAIN
            ):
                shapes[module] = None
            elif kind == "weight" and len(entry.shape) == 2:
                shapes[module] = (entry.shape[0], entry.shape[1])
        for module in [name for name in shapes if name.startswith(_SAVED_TEXT)]:
            shapes[_LIVE_TEXT + module.removeprefix(_SAVED_TEXT)] = shapes[module]
        for name in [name for name in tables if name.startswith(_SAVED_TEXT)]:
            tables[_LIVE_TEXT + name.removeprefix(_SAVED_TEXT)] = tables[name]
        # A packed base is another checkpoint than the one that adapters are trained on.
        packed = None in shapes.values()
        fingerprint = None if packed else base_fingerprint(model)
        return cls(name=str(model), shapes=shapes, tables=tables, fingerprint=fingerprint)

    def _likest(self, module: str) -> str:
        """What is called like `module` here, and what to do."""
        inner = module.partition(".layers.")[2] or module.removeprefix("layers.")
        alike = [n for n in sorted(self.shapes) if inner and n.endswith(f"layers.{inner}")]
        if alike:
            return (
                f"which is called {alike[0]!r} there: the adapter was trained on the model as another class "
                "loads it (AutoModel, or with images); train on AutoModelForCausalLM, or serve the model "
                "that was trained"
            )
        example = next(iter(sorted(self.shapes)), "none")
        return f"names there are such as {example!r}; serve the base that the adapter was made for"

    def check(
        self, given: Mapping[str, tuple[int, int]], *, where: str, trained_on: str | None = None
    ) -> None:
        """Raise unless every module of `given` is one of this base, with the same shape.

        Args:
            given: `(out, in)` of each adapted module.
            where: What error texts call the adapter.
            trained_on: Fingerprint of the adapter's own base, if it says; only that tells two bases of
                the same shapes apart.

        Raises:
            UnknownModules: names that the base does not have.
            BaseMismatch: it was trained on another base.
        """
        if self.fingerprint is not None:
            check_trained_on(trained_on, self.fingerprint, where=where)
        unknown = sorted(set(given) - set(self.shapes))
        if unknown:
            raise UnknownModules(
                f"{where}: {len(unknown)} of {len(given)} modules are not in the base {self.name}, first "
                f"{unknown[0]!r}, {self._likest(unknown[0])}",
                unknown=unknown[:10],
            )
        for module, shape in given.items():
            expected = self.shapes[module]
            if expected is not None and shape != expected:
                raise BaseMismatch(
                    f"{where}: {module} adapts a weight of shape {list(shape)}, in the base {self.name} "
                    f"it has {list(expected)}: the adapter was trained on another base; serve that one",
                    module=module,
                )
