"""The zoo's networks compute what an independent implementation computes with the same weights.

Against Hugging Face transformers on PyTorch, at full size, with random weights and statistics.
Where its defaults are not torchvision's (MobileNetV2's padding, epsilon and momentum), those are
set: published weights were trained so. Runs where the extra `reference` is installed:

    pytest -m long tests/model/test_zoo_reference.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from crowdmesh_jax.model import leaf_paths, zoo

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="pip install 'crowdmesh-jax[reference]'")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip(
        "transformers", reason="pip install 'crowdmesh-jax[reference]'", exc_type=ImportError
    )


class Weights:
    """Names of PyTorch tensors, and where they stand in our trees (params and state)."""

    def __init__(self) -> None:
        self.params: dict[tuple[str, ...], tuple[str, str]] = {}
        self.state: dict[tuple[str, ...], str] = {}

    def conv(self, ours: str, theirs: str) -> None:
        self.params[(*ours.split("/"), "kernel")] = (f"{theirs}.weight", "conv")

    def dense(self, ours: str, theirs: str, kind: str = "dense") -> None:
        self.params[(*ours.split("/"), "kernel")] = (f"{theirs}.weight", kind)
        self.params[(*ours.split("/"), "bias")] = (f"{theirs}.bias", "as it is")

    def scale(self, ours: str, theirs: str) -> None:
        self.params[(*ours.split("/"), "scale")] = (f"{theirs}.weight", "as it is")
        self.params[(*ours.split("/"), "bias")] = (f"{theirs}.bias", "as it is")

    def conv_norm(self, ours: str, theirs: str) -> None:
        """A `ConvNorm` of ours from a module with `convolution` and `normalization`."""
        self.conv(f"{ours}/conv", f"{theirs}.convolution")
        self.scale(f"{ours}/norm", f"{theirs}.normalization")
        layer, *inside = ours.split("/")
        for statistic in ("mean", "var"):
            path = (layer, "batch_stats", *inside, "norm", statistic)
            self.state[path] = f"{theirs}.normalization.running_{statistic}"

    def read_params(self, tensors):
        """Our tree from PyTorch's tensors: parameters, or their gradients."""
        turned = {"conv": lambda a: a.transpose(2, 3, 1, 0), "dense": np.transpose}
        return unflatten_dict(
            {
                path: turned.get(kind, np.asarray)(tensors[name].detach().numpy())
                for path, (name, kind) in self.params.items()
            }
        )

    def read_state(self, tensors):
        return unflatten_dict({path: tensors[n].numpy().copy() for path, n in self.state.items()})


def resnet_weights(depths, parts, blocks):
    weights = Weights()
    weights.conv_norm("stem/part1", "resnet.embedder.embedder")
    for group, depth in enumerate(depths):
        for index in range(depth):
            ours = f"block{group + 1}_{index}"
            theirs = f"resnet.encoder.stages.{group}.layers.{index}"
            for part in range(parts):
                weights.conv_norm(f"{ours}/part{part + 1}", f"{theirs}.layer.{part}")
            if f"{theirs}.shortcut.convolution.weight" in blocks:
                weights.conv_norm(f"{ours}/skip", f"{theirs}.shortcut")
    weights.dense("head/dense", "classifier.1")
    return weights


def mobilenet_weights(blocks):
    weights = Weights()
    weights.conv_norm("stem/part1", "mobilenet_v2.conv_stem.first_conv")
    parts = {"up": "expand_1x1", "depthwise": "conv_3x3", "down": "reduce_1x1"}
    for index in range(17):
        theirs = "mobilenet_v2.conv_stem" if index == 0 else f"mobilenet_v2.layer.{index - 1}"
        for ours, name in parts.items():
            if f"{theirs}.{name}.convolution.weight" in blocks:
                weights.conv_norm(f"block{index}/{ours}", f"{theirs}.{name}")
    weights.conv_norm("last/part1", "mobilenet_v2.conv_1x1")
    weights.dense("head/dense", "classifier")
    return weights


@pytest.fixture(scope="module", params=["resnet18", "resnet50", "mobilenet_v2"])
def pair(request, torch, transformers):
    """(their model, our model, where the weights go); weights and statistics are random."""
    torch.manual_seed(0)
    name = request.param
    if name == "mobilenet_v2":
        config = transformers.MobileNetV2Config(
            num_labels=1000, tf_padding=False, layer_norm_eps=1e-5, classifier_dropout_prob=0.0
        )
        theirs = transformers.MobileNetV2ForImageClassification(config)
        weights = mobilenet_weights(theirs.state_dict())
        ours = zoo.mobilenet_v2(dropout=0.0)
    else:
        small = name == "resnet18"
        depths = [2, 2, 2, 2] if small else [3, 4, 6, 3]
        config = transformers.ResNetConfig(
            num_labels=1000,
            depths=depths,
            hidden_sizes=[64, 128, 256, 512] if small else [256, 512, 1024, 2048],
            layer_type="basic" if small else "bottleneck",
        )
        theirs = transformers.ResNetForImageClassification(config)
        weights = resnet_weights(depths, 2 if small else 3, theirs.state_dict())
        ours = zoo.build(name)
    with torch.no_grad():
        for tensor_name, tensor in theirs.state_dict().items():
            if "normalization" in tensor_name and tensor.dtype == torch.float32:
                low = 0.0 if tensor_name.endswith(("bias", "mean")) else 0.7
                tensor.uniform_(low - 0.2 if low == 0.0 else low, low + 0.6)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # torchvision's; MobileNetV2 has 0.997 here
    return theirs, ours, weights


