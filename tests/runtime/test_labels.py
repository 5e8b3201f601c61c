"""Labels that the model has no class for end a run before any of it is started."""

import numpy as np
import optax
import pytest

import crowdmesh_jax as cm
from crowdmesh_jax import errors


def test_a_label_that_the_model_has_no_class_for_ends_before_anything_is_started(tmp_path):
    inputs, targets = np.zeros((8, 8, 8, 1), np.float32), np.array([0, 1, 2, 3, 4, 2, 1, 0])
    job = cm.TrainingJob(
        cm.zoo.mlp((4, 4, 4), classes=4), cm.losses.softmax_cross_entropy, optax.sgd(0.1), 2
    )
    data = cm.ArraySource(inputs, targets, 2)
    told = r"targets: expected 0 .. 3, as the model has 4 classes; found 4 in row 4; .* 5 classes"
    with pytest.raises(errors.DataError, match=told):
        cm.train(job, cm.Crowd.local(), data, steps=1, runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(errors.DataError, match=told):
        cm.reference(job, data, 1)


def test_tokens_are_looked_at_all_over_the_text():
    job = cm.TrainingJob(
        cm.zoo.build("gpt2_test"), cm.losses.softmax_cross_entropy, optax.sgd(0.1), 2
    )
    text = cm.TextSource(np.arange(70), 32, 2)
    with pytest.raises(errors.DataError, match=r"tokens: .* 65 classes; found 65 in row 65"):
        cm.reference(job, text, 1)


def test_a_source_of_ones_own_is_looked_at_for_the_first_step():
    class Own:
        def batch(self, step):
            return np.zeros((2, 6), np.float32), np.array([1, 7])

    job = cm.TrainingJob(
        cm.zoo.mlp((4, 4, 4), classes=4), cm.losses.softmax_cross_entropy, optax.sgd(0.1), 2
    )
    with pytest.raises(errors.DataError, match=r"targets of step 0: .* found 7 in row 1"):
        cm.reference(job, Own(), 1)
