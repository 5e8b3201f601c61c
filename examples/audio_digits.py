"""Spoken digits: DS-CNN on MFCCs, tested on other takes of the same six people.

python examples/audio_digits.py
python examples/audio_digits.py --leave-out theo               (a speaker it never heard)
python examples/audio_digits.py --wav recordings               (a clone of the whole data set)
"""

import argparse
from pathlib import Path

import numpy as np
import optax

import crowdmesh_jax as cm

FILE = Path(__file__).parent / "data" / "spoken_digits.npz"
# Logistic regression (scikit-learn, C=0.1) on the same features, on the bundled clips.
REFERENCE = {None: 92.7, "theo": 66.7}
GET = (
    "it comes with the repository, in examples/data; or clone Jakobovski/free-spoken-digit-dataset"
)
RATE_HZ = 8000
TEST_TAKES = range(5)  # the data set's own split


def bundled(path):
    """Clips, and (digit, speaker, take) of each, from examples/data."""
    archive = cm.read_npz(
        path,
        {"audio": ("int8", (None,)), "clips": ("int32", (None, 5)), "speakers": ("U", (None,))},
        get=GET,
    )
    q = archive["audio"].astype(np.float32) / 127
    audio = np.sign(q) * (256 ** np.abs(q) - 1) / 255  # mu-law
    clips = [audio[first : first + length] for *_, first, length in archive["clips"]]
    who = [archive["speakers"][speaker] for speaker in archive["clips"][:, 1]]
    return clips, archive["clips"][:, 0], np.array(who), archive["clips"][:, 2]


def recordings(folder):
    """The same from wav files named digit_speaker_take.wav."""
    clips = cm.read_clips(folder, get=GET)
    digits, who, takes = np.array([name.split("_") for name in clips.names]).T
    return clips.samples, digits.astype(int), who, takes.astype(int)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", type=Path, default=FILE)
    parser.add_argument("--wav", type=Path, help="folder of recordings, instead of --data")
    parser.add_argument("--leave-out", metavar="SPEAKER", help="test on this speaker's clips")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.6, 0.3])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    clips, digits, who, takes = recordings(args.wav) if args.wav else bundled(args.data)
    cm.check_labels(digits, 10, where="digits")
    # 49 frames of 40 ms every 20 ms make a second; the ten lowest coefficients, as the paper has it
    mels = cm.log_mel(clips, RATE_HZ, window_s=0.04, hop_s=0.02)
    features = cm.mfcc(mels, coefficients=10)[..., None]
    features = (features - features.mean((0, 1))) / features.std((0, 1))
    test = who == args.leave_out if args.leave_out else np.isin(takes, TEST_TAKES)
    data = cm.ArraySource(features[~test], digits[~test], batch_size=60)
    job = cm.TrainingJob(
        cm.zoo.ds_cnn(classes=10, size="S"),
        cm.losses.softmax_cross_entropy,
        optax.adam(2e-3),
        batch_size=data.batch_size,
        microbatches=4,
    )
    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {run.measured_step_s:.3f} s a step")
    outputs = job.model.predict_rows(run.params, run.state, features[test])
    accuracy = 100 * (outputs.argmax(-1) == digits[test]).mean()
    split = args.leave_out or "other takes of the same speakers"
    known = REFERENCE.get(args.leave_out)
    told = f"logistic regression {known} %" if known and not args.wav else "chance 10 %"
    print(f"test accuracy {accuracy:.1f} % on {test.sum()} clips of {split} (reference: {told})")


if __name__ == "__main__":
    main()
