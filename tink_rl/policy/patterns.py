"""`rank_pattern` and `alpha_pattern`: a value per module, as PEFT looks it up, for thousands of both.

PEFT takes the first key that matches the end of a module's name as a regular expression
(`peft.utils.other.get_pattern_key`). A key of plain letters, as nearly all are, is found by its length
and the places of its dots (which match any letter); only what is left is matched one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tink_rl.errors import AdapterConfigInvalid

MAX_MATCHES = 4_000_000
"""Work that all modules and patterns of one adapter may take: seconds."""
_TOKEN = re.compile(r"\\\.|[\w.-]")
_PLAIN = re.compile(r"\^?(\\\.|[\w.-])+\$?")
_WILD = "\0"


class Pattern:
    """One of the two fields: `Pattern(config, "rank_pattern", 8, where).of("model.layers.0.q_proj")`"""

    def __init__(self, config: Mapping[str, Any], field: str, default: Any, where: str) -> None:
        """Read `field` of `config`; `default` is the value of what no key matches.

        Raises:
            AdapterConfigInvalid: a key that may take hours to match, or is not a regular expression.
        """
        self._default = default
        self._values = list((config.get(field) or {}).values())
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        # length -> places that match any letter -> the text with those blanked -> (index, whole name only)
        self._plain: dict[int, dict[tuple[int, ...], dict[str, list[tuple[int, bool]]]]] = {}
        for index, key in enumerate(config.get(field) or {}):
            if _PLAIN.fullmatch(key):
                self._add_plain(index, key)
            else:
                self._regexes.append((index, _compiled(key, field, where)))

    def _add_plain(self, index: int, key: str) -> None:
        tokens = _TOKEN.findall(key.removeprefix("^").removesuffix("$"))
        wild = tuple(i for i, token in enumerate(tokens) if token == ".")
        text = "".join(_WILD if t == "." else t[-1] for t in tokens)
        found = self._plain.setdefault(len(tokens), {}).setdefault(wild, {})
        found.setdefault(text, []).append((index, key.startswith("^")))

    @property
    def cost(self) -> int:
        """Work of one lookup, about; a repetition tries every place of the name."""
        plain = sum(len(by_places) for by_places in self._plain.values())
        return plain + sum(100 if ".*" in key.pattern[7:] else 1 for _, key in self._regexes)

    def of(self, module: str) -> Any:
        """The value of `module`."""
        hits = [index for index, key in self._regexes if key.match(module)]
        at = 0
        while at >= 0:
            end = module[at:]
            for places, texts in self._plain.get(len(end), {}).items():
                for index, whole in texts.get(_blanked(end, places), ()):
                    if not (whole and at):
                        hits.append(index)
            at = module.find(".", at) + 1 or -1
        return self._values[min(hits)] if hits else self._default


def _blanked(text: str, places: tuple[int, ...]) -> str:
    letters = list(text)
    for place in places:
        letters[place] = _WILD
    return "".join(letters)


def _compiled(key: str, field: str, where: str) -> re.Pattern[str]:
    # A repetition in a stranger's regular expression can take hours to match.
    if re.search(r"[*+?{(]", key.replace(".*", "", 1)) is None and len(key) <= 500:
        with suppress(re.error):
            return re.compile(rf"(.*\.)?({key})$")
    raise AdapterConfigInvalid(
        f"{where}: {field} has the key {key[:60]!r}; expected a module name such as q_proj or "
        "layers.1.mlp.up_proj, with at most one '.*'; name the modules one by one"
    )
