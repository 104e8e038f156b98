"""The content of the served checkpoint: which files it was loaded from, and a digest of every tensor."""

from __future__ import annotations

from tink_rl.errors import BaseMismatch, ConfigError
from tink_rl.policy.content import ContentDigest, files_identity
from tink_rl.policy.fingerprint import checkpoint_index
from tink_rl.protocol import BaseAnswer, Empty


class ServedContent:
    """Answers what the served checkpoint holds; hashes it when it is asked for the first time."""

    def __init__(self, model_dir: str) -> None:
        """Note which files these are; made when the workers have loaded them."""
        self._model_dir = model_dir
        self._index = checkpoint_index(model_dir)
        self._digest = ContentDigest(self._index)
        self.identity = files_identity(self._index)

    async def ask(self, _: Empty) -> BaseAnswer:
        """How far hashing is, and its digests at the end.

        Raises:
            BaseMismatch: the files were changed after they had been loaded.
            ConfigError: a file cannot be read.
        """
        self._digest.start()
        try:
            tensors = self._digest.result()
        except OSError as error:
            raise ConfigError(f"the served checkpoint cannot be read: {error}") from error
        if tensors is not None and files_identity(self._index) != self.identity:
            raise BaseMismatch(
                f"the files of {self._model_dir} were changed after the server had loaded them, so what is "
                "served is no checkpoint that can be compared; restart the server"
            )
        return BaseAnswer(
            num_bytes=self._digest.num_bytes, num_done=self._digest.num_done, tensors=tensors
        )
