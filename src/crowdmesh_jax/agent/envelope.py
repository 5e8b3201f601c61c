"""How a protocol message, groups of keyed arrays and the body's own extras share one frame.

The machines see messages only. Arrays ride beside them in groups, one per slot that an action
attached, each array known by (role, layer, path). Extras are what bodies tell each other and no
machine decides on: op times, data specs, manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import FrameError
from ..protocol import Message, message_from_plain, message_to_plain
from ..transport import Frame

TRAINING, EVALUATION = "training", "evaluation"
"""Of which source rows are asked and sent."""
Key = tuple[str, str, str]
Group = Mapping[Key, Any]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a frame carries, apart."""

    message: Message | None
    groups: tuple[Group, ...] = field(default=(), repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)


def seal(envelope: Envelope) -> Frame:
    """Makes a frame; arrays keep the order of their groups."""
    header: dict[str, Any] = {}
    if envelope.message is not None:
        header["message"] = message_to_plain(envelope.message)
    if envelope.groups:
        header["keys"] = [[list(key) for key in group] for group in envelope.groups]
    if envelope.extra:
        header["extra"] = dict(envelope.extra)
    return Frame(header, tuple(array for group in envelope.groups for array in group.values()))


def unseal(frame: Frame) -> Envelope:
    """Reads what `seal` made.

    Raises:
        FrameError: Keys and arrays do not match, or unknown fields.
        FormatError: The message is not one of the protocol's.
    """
    header = frame.message
    unknown = set(header) - {"message", "keys", "extra"}
    if unknown:
        raise FrameError(f"a frame with unknown fields {sorted(unknown)}")
    extra = header.get("extra", {})
    if not isinstance(extra, Mapping):
        raise FrameError("a frame whose extra is no table")
    plain = header.get("message")
    message = None if plain is None else message_from_plain(plain)
    return Envelope(message, _groups(header.get("keys", []), frame.arrays), extra)


def _groups(keys: Any, arrays: tuple[np.ndarray, ...]) -> tuple[Group, ...]:
    if not isinstance(keys, list) or not all(isinstance(group, list) for group in keys):
        raise FrameError(f"a frame whose keys are no list of lists: {keys!r:.80}")
    if sum(len(group) for group in keys) != len(arrays):
        raise FrameError(f"a frame with {len(arrays)} arrays and other keys")
    rest = iter(arrays)
    groups = []
    for group in keys:
        named: dict[Key, np.ndarray] = {}
        for key in group:
            if not (
                isinstance(key, list)
                and len(key) == 3
                and all(isinstance(part, str) for part in key)
            ):
                raise FrameError(f"an array's key must be [role, layer, path], got {key!r:.80}")
            named[key[0], key[1], key[2]] = next(rest)
        if len(named) != len(group):
            raise FrameError("a frame with two arrays under one key")
        groups.append(named)
    return tuple(groups)
