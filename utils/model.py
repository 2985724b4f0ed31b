"""The network of the experiment: four convolutions, regular or deformable, on 28x28 digits."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.quiet_tensorflow import keras, tf

import h5py
import numpy as np

from utils.cli import PROJECT, UserError, reading
from utils.files import write_file
from utils.mnist import CLASSES, IMAGE_SIZE

CHECKPOINTS = PROJECT / "checkpoint"

# (filters, stride) of each 3x3 SAME convolution.
CONVOLUTIONS = ((32, 1), (64, 2), (128, 1), (128, 2))
KERNEL_SIZE = 3
CONVOLUTION_NAMES = tuple(f"conv{index}" for index in range(1, len(CONVOLUTIONS) + 1))

REGULAR, DEFORM, DEFORM_MODULATED = "regular_model", "deform_model", "deform_modulated_model"
DEFORM_V3, DEFORM_V4 = "deform_v3_model", "deform_v4_model"


def weights_file(name: str, folder: Path = CHECKPOINTS) -> Path:
    """Where the weights of the model `name` (REGULAR, DEFORM or DEFORM_MODULATED) are kept."""
    return Path(folder) / f"{name}.weights.h5"


def build_model(
    name: str,
    dtype_policy: str = "float32",
    convolutions: Sequence[tuple[int, int]] = CONVOLUTIONS,
) -> keras.Sequential:
    """Builds the CNN `name`: REGULAR, DEFORM (version 1) or DEFORM_MODULATED (version 2).

    DEFORM_V3 and DEFORM_V4 have a 1x1 convolution and the module of that version, which keeps the
    number of channels, in place of each convolution.

    Each of the four 3x3 convolutions has a bias and is followed by batch normalisation and ReLU;
    global average pooling and a dense layer yield the 10 logits. Layers of one role have one name
    in all models. Takes images `[N, 28, 28, 1]` with values from 0 to 255.

    Where a batch is shared among replicas, batch normalisation is over the whole of it. The logits
    are float32 under every dtype policy, since the loss is.

    Args:
      name: which network.
      dtype_policy: what it computes in.
      convolutions: (filters, stride) of each convolution.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    model = keras.Sequential(name=name)
    model.add(keras.Input((IMAGE_SIZE, IMAGE_SIZE, 1), dtype="uint8"))
    model.add(keras.layers.Rescaling(1 / 255, name="rescaling", dtype=dtype_policy))
    for index, (filters, strides) in enumerate(convolutions, start=1):
        if name in (DEFORM_V3, DEFORM_V4):
            model.add(keras.layers.Conv2D(filters, 1, name=f"expand{index}", dtype=dtype_policy))
        model.add(_convolution(name, filters, strides, f"conv{index}", dtype_policy))
        model.add(
            keras.layers.BatchNormalization(
                synchronized=replicas > 1, name=f"norm{index}", dtype=dtype_policy
            )
        )
        model.add(keras.layers.ReLU(name=f"relu{index}", dtype=dtype_policy))
    model.add(keras.layers.GlobalAveragePooling2D(name="pool", dtype=dtype_policy))
    model.add(keras.layers.Dense(CLASSES, name="logits", dtype="float32"))
    return model


def _convolution(
    model_name: str, filters: int, strides: int, name: str, dtype_policy: str
) -> keras.layers.Layer:
    arguments = {"strides": strides, "padding": "same", "name": name, "dtype": dtype_policy}
    if model_name == REGULAR:
        return keras.layers.Conv2D(filters, KERNEL_SIZE, **arguments)
    # Needs the compiled library, which the regular network does without.
    from deform_conv.layers import DeformableConv2D, DeformableConv2DV3, DeformableConv2DV4

    if model_name in (DEFORM_V3, DEFORM_V4):
        module = DeformableConv2DV3 if model_name == DEFORM_V3 else DeformableConv2DV4
        return module(KERNEL_SIZE, **arguments)
    modulated = model_name == DEFORM_MODULATED
    return DeformableConv2D(filters, KERNEL_SIZE, modulated=modulated, **arguments)


def load_model(name: str, path: Path | None = None, folder: Path = CHECKPOINTS) -> keras.Sequential:
    """Builds the model `name` and loads its weights from `path`, or from its file in `folder`.

    Raises:
      UserError: the file is missing, or holds no weights of this model, or numbers that are not
        finite.
    """
    path = Path(path or weights_file(name, folder))
    if not path.is_file():
        script = "train_regular_conv.py" if name == REGULAR else "tune_deform_conv.py"
        raise UserError(f"weights {path} not found: {script} writes them")
    if not path.name.endswith(".weights.h5"):  # or Keras would look for another format in it
        raise UserError(f"the name of weights must end in .weights.h5; it is {path}")
    model = build_model(name)
    with reading(f"{path} does not hold the weights of {name}"):
        if name != REGULAR:
            _check_for_offsets(path)
        model.load_weights(path)
    if bad := not_finite(model.variables):
        raise UserError(f"{path} holds NaN or infinite weights of {name}, in {bad}")
    return model


def _check_for_offsets(path: Path) -> None:
    """Raises if there are none: the deformable layers would load the regular network's weights."""
    names = []
    with h5py.File(path) as file:
        file.visit(names.append)
    if not any("offset_conv" in name for name in names):
        raise ValueError("it has no offsets")


def not_finite(variables: Iterable[keras.Variable]) -> str | None:
    """The path of the first of the variables with a NaN or infinity in it, if there is one."""
    return next(
        (variable.path for variable in variables if not np.isfinite(variable.numpy()).all()), None
    )


def offsets_of(model: keras.Model, layer_name: str, images: np.ndarray) -> np.ndarray:
    """The offsets `[N, OH, OW, 2 * 9]` that a deformable layer takes for `images`."""
    layer = model.get_layer(layer_name)
    return layer.offset(keras.Model(model.inputs[0], layer.input)(images)).numpy()


class _MemoryFile(io.BytesIO):
    """A file in memory that Keras takes for a weights file, which it knows by the name."""

    def __str__(self):
        return ".weights.h5"


def save_weights(model: keras.Model, path: Path) -> None:
    """Writes the weights, whole or not at all."""
    # Keras would write a trained model's optimizer too, which is twice the size of the weights.
    bare = build_model(model.name)
    bare.set_weights(model.get_weights())
    # HDF5 crashes if it cannot write to a disk all that it has begun to.
    file = _MemoryFile()
    bare.save_weights(file)
    write_file(path, file.getvalue())
