"""Which sync mode a run takes: from what was asked for, what the adapter needs and what the server offers."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tink_rl import errors
from tink_rl.policy.support import Needs
from tink_rl.types import PolicyVersion, PublishRecord, ServerStatus, SyncMode

logger = logging.getLogger("tink_rl")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A sync mode and, in a few words, why it was taken."""

    mode: SyncMode
    reason: str


def choose_mode(
    wanted: str, status: ServerStatus, needed: Needs | None = None, *, policy: str = ""
) -> Choice:
    """The sync mode for `wanted`, from what the adapter needs, the server offers and others use.

    Raises:
        UnsupportedAdapter: `wanted` cannot express the adapter.
        ModeUnavailable: the server was not started for it.
    """
    needed = needed or Needs()
    check_fits(wanted, needed)
    if wanted != "auto":
        if wanted not in status.modes:
            raise _not_offered(f"mode {wanted!r}", wanted, status)
        return Choice(mode=SyncMode(wanted), reason="asked for")
    fitting = fitting_modes(status, needed)
    if not fitting:
        because = ", ".join(needed.because) or "the adapter"
        raise _not_offered(
            f"{because} needs mode {' or '.join(needed.modes)}", needed.modes[0], status
        )
    unowned = {n for p in status.policies if p.owner is None for n in p.versions}
    kept = set(status.served) - unowned  # what nobody owns makes room
    others = {PolicyVersion.parse(name).policy for name in kept if "@" in name} - {policy}
    slots = sorted(kept - {status.merged, status.full})
    too_large = needed.rank > status.max_lora_rank and SyncMode.ADAPTER in status.modes
    if too_large and SyncMode.ADAPTER not in fitting:
        reason = f"rank {needed.rank} is above the server's slots ({status.max_lora_rank})"
        return Choice(mode=_first(fitting, SyncMode.MERGED, SyncMode.FULL), reason=reason)
    if len(needed.modes) == 1:
        return Choice(mode=fitting[0], reason=f"{', '.join(needed.because)} needs it")
    if slots and SyncMode.ADAPTER in fitting:
        shared = f"{len(others)} other policies" if others else f"{len(slots)} versions"
        return Choice(mode=SyncMode.ADAPTER, reason=f"{shared} in slots share the server")
    if SyncMode.MERGED in fitting and not slots:
        return Choice(mode=SyncMode.MERGED, reason="one policy, at the base model's decode speed")
    mode = _first(fitting, SyncMode.ADAPTER, SyncMode.FULL, SyncMode.MERGED)
    return Choice(mode=mode, reason=f"the server offers {', '.join(status.modes)}")


def fitting_modes(status: ServerStatus, needed: Needs) -> list[SyncMode]:
    """Modes that express the adapter and that the server offers; a slot only if it holds the rank.

    A server that offers nothing but slots keeps them: it refuses the rank itself, with the remedy.
    """
    offered = [mode for mode in needed.modes if mode in status.modes]
    if needed.rank <= status.max_lora_rank:
        return offered
    return [mode for mode in offered if mode is not SyncMode.ADAPTER] or offered


def _first(fitting: list[SyncMode], *wanted: SyncMode) -> SyncMode:
    return next(mode for mode in wanted if mode in fitting)


def check_fits(wanted: str, needed: Needs) -> None:
    """Raise unless mode `wanted` ("auto": any) can express an adapter that needs `needed`.

    Raises:
        UnsupportedAdapter: names the feature and the modes that can.
    """
    if wanted != "auto" and wanted not in needed.modes:
        raise errors.UnsupportedAdapter(
            f"mode {wanted!r} cannot express {', '.join(needed.because) or 'this adapter'}; set "
            f"SyncConfig(mode={' or '.join(repr(m.value) for m in needed.modes)}), or leave it on 'auto'"
        )


def check_slots(max_staleness: int, status: ServerStatus) -> None:
    """Raise unless the server holds the versions that rows so old need, the newest, and one that comes in.

    Raises:
        ConfigError: it has fewer slots.
    """
    needed = max_staleness + 2
    if max_staleness and status.max_loras < needed:
        raise errors.ConfigError(
            f"max_staleness={max_staleness} in adapter mode needs {needed} slots of LoRA, the server has "
            f"{status.max_loras}; restart it with `tink-rl serve --max-loras {needed}`"
        )


def _not_offered(what: str, mode: str, status: ServerStatus) -> errors.ModeUnavailable:
    return errors.ModeUnavailable(
        f"{what}: the server offers {', '.join(status.modes)}; restart it with "
        f"`tink-rl serve --mode {mode}`"
    )


class ModeInUse:
    """The mode of one publisher: chosen as it opens, again for its adapter, fixed by its first version."""

    def __init__(self, wanted: str, policy: str) -> None:
        """Store; `open` chooses.

        Args:
            wanted: `SyncConfig.mode`.
            policy: Its name.
        """
        self._wanted, self._policy = wanted, policy
        self._mode: SyncMode | None = None
        self._is_said = False

    @property
    def mode(self) -> SyncMode:
        """The mode.

        Raises:
            ConfigError: the servers were not asked yet.
        """
        if self._mode is None:
            raise errors.ConfigError("the mode is not known yet; call open() first")
        return self._mode

    def open(self, status: ServerStatus) -> None:
        """Choose as long as no adapter is known.

        Raises:
            ModeUnavailable: the server was not started for what was asked for.
        """
        self._mode = choose_mode(self._wanted, status, policy=self._policy).mode

    def settle(
        self, needed: Needs, status: ServerStatus, current: PublishRecord | None
    ) -> SyncMode:
        """Choose for an adapter that needs `needed`, and say in one line which and why.

        Raises:
            UnsupportedAdapter: the mode that was asked for, or that `current` has, cannot express it.
            ModeUnavailable: the server offers none that can.
        """
        if current is not None:
            if self.mode not in needed.modes:
                raise errors.UnsupportedAdapter(
                    f"{current.name} is published in {self.mode.value} mode, which cannot express "
                    f"{', '.join(needed.because)}"
                )
            return self.mode
        if self.mode not in needed.modes or not self._is_said:
            choice = choose_mode(self._wanted, status, needed, policy=self._policy)
            if not self._is_said or choice.mode is not self._mode:
                logger.info("mode %s: %s: %s", self._wanted, choice.mode.value, choice.reason)
            self._mode, self._is_said = choice.mode, True
        return self.mode

    def use(self, mode: SyncMode, current: PublishRecord | None) -> None:
        """Take `mode` from now on.

        Raises:
            ConfigError: `current` is published in one already.
        """
        if current is not None:
            raise errors.ConfigError(f"{current.name} is published in {self._mode}; too late")
        self._mode = mode
