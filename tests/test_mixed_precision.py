"""Training in mixed precision: 16 bits where they suffice, and the result of float32."""

import json
from argparse import Namespace

import h5py
import numpy as np
import pytest
import tensorflow as tf
from conftest import script

import train_regular_conv
import tune_deform_conv
from utils.cli import UserError
from utils.loss_scale import LossScaleOptimizer
from utils.model import DEFORM_MODULATED, REGULAR, build_model, load_model, weights_file
from utils.training import make_optimizer
from utils.training_state import TrainingState

MIXED = {"mixed_float16": tf.float16, "mixed_bfloat16": tf.bfloat16}
FEW = ("--epochs", "2", "--train-digits", "128", "--test-digits", "100")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that runs a script under a policy, once; returns the folder that it wrote to."""
    done = {}

    def train_once(program, policy):
        if (program, policy) not in done:
            folder = done[program, policy] = tmp_path_factory.mktemp(policy)
            arguments = [*FEW, "--dtype-policy", policy, "--history", str(folder / "history")]
            arguments += ["--checkpoint-dir", str(folder)]
            if program is tune_deform_conv:
                arguments += ["--modulated", "--regular-weights", str(weights_file(REGULAR))]
                arguments += ["--batch-size", "16"]  # so that there is something to average
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", [program.__name__, *arguments])
                program.main()
        return done[program, policy]

    return train_once


def last_epoch(folder):
    return json.loads((folder / "history").read_text().splitlines()[-1])


# A number has 11 significant bits in float16 and 8 in bfloat16.
@pytest.mark.parametrize(
    ("program", "policy", "rtol"),
    [
        (train_regular_conv, "mixed_float16", 2e-3),
        (train_regular_conv, "mixed_bfloat16", 2e-2),
        (tune_deform_conv, "mixed_float16", 5e-3),
    ],
)
def test_mixed_precision_converges_as_float32_does(program, policy, rtol, trained):
    mixed, expected = (last_epoch(trained(program, each)) for each in (policy, "float32"))
    assert mixed["loss"] != expected["loss"]
    np.testing.assert_allclose(mixed["loss"], expected["loss"], rtol=rtol)
    np.testing.assert_allclose(mixed["accuracy"], expected["accuracy"], atol=0.03)


def test_the_weights_file_is_float32_and_of_a_float32_model(trained):
    folder = trained(train_regular_conv, "mixed_float16")
    dtypes = set()
    with h5py.File(weights_file(REGULAR, folder)) as file:
        file.visititems(lambda _, item: dtypes.add(getattr(item, "dtype", None)))
    assert dtypes - {None} == {np.dtype(np.float32)}
    assert load_model(REGULAR, folder=folder).dtype_policy.name == "float32"


@pytest.mark.parametrize("policy", MIXED)
def test_features_are_16_bit_but_offsets_masks_weights_and_logits_are_not(policy):
    model = build_model(DEFORM_MODULATED, policy)
    features = tf.zeros([1, 28, 28, 1])
    layer = model.get_layer("conv1")
    assert layer(features).dtype == MIXED[policy]
    assert layer.offset(features).dtype == layer.mask(features).dtype == tf.float32
    assert {variable.dtype for variable in model.variables} == {"float32"}
    assert model(tf.zeros([1, 28, 28, 1], tf.uint8)).dtype == tf.float32


# --- Loss scale ---


def state(folder, policy):
    """Model, optimizer and state of a training that is about to begin or to go on."""
    model = build_model(REGULAR, policy)
    for variable in model.variables:
        variable.assign(tf.ones_like(variable))
    optimizer = make_optimizer(1e-3, 10, policy)
    optimizer.build(model.trainable_variables)
    arguments = Namespace(checkpoint_dir=folder, restart=False, dtype_policy=policy)
    return optimizer, TrainingState(model, optimizer, arguments, tf.distribute.get_strategy())


def test_float16_alone_is_trained_with_a_loss_scale():
    assert isinstance(make_optimizer(1e-3, 10, "mixed_float16"), LossScaleOptimizer)
    for policy in ("float32", "mixed_bfloat16"):
        assert not isinstance(make_optimizer(1e-3, 10, policy), LossScaleOptimizer)


def test_the_loss_scale_and_what_it_wraps_are_restored(tmp_path):
    optimizer, interrupted = state(tmp_path, "mixed_float16")
    for index, variable in enumerate(optimizer.variables):
        variable.assign(tf.fill(variable.shape, tf.cast(index, variable.dtype)))
    interrupted.save(loss=2.0, accuracy=0.5)

    optimizer, resumed = state(tmp_path, "mixed_float16")
    resumed.begin()
    assert resumed.epochs_done == 1
    names = [variable.name for variable in optimizer.variables]
    assert {"dynamic_scale", "step_counter", "iteration"} <= set(names)
    for index, variable in enumerate(optimizer.variables):
        np.testing.assert_array_equal(variable, index)


def test_a_training_does_not_go_on_under_another_policy(tmp_path):
    state(tmp_path, "mixed_float16")[1].save(loss=2.0, accuracy=0.5)
    with pytest.raises(UserError, match="begun with other settings"):
        state(tmp_path, "mixed_bfloat16")[1].begin()


OVERFLOW_ON_THE_SECOND_REPLICA = """
from argparse import Namespace
import numpy as np
import tensorflow as tf
from utils.strategy import open_strategy
from utils.training import make_optimizer
with open_strategy(Namespace(strategy="mirrored", logical_cpus=2)) as strategy:
    with strategy.scope():
        variable = tf.Variable(1.0)
        optimizer = make_optimizer(1e-3, 10, "mixed_float16")
        optimizer.build([variable])
    scale = optimizer.dynamic_scale.numpy()
    @tf.function
    def step(second_gradient):
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient = tf.where(tf.equal(replica, 1), second_gradient, 1.0)
            optimizer.apply([gradient], [variable])
        strategy.run(replica_step)
    step(tf.constant(np.inf))
    assert variable.numpy() == 1.0 and optimizer.dynamic_scale.numpy() == scale / 2
    step(tf.constant(1.0))
    assert variable.numpy() < 1.0
"""


def test_an_overflow_on_any_replica_leaves_out_the_step_on_all():
    script("-c", OVERFLOW_ON_THE_SECOND_REPLICA, CUDA_VISIBLE_DEVICES="")
