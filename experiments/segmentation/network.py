"""The encoder-decoders that the experiment compares."""

from utils.quiet_tensorflow import keras

from deform_conv.layers import DeformableConv2D
from experiments.segmentation.glyphs import NAMES
from experiments.segmentation.scenes import SIZE
from experiments.segmentation.settings import Arm

CONVOLUTIONS = (1, 2, 2, 2)  # in each stage of the encoder
DEFORMABLE_STAGES = (2, 3)  # the last two


def build(arm: Arm) -> keras.Model:
    """A U-shaped network from images `[N, SIZE, SIZE, 3]`, from 0 to 255, to logits.

    The logits are `[N, SIZE, SIZE, classes]`.

    Encoder: stages of 3x3 convolutions, each with batch normalisation and ReLU, and maximum pooling
    between the stages. Decoder: bilinear upsampling, concatenation with the stage of that size, and
    such a convolution, regular in every arm. A 1x1 convolution gives the logits. Deformable layers
    are named `deform1`, `deform2` and so on.
    """
    inputs = keras.Input((SIZE, SIZE, 3))
    features = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    stages, layers = [], 0
    for stage, (width, count) in enumerate(zip(arm.widths, CONVOLUTIONS, strict=True)):
        if stage:
            features = keras.layers.MaxPooling2D()(features)
        for _ in range(count):
            convolution = _convolution(width)
            if arm.deformable and stage in DEFORMABLE_STAGES:
                layers += 1
                convolution = _convolution(
                    width, DeformableConv2D, modulated=arm.modulated, name=f"deform{layers}"
                )
            features = _normalised(convolution(features))
        stages.append(features)
    for skip in reversed(stages[:-1]):
        features = keras.layers.UpSampling2D(interpolation="bilinear")(features)
        features = keras.layers.Concatenate()([features, skip])
        features = _normalised(_convolution(skip.shape[-1])(features))
    return keras.Model(inputs, keras.layers.Conv2D(len(NAMES), 1, name="logits")(features))


def _convolution(width: int, layer: type = keras.layers.Conv2D, **options) -> keras.layers.Layer:
    # Batch normalisation follows, so a bias would do nothing.
    return layer(
        width, 3, padding="same", use_bias=False, kernel_initializer="he_normal", **options
    )


def _normalised(features):
    # Keras's momentum of 0.99 would remember the start of a short training.
    return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.95)(features))


def parameters(model: keras.Model) -> int:
    """The number of trained weights."""
    return sum(int(variable.shape.num_elements()) for variable in model.trainable_variables)


def deformable_layers(model: keras.Model) -> list[DeformableConv2D]:
    return [layer for layer in model.layers if isinstance(layer, DeformableConv2D)]
