"""Sound: wav files and folders of them, log-mel and MFCC features. Pure numpy.

Source of the features: S. Davis, P. Mermelstein, Comparison of Parametric Representations for
Monosyllabic Word Recognition (1980); mel scale of D. O'Shaughnessy (1987), 2595 log10(1 + f / 700).
"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError, DataFileError
from .reading import existing_file

FLOOR = 1e-6
"""Added to each band's power before the logarithm: silence stays finite."""


@dataclass(frozen=True, slots=True, eq=False)
class Clips:
    """Recordings of one sampling rate."""

    names: tuple[str, ...]
    """File names without folder and ending, sorted."""
    samples: tuple[np.ndarray, ...]
    """float32 in [-1, 1], `(samples,)` each; lengths differ."""
    rate_hz: int


def read_wav(path: str | Path, *, get: str = "check the path") -> tuple[np.ndarray, int]:
    """Samples and sampling rate of a PCM wav file; several channels are averaged.

    Returns:
        float32 in [-1, 1], `(samples,)`; samples per second.

    Raises:
        DataFileError: Missing, no PCM wav file, truncated, or empty.
    """
    path = existing_file(path, get=get)
    try:
        with wave.open(str(path), "rb") as stream:
            channels, width = stream.getnchannels(), stream.getsampwidth()
            rate, announced = stream.getframerate(), stream.getnframes()
            data = stream.readframes(announced)
    except (wave.Error, EOFError, OSError) as exc:
        raise DataFileError(
            f"{path}: expected a PCM wav file, found something else or a truncated one"
            f" ({exc or 'it ends too early'}); convert it, with ffmpeg or sox say"
        ) from exc
    frames = len(data) // (channels * width)
    if frames != announced or not frames or rate < 1:
        raise DataFileError(
            f"{path}: its header announces {announced} samples at {rate} Hz, found {frames}; the"
            " file is truncated or empty, get it again"
        )
    if width == 1:  # the only width that wav stores unsigned
        values = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        padded = np.zeros((frames * channels, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        values = np.frombuffer(data, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return values.reshape(frames, channels).mean(axis=1, dtype=np.float32), rate


def read_clips(folder: str | Path, pattern: str = "*.wav", *, get: str = "check the path") -> Clips:
    """All wav files of a folder, by name.

    Raises:
        DataFileError: No such folder, no such files in it, one is damaged, or rates differ.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataFileError(f"{folder}: expected a folder of wav files, found none; {get}")
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise DataFileError(f"{folder}: expected files {pattern}, found none; {get}")
    read = [read_wav(path) for path in paths]
    rate = read[0][1]
    for path, (_, other) in zip(paths, read, strict=True):
        if other != rate:
            raise DataFileError(
                f"{path}: expected {rate} Hz as in {paths[0].name}, found {other} Hz; resample it"
            )
    names = tuple(path.stem for path in paths)
    return Clips(names, tuple(samples for samples, _ in read), rate)


def log_mel(
    clips: Sequence[np.ndarray],
    rate_hz: int,
    *,
    length_s: float = 1.0,
    window_s: float = 0.032,
    hop_s: float = 0.016,
    bands: int = 40,
    low_hz: float = 20.0,
    high_hz: float | None = None,
) -> np.ndarray:
    """Logarithm of the power in mel bands, frame by frame: what a small speech net reads.

    Args:
        clips: Samples in [-1, 1], `(samples,)` each.
        length_s: Each clip is cut, or filled with silence at its end, to this length.
        window_s: Length of a frame, under a Hann window.
        hop_s: From one frame's start to the next one's.
        bands: Triangles, evenly spaced in mel from `low_hz` to `high_hz` (None: half the rate).

    Returns:
        float32, `(clips, frames, bands)`; frames = 1 + (length - window) // hop, in samples.

    Raises:
        DataError: No clips, one that is no row of numbers, or sizes that leave no frame or band.
    """
    length, window, hop = (round(s * rate_hz) for s in (length_s, window_s, hop_s))
    high_hz = rate_hz / 2 if high_hz is None else high_hz
    if not (hop > 0 and 1 < window <= length and 0 <= low_hz < high_hz <= rate_hz / 2):
        raise DataError(
            f"log_mel: {length_s} s clips, {window_s} s windows every {hop_s} s, {low_hz} .."
            f" {high_hz} Hz at {rate_hz} Hz: a window must fit into a clip, the bands below half"
            " the rate"
        )
    fitted = np.zeros((len(clips), length), np.float32)
    for row, clip in enumerate(clips):
        clip = np.asarray(clip)
        if clip.ndim != 1 or clip.dtype.kind != "f" or not np.isfinite(clip).all():
            raise DataError(
                f"log_mel: clip {row} must be a row of finite floats, got {clip.dtype} {clip.shape}"
            )
        fitted[row, : len(clip)] = clip[:length]
    if not len(fitted):
        raise DataError("log_mel: no clips")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    filters = _mel_filters(window, rate_hz, bands, low_hz, high_hz)
    frames = 1 + (length - window) // hop
    features = np.empty((len(fitted), frames, bands), np.float32)
    for frame in range(frames):  # one frame of all clips at a time: memory stays small
        part = fitted[:, frame * hop : frame * hop + window] * hann
        power = np.abs(np.fft.rfft(part)) ** 2 / window
        features[:, frame] = np.log(power @ filters + FLOOR)
    return features


def mfcc(log_mels: np.ndarray, coefficients: int = 10) -> np.ndarray:
    """The first cosine coefficients of each frame's log-mel bands (orthonormal DCT-II).

    Args:
        log_mels: From `log_mel`, `(..., bands)`.

    Returns:
        float32, `(..., coefficients)`.
    """
    bands = log_mels.shape[-1]
    if not 1 <= coefficients <= bands:
        raise DataError(f"mfcc: coefficients must be 1 .. {bands} (the bands), got {coefficients}")
    order, band = np.arange(coefficients), np.arange(bands)[:, None]
    basis = np.sqrt(2 / bands) * np.cos(np.pi * order * (band + 0.5) / bands)
    basis[:, 0] /= np.sqrt(2)
    return (log_mels @ basis).astype(np.float32)


def _mel_filters(
    window: int, rate_hz: int, bands: int, low_hz: float, high_hz: float
) -> np.ndarray:
    """Triangles of height 1, `(window // 2 + 1, bands)`."""
    edges_mel = np.linspace(_mel(low_hz), _mel(high_hz), bands + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    low, middle, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    bins_hz = np.fft.rfftfreq(window, 1 / rate_hz)[:, None]
    rising, falling = (bins_hz - low) / (middle - low), (high - bins_hz) / (high - middle)
    filters = np.maximum(0, np.minimum(rising, falling))
    empty = np.flatnonzero(filters.sum(axis=0) == 0)
    if len(empty):
        raise DataError(
            f"log_mel: band {empty[0]} of {bands} is narrower than the spacing of a {window}-sample"
            " window's frequencies; use fewer bands or a longer window"
        )
    return filters


def _mel(hz: float) -> float:
    return 2595 * np.log10(1 + hz / 700)
