"""Handwritten digits: a small CNN over three unequal processes, next to the same in one process.

python examples/digits_cnn.py
python examples/digits_cnn.py --speeds 1 0.5 0.5 0.25 --steps 500
"""

import argparse

import optax

import crowdmesh_jax as cm


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    data = cm.ArraySource(*cm.digits("train"), batch_size=64)  # 1,437 images, 8x8, bundled
    images, labels = cm.digits("test")  # 360 others
    job = cm.TrainingJob(
        cm.zoo.lenet(classes=10),
        cm.losses.softmax_cross_entropy,
        optax.adam(2e-3),
        batch_size=data.batch_size,
        microbatches=4,
    )

    def accuracy(trained):
        outputs = job.model.predict_rows(trained.params, trained.state, images)
        return 100 * (outputs.argmax(-1) == labels).mean()

    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    for stage in run.plan.stages:
        names = [layer.name for layer in job.model.layers[stage.first_layer : stage.last_layer + 1]]
        print(f"{stage.device}: {', '.join(names)}")
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {run.measured_step_s:.3f} s a step")
    alone = accuracy(cm.reference(job, data, args.steps))
    print(f"test accuracy {accuracy(run):.1f} % (reference: one process {alone:.1f} %)")


if __name__ == "__main__":
    main()
