"""What people do, from a phone's or a watch's motion: a 1-D CNN, tested on people it never saw.

python examples/har_cnn.py
"""

import argparse
from pathlib import Path

import numpy as np
import optax

import crowdmesh_jax as cm

FILE = Path(__file__).parent / "data" / "har.npz"
GET = "it comes with the repository, in examples/data; README.md there names its source"
# scikit-learn's, 100 trees, on mean, deviation, minimum, maximum and roughness of each channel.
FOREST = "a random forest on the bundled windows 87.3 %"
LENGTH, STRIDE = 50, 25  # samples at 25 Hz: windows of 2 s, one each second
TEST_SUBJECTS = range(18, 24)


def windows(path, subjects):
    """Windows (rows, 50, 6) in m/s2 / 10 and rad/s, and activities, of these people's runs."""
    arrays = cm.read_npz(
        path,
        {
            "x": ("int16", ("samples", 6)),
            "scale": ("float32", (6,)),
            "y": ("uint8", ("samples",)),
            "runs": ("int32", ("runs", 5)),
        },
        get=GET,
    )
    cm.check_labels(arrays["y"], 5, where=f"{path}: y")
    signal = arrays["x"] * arrays["scale"] * np.float32([0.1, 0.1, 0.1, 1, 1, 1])
    cut = [
        cm.cut_windows(
            signal[first : first + rows], arrays["y"][first : first + rows],
            length=LENGTH, stride=STRIDE,
        )
        for subject, _, _, first, rows in arrays["runs"] if subject in subjects
    ]  # fmt: skip
    return np.concatenate([x for x, _ in cut]), np.concatenate([y for _, y in cut])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--data", type=Path, default=FILE)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    data = cm.ArraySource(*windows(args.data, range(1, 18)), batch_size=64)
    inputs, labels = windows(args.data, TEST_SUBJECTS)
    job = cm.TrainingJob(
        cm.zoo.har_cnn(classes=5, features=(32, 64, 64), hidden=128),
        cm.losses.softmax_cross_entropy,
        optax.adam(1e-3),
        batch_size=data.batch_size,
        microbatches=4,
    )

    def accuracy(trained):
        outputs = job.model.predict_rows(trained.params, trained.state, inputs)
        return 100 * (outputs.argmax(-1) == labels).mean()

    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    print(f"{data.rows} windows of 17 people to train on, {len(labels)} of 6 others to test")
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {run.measured_step_s:.3f} s a step")
    alone = accuracy(cm.reference(job, data, args.steps))
    majority = 100 * np.bincount(labels).max() / len(labels)
    print(
        f"test accuracy {accuracy(run):.1f} % (reference: one process {alone:.1f} %, {FOREST},"
        f" always the most frequent activity {majority:.1f} %)"
    )


if __name__ == "__main__":
    main()
