"""Characters of Shakespeare: a GPT-2 of 0.8 million parameters over three unequal processes.

python examples/shakespeare_lm.py
python examples/shakespeare_lm.py --text my_own.txt
"""

import argparse
from pathlib import Path

import numpy as np
import optax

import crowdmesh_jax as cm

FILE = Path(__file__).parent / "data" / "shakespeare.txt.gz"
GET = "it comes with the repository, in examples/data; or name a text of your own with --text"
# Of the README of karpathy/nanoGPT, for its CPU recipe: the same text, shape and context.
PUBLISHED = "nanoGPT 1.88 after 2,000 steps of 12"
CONTEXT = 64


def bigram_nats(train, test, size):
    """What the pair counts of the training text cost on the other: nats per character."""
    counts = np.ones((size, size))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    return -np.log((counts / counts.sum(axis=1, keepdims=True))[test[:-1], test[1:]]).mean()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--test-rows", type=int, default=256)
    parser.add_argument("--text", type=Path, default=FILE)
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0, 0.6, 0.3])
    parser.add_argument("--transport", choices=["grpc", "memory"], default="grpc")
    args = parser.parse_args(arguments)

    text = cm.read_text(args.text, get=GET)
    vocabulary = cm.Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    train, test = np.split(tokens, [9 * len(tokens) // 10])
    data = cm.TextSource(train, CONTEXT, args.batch_size)
    job = cm.TrainingJob(
        cm.zoo.build("gpt2_nano", vocab=len(vocabulary), dropout=0.0),
        cm.losses.softmax_cross_entropy,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3, weight_decay=0.1)),
        batch_size=args.batch_size,
        microbatches=4,
    )
    crowd = cm.Crowd.local(args.speeds)
    # Small nets are fastest on one device, and "auto" would say so; here all take part.
    plan = cm.partition(cm.profile(job, crowd, data.batch(0)), crowd, min_stages=len(crowd.devices))
    run = cm.train(job, crowd, data, steps=args.steps, plan=plan, transport=args.transport)
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {run.measured_step_s:.3f} s a step")

    inputs, targets = cm.TextSource(test, CONTEXT, args.test_rows).batch(0)
    logits = job.model.predict_rows(run.params, run.state, inputs, batch_size=64)
    nats = float(np.mean(cm.losses.softmax_cross_entropy(logits, targets)))
    pairs = bigram_nats(train, test, len(vocabulary))
    print(
        f"test loss {nats:.3f} nats a character (reference: pair counts {pairs:.3f}; {PUBLISHED})"
    )

    window = tokens[:CONTEXT].copy()  # the text goes on
    written, rng = [], np.random.default_rng(0)
    for _ in range(min(args.steps, 60)):
        logits = job.model.predict_rows(run.params, run.state, window[None])
        chances = np.exp(logits[0, -1].astype(np.float64))
        written.append(rng.choice(len(vocabulary), p=chances / chances.sum()))
        window = np.append(window[1:], written[-1])
    print(repr(vocabulary.decode(written)))


if __name__ == "__main__":
    main()