def images(torch, *shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return x, torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def apart(ours, theirs) -> float:
    """Norm of the difference of two trees of one structure over the norm of the second."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert all(np.shape(a) == np.shape(b) for a, b in pairs)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = sum(((a - b) ** 2).sum() for a, b in wide)
    return float(np.sqrt(difference / sum((b**2).sum() for _, b in wide)))


def with_empty(model, trees):
    """Layers without parameters (or state) have an empty tree in ours."""
    return {layer.name: trees.get(layer.name, {}) for layer in model.layers}


@pytest.mark.parametrize("shape", [(1, 224, 224, 3), (2, 97, 131, 3)])
def test_every_weight_has_its_place_and_outputs_are_equal(torch, pair, shape):
    theirs, ours, weights = pair
    theirs.eval()
    x, given = images(torch, *shape)
    tensors = theirs.state_dict()
    params = with_empty(ours, weights.read_params(tensors))
    state = with_empty(ours, weights.read_state(tensors))
    specs = ours.specs(x)
    for made, wanted in ((params, specs.params), (state, specs.state)):
        found = {path: leaf.shape for path, leaf in leaf_paths(made)}
        assert found == {path: leaf.shape for path, leaf in leaf_paths(wanted)}
    used = {name for name, _ in weights.params.values()} | set(weights.state.values())
    assert {name for name in tensors if not name.endswith("num_batches_tracked")} == used
    run = jax.jit(lambda p, s, x: ours.apply(p, s, x, seed=0, step=0, microbatch=0, train=False)[0])
    with torch.no_grad():
        expected = theirs(given).logits.numpy()
    assert apart(run(params, state, x), expected) < 1e-5


def test_gradients_and_statistics_of_a_training_step_are_equal(torch, pair):
    """In float64: over fifty layers of BatchNorm, float32 keeps only some digits of a gradient."""
    theirs, ours, weights = pair
    rows = 4
    x, given = images(torch, rows, 64, 64, 3)
    labels = np.arange(rows) * 7
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.double().train()
    theirs.zero_grad()
    told = torch.nn.functional.cross_entropy(theirs(given.double()).logits, torch.tensor(labels))
    told.backward()
    their_grads = {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    their_state = with_empty(ours, weights.read_state(theirs.state_dict()))
    theirs.float().load_state_dict(before)

    def loss(params, state, x):
        logits, after, _ = ours.apply(params, state, x, seed=0, step=0, microbatch=0, train=True)
        return -jax.nn.log_softmax(logits)[jnp.arange(rows), labels].mean(), after

    with jax.enable_x64(True):
        made = weights.read_params(before), weights.read_state(before), x
        params, state, wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), made)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, after), grads = run(with_empty(ours, params), with_empty(ours, state), wide)
    assert float(value) == pytest.approx(told.item(), rel=1e-9)
    assert apart(grads, with_empty(ours, weights.read_params(their_grads))) < 1e-9
    # The variances differ by rows / (rows - 1): torch corrects them for the sample size.
    assert apart(means_of(after), means_of(their_state)) < 1e-9


def means_of(state):
    return [leaf for path, leaf in leaf_paths(state) if path.endswith("mean")]


def test_gpt2_computes_what_the_reference_computes(torch, transformers):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    ours = zoo.gpt2()
    weights = Weights()
    weights.params[("embed", "table")] = ("transformer.wte.weight", "as it is")
    weights.params[("embed", "positions")] = ("transformer.wpe.weight", "as it is")
    parts = {"qkv": "attn.c_attn", "merge": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for index in range(12):
        for norm in (1, 2):
            weights.scale(f"block{index}/norm{norm}", f"transformer.h.{index}.ln_{norm}")
        for name, part in parts.items():  # its Conv1D keeps (inputs, outputs), as we do
            weights.dense(f"block{index}/{name}", f"transformer.h.{index}.{part}", "as it is")
    weights.scale("norm", "transformer.ln_f")
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.ndim == 1:  # biases start at 0 and scales at 1: these would hide each other
                tensor.add_(torch.randn_like(tensor) * 0.1)
    tokens = np.random.default_rng(0).integers(0, 50257, (2, 48))
    params = with_empty(ours, weights.read_params(theirs.state_dict()))
    specs = ours.specs(tokens.astype(np.int32))
    wanted = {path: leaf.shape for path, leaf in leaf_paths(specs.params)}
    assert {path: leaf.shape for path, leaf in leaf_paths(params)} == wanted
    run = jax.jit(
        lambda p, x: ours.apply(
            p, with_empty(ours, {}), x, seed=0, step=0, microbatch=0, train=False
        )[0]
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert apart(run(params, tokens.astype(np.int32)), expected) < 1e-5
