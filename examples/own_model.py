"""Your own model: Flax linen and nnx modules and plain functions side by side, a skip in the carry.

A layer takes what the one before returns. Here that is a dict: the image travels along beside the
features, over every cut, until the last layer reads it again.

    python examples/own_model.py
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import crowdmesh_jax as cm


def carry(x):
    """A plain function is a layer without parameters."""
    return {"image": x, "features": x}


class Conv(nn.Module):
    """A linen module; `train` is passed to modules that ask for it."""

    channels: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.Conv(self.channels, (3, 3))(x["features"]))
        y = nn.Dropout(0.1, deterministic=not train)(y)
        return {**x, "features": y}


class Mix(nnx.Module):
    """An nnx module, made by a factory that takes the random streams."""

    def __init__(self, channels, rngs):
        self.dense = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x):
        return {**x, "features": x["features"] + jax.nn.relu(self.dense(x["features"]))}


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        pooled = x["features"].mean(axis=(1, 2))
        seen = x["image"].reshape(len(pooled), -1)
        return nn.Dense(10)(jnp.concatenate([pooled, seen], axis=-1))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    front = cm.StagedModel.from_linen([carry, Conv(16), Conv(16)], ["carry", "conv0", "conv1"])
    middle = cm.StagedModel.from_nnx([lambda rngs: Mix(16, rngs)] * 2, ["mix0", "mix1"])
    end = cm.StagedModel.from_linen([Head()], ["head"])
    model = cm.StagedModel((*front.layers, *middle.layers, *end.layers), name="own")

    data = cm.ArraySource(*cm.digits("train"), batch_size=64)
    images, labels = cm.digits("test")
    job = cm.TrainingJob(
        model,
        cm.losses.softmax_cross_entropy,
        optax.adam(3e-3),
        batch_size=data.batch_size,
        microbatches=4,
    )

    def accuracy(trained):
        outputs = model.predict_rows(trained.params, trained.state, images)
        return 100 * (outputs.argmax(-1) == labels).mean()

    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    for stage in run.plan.stages:
        names = [layer.name for layer in model.layers[stage.first_layer : stage.last_layer + 1]]
        print(f"{stage.device}: {', '.join(names)}")
    alone = accuracy(cm.reference(job, data, args.steps))
    print(f"test accuracy {accuracy(run):.1f} % (reference: one process {alone:.1f} %)")


if __name__ == "__main__":
    main()
