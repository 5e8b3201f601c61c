"""Text as characters, and a data source of windows of tokens that can be shipped to devices.

Knows nothing of words or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import DataError, DataFileError
from .checks import checked_integer
from .reading import existing_file, read_start


def read_text(path: str | Path, *, get: str = "check the path") -> str:
    """The text of a UTF-8 file, gzip'd or not.

    Raises:
        DataFileError: Missing, empty, damaged, or not UTF-8; names the byte.
    """
    path = existing_file(path, get=get)
    data = read_start(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise DataFileError(
            f"{path}: expected UTF-8 text, found byte {data[exc.start]:#04x} at position"
            f" {exc.start}; convert the file, with iconv say"
        ) from exc
    if not text:
        raise DataFileError(f"{path}: expected text, found an empty file; {get}")
    return text


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The characters that a model knows; a token is a character's place among them.

    >>> Vocabulary.of("hello").encode("hole").tolist()
    [1, 3, 2, 0]
    """

    characters: str
    """Each once; sorted when made by `of`."""

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise DataError("Vocabulary: at least one character, and each only once")

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """All characters of a text, in the order of their code points."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Tokens, int32 `(len(text),)`.

        Raises:
            DataError: A character that is not in the vocabulary; says which and where.
        """
        places = {character: token for token, character in enumerate(self.characters)}
        try:
            return np.array([places[character] for character in text], np.int32)
        except KeyError as exc:
            raise DataError(
                f"character {exc.args[0]!r} at position {text.index(exc.args[0])} is not among the"
                f" {len(self)} of the vocabulary; make it with Vocabulary.of(all of the text)"
            ) from None

    def decode(self, tokens: Any) -> str:
        """The text of tokens in a row."""
        return "".join(self.characters[int(token)] for token in np.asarray(tokens).ravel())


class TextSource:
    """Windows of a row of tokens; the targets are the inputs' next tokens.

    Every row of a batch starts anywhere in the text, chosen by (seed, step) alone, through raw
    generator bits: no library version, platform or device changes it.

    Args:
        tokens: Integers >= 0, `(tokens,)`; kept as int32.
        context: Tokens of a row.
        batch_size: Rows per step, all microbatches together.
        seed: Of the places, 0 .. 2**64 - 1.

    Raises:
        DataError: Tokens that are not such integers, or too few for one row.
    """

    KIND: ClassVar[str] = "text"

    def __init__(self, tokens: Any, context: int, batch_size: int, seed: int = 0) -> None:
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            raise DataError(
                f"tokens must be integers in one row, got {tokens.dtype} {tokens.shape}; encode"
                " text with Vocabulary.of(text).encode(text)"
            )
        self.context = checked_integer("context", context, least=1)
        self.batch_size = checked_integer("batch_size", batch_size, least=1)
        self.seed = checked_integer("seed", seed, least=0, most=2**64 - 1)
        if len(tokens) <= self.context:
            raise DataError(
                f"{len(tokens)} tokens are too few: a row of {self.context} and its next token need"
                f" {self.context + 1}"
            )
        if tokens.min() < 0 or tokens.max() >= 2**31:
            raise DataError(
                f"tokens must be 0 .. 2**31 - 1, found {tokens.min()} .. {tokens.max()}"
            )
        self.tokens = tokens.astype(np.int32)

    def __repr__(self) -> str:
        return (
            f"TextSource(tokens={len(self.tokens)}, context={self.context},"
            f" batch_size={self.batch_size}, seed={self.seed})"
        )

    def starts(self, step: int) -> np.ndarray:
        """Where the rows of a step begin in the text: int64 `(batch_size,)`."""
        step = checked_integer("step", step, least=0)
        bits = np.random.Philox(key=np.array([self.seed, step], np.uint64))
        places = np.uint64(len(self.tokens) - self.context)
        return (bits.random_raw(self.batch_size) % places).astype(np.int64)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and the tokens after them: int32, both `(batch_size, context)`."""
        return self.batch_inputs(step), self.batch_targets(step)

    def batch_inputs(self, step: int) -> np.ndarray:
        """Tokens of a step, int32 `(batch_size, context)`."""
        return self.tokens[self.starts(step)[:, None] + np.arange(self.context)]

    def batch_targets(self, step: int) -> np.ndarray:
        """The next token of each, int32 `(batch_size, context)`."""
        return self.tokens[self.starts(step)[:, None] + np.arange(1, self.context + 1)]

    def spec(self) -> dict[str, Any]:
        """All but the tokens, JSON-able."""
        return {
            "kind": self.KIND,
            "tokens": len(self.tokens),
            "context": self.context,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def arrays(self, *, inputs: bool = True, targets: bool = True) -> dict[str, np.ndarray]:
        """The tokens: inputs and targets are cut from the same ones."""
        return {"tokens": self.tokens} if inputs or targets else {}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TextSource:
        """The source that `spec` and its tokens describe.

        Raises:
            DataError: The tokens are not those of the spec.
        """
        fields = {"kind", "tokens", "context", "batch_size", "seed"}
        if set(spec) != fields:
            odd = sorted(set(spec) ^ fields)[0]
            raise DataError(f"data spec: unknown or missing field {odd!r}")
        if set(arrays) != {"tokens"}:
            raise DataError(f"data spec: expected the array 'tokens', got {sorted(arrays)}")
        source = cls(arrays["tokens"], spec["context"], spec["batch_size"], spec["seed"])
        if len(source.tokens) != spec["tokens"]:
            raise DataError(
                f"data spec: {spec['tokens']} tokens described, {len(source.tokens)} given"
            )
        return source
