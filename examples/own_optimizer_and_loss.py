"""Your own optimizer, loss and metric, on labels of which a fifth is unknown.

python examples/own_optimizer_and_loss.py
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import crowdmesh_jax as cm


class LionState(NamedTuple):
    momentum: optax.Updates


def lion(rate, short=0.9, long=0.99):
    """Sign of an interpolated momentum (Chen et al., 2023): any pair (init, update) will do.

    Every operation here is leaf by leaf, so each device updates its own layers. What mixes layers
    must be a few scalars, as in optax.clip_by_global_norm; those travel.
    """

    def init(params):
        return LionState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        def mix(share):
            return jax.tree.map(lambda m, g: share * m + (1 - share) * g, state.momentum, grads)

        return jax.tree.map(lambda m: -rate * jnp.sign(m), mix(short)), LionState(mix(long))

    return optax.GradientTransformation(init, update)


def focal_loss(logits, targets, gamma=1.0):
    """Cross-entropy that cares less for easy rows (Lin et al., 2017): (values, weights).

    The step's loss is sum(values x weights) / sum(weights) over the whole batch, however it is cut
    into microbatches. Weights may depend on targets only.
    """
    nats = cm.losses.softmax_cross_entropy(logits, targets["label"])
    return nats * (1 - jnp.exp(-nats)) ** gamma, targets["known"]


def sure(logits, targets):
    """A metric is (sum, count): here the share of known rows with a probability above 0.9."""
    is_sure = jax.nn.softmax(logits).max(-1) > 0.9
    return jnp.sum(is_sure * targets["known"]), jnp.sum(targets["known"])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    images, labels = cm.digits("train", flat=True)
    known = (np.arange(len(labels)) % 5 != 0).astype(np.float32)
    targets = {"label": np.where(known == 1, labels, 0), "known": known}
    data = cm.ArraySource(images, targets, batch_size=64)
    job = cm.TrainingJob(
        cm.zoo.mlp((128, 128, 64)),
        focal_loss,
        optax.chain(optax.clip_by_global_norm(1.0), lion(3e-4)),
        batch_size=data.batch_size,
        microbatches=4,
        metrics=[sure],
    )
    test_images, test_labels = cm.digits("test", flat=True)

    def accuracy(trained):
        outputs = job.model.predict_rows(trained.params, trained.state, test_images)
        return 100 * (outputs.argmax(-1) == test_labels).mean()

    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}")
    print(f"sure of {100 * run.metrics['sure'][-1]:.0f} % of the last step's known rows")
    alone = accuracy(cm.reference(job, data, args.steps))
    print(f"test accuracy {accuracy(run):.1f} % (reference: one process {alone:.1f} %)")


if __name__ == "__main__":
    main()
