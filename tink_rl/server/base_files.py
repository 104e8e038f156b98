"""vLLM loads the files that the base fingerprint is of, whatever else lies in their folder.

Without an index vLLM's loader feeds every `*.safetensors` of a folder to the model: an adapter beside
`model.safetensors` ends the start, a variant of it is loaded over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tink_rl.errors import ConfigError
from tink_rl.policy.fingerprint import INDEX_FILE, checkpoint_files


def load_only_the_checkpoint() -> None:
    """Let vLLM's loader leave out what is not part of the checkpoint; idempotent."""
    from tink_rl.server.vllm_names import default_loader

    current = default_loader.filter_duplicate_safetensors_files
    if not getattr(current, "leaves_out_the_rest", False):
        default_loader.filter_duplicate_safetensors_files = _filtered(current)


def _filtered(original: Any) -> Any:
    def chosen(hf_weights_files: list[str], hf_folder: str, index_file: str) -> list[str]:
        found: list[str] = original(hf_weights_files, hf_folder, index_file)
        folder = Path(hf_folder)
        if index_file != INDEX_FILE or (folder / index_file).is_file():
            return found
        try:
            names = {file.name for file in checkpoint_files(folder)}
        except ConfigError:
            return found
        return [file for file in found if Path(file).name in names] or found

    chosen.leaves_out_the_rest = True  # type: ignore[attr-defined]
    return chosen
