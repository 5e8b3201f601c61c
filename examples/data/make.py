"""Makes the small data sets of this folder from their originals; README.md has the sources.

python make.py har CLONE/DATA            of GeoTecINIT/sp-sw-har-dataset
python make.py digits CLONE/recordings   of Jakobovski/free-spoken-digit-dataset
python make.py shakespeare input.txt     of karpathy/char-rnn, data/tinyshakespeare
"""

import csv
import gzip
import sys
from pathlib import Path

import numpy as np

import crowdmesh_jax as cm

HERE = Path(__file__).parent
ACTIVITIES = ["SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN"]
DECIMATE = 4
"""100 Hz to 25 Hz: the mean of 4 samples."""
TAKES = 15
"""Of the 50 recordings of each digit by each speaker."""


def har(folder: Path) -> None:
    signals, labels, runs, first = [], [], [], 0
    for path in sorted(folder.glob("s*/*_s?.csv")):
        subject, execution, device = path.stem.split("_")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        rows = rows[: len(rows) // DECIMATE * DECIMATE]
        axes = [f"{axis}_{kind}" for kind in ("acc", "gyro") for axis in "xyz"]
        values = np.array([[float(row[axis]) for axis in axes] for row in rows])
        signals.append(values.reshape(-1, DECIMATE, 6).mean(axis=1))
        labels.append([ACTIVITIES.index(row["label"]) for row in rows[DECIMATE // 2 :: DECIMATE]])
        runs.append((int(subject[1:]), int(execution), int(device == "sw"), first, len(labels[-1])))
        first += len(labels[-1])
    signal = np.concatenate(signals)
    scale = (np.maximum(np.abs(signal).max(axis=0), 1e-6) / 32767).astype(np.float32)
    np.savez_compressed(
        HERE / "har.npz",
        x=np.round(signal / scale).astype(np.int16),
        scale=scale,
        y=np.concatenate(labels).astype(np.uint8),
        runs=np.array(runs, np.int32),
    )


def digits(folder: Path) -> None:
    clips = cm.read_clips(folder)
    speakers = sorted({name.split("_")[1] for name in clips.names})
    audio, table, first = [], [], 0
    for name, samples in zip(clips.names, clips.samples, strict=True):
        digit, speaker, take = name.split("_")
        if int(take) < TAKES:
            packed = np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log(256)
            audio.append(np.round(127 * packed).astype(np.int8))
            table.append((int(digit), speakers.index(speaker), int(take), first, len(samples)))
            first += len(samples)
    np.savez_compressed(
        HERE / "spoken_digits.npz",
        audio=np.concatenate(audio),
        clips=np.array(table, np.int32),
        speakers=np.array(speakers),
    )


def shakespeare(path: Path) -> None:
    packed = gzip.compress(path.read_bytes(), 9, mtime=0)
    (HERE / "shakespeare.txt.gz").write_bytes(packed)


if __name__ == "__main__":
    {"har": har, "digits": digits, "shakespeare": shakespeare}[sys.argv[1]](Path(sys.argv[2]))
