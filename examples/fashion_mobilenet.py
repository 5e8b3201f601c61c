"""Fashion-MNIST: MobileNetV2 at 0.35 of its width over three unequal processes.

apt install dataset-fashion-mnist    (or the four files of the data set in a folder: --data)
python examples/fashion_mobilenet.py
"""

import argparse

import optax

import crowdmesh_jax as cm

# Of the data set's README: 83.5 % by people without expertise, 95.0 % by a full MobileNet trained
# to the end with flipped images. The default, two thirds of an epoch in minutes, stays below both.
REFERENCE = "people 83.5 %, full MobileNet trained to the end 95.0 %"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--width", type=float, default=0.35)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.6, 0.3])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    data = cm.ArraySource(*cm.fashion_mnist("train", args.data), batch_size=args.batch_size)
    images, labels = (part[: args.test_images] for part in cm.fashion_mnist("test", args.data))
    job = cm.TrainingJob(
        cm.zoo.mobilenet_v2(classes=10, width=args.width),
        cm.losses.softmax_cross_entropy,
        optax.adam(optax.cosine_decay_schedule(4e-3, args.steps)),
        batch_size=args.batch_size,
        microbatches=4,
    )
    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    for stage in run.plan.stages:
        print(f"{stage.device}: layers {stage.first_layer} to {stage.last_layer}")
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {run.measured_step_s:.3f} s a step")
    outputs = job.model.predict_rows(run.params, run.state, images)
    accuracy = 100 * (outputs.argmax(-1) == labels).mean()
    print(f"test accuracy {accuracy:.1f} % (reference: {REFERENCE})")


if __name__ == "__main__":
    main()
