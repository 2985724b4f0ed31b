"""`LossScaleOptimizer`: float16 training on any number of replicas."""

from utils.quiet_tensorflow import keras, tf


@keras.saving.register_keras_serializable(package="deform_conv")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's optimizer of this name, which leaves out a step if gradients of any replica overflow.

    Keras 3.15 asks the first replica only. Infinity on another one makes the weights NaN, and a
    worker that left out a step alone would make the others wait for ever.
    """

    def check_finite(self, grads):
        overflowed = tf.cast(tf.logical_not(super().check_finite(grads)), tf.float32)
        replica = tf.distribute.get_replica_context()
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, overflowed) == 0
