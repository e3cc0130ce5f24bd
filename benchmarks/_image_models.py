"""Small image nets, trained once and kept: what the export and compression benchmarks work on."""

import pathlib
import time

import datasets
import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfaccel

NAMES = ("residual", "separable")  # of CIFAR-10; "plain" is of Fashion-MNIST
EPOCHS = {"residual": 14, "separable": 14, "plain": 10}


def trained(name: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """The net with its weights, from the cache or trained now, and its images as float32 0..1."""
    data = datasets.load(_data(name))
    for split in ("train", "test"):
        images = data[f"x_{split}"].astype("float32") / 255
        data[f"x_{split}"] = images if images.ndim == 4 else images[..., None]
    path = kept(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = train(name, data)
        partial = path.with_name(f"partial-{path.name}")
        model.save(partial)
        partial.replace(path)
    return keras.models.load_model(path, compile=False), data


def kept(name: str) -> pathlib.Path:
    """Where the trained net lies."""
    return datasets.cache().parent / "models" / f"{_data(name)}-{name}.keras"


def _data(name: str) -> str:
    return "fashion_mnist" if name == "plain" else "cifar10"


def train(name: str, data: dict[str, np.ndarray]) -> keras.Model:
    """One-cycle AdamW on flipped and shifted images."""
    keras.utils.set_random_seed(0)
    accelerator = tfaccel.Accelerator(precision="float32")
    with accelerator.scope():
        model = build(name)
        _compile(model, accelerator)
    begun = time.monotonic()
    model.fit(
        _batches(data, 0),
        epochs=EPOCHS[name],
        verbose=2,
        callbacks=[tfaccel.OneCycle(max_learning_rate=6e-3)],
    )
    accuracy = model.evaluate(
        data["x_test"], keras.utils.to_categorical(data["y_test"], 10), batch_size=500, verbose=0
    )[1]
    print(f"{name}: {accuracy:.4f} on the test set after {time.monotonic() - begun:.0f} s", flush=True)
    return model


def train_on(
    model: keras.Model, data: dict[str, np.ndarray], seed: int, epochs: int, rate: float, callbacks: list
) -> None:
    """The same again for a net that is trained, with more callbacks."""
    keras.utils.set_random_seed(seed)
    accelerator = tfaccel.Accelerator(precision="float32")
    accelerator.adopt(model)
    with accelerator.scope():
        _compile(model, accelerator)
    cycle = tfaccel.OneCycle(rate, warmup=0.1)
    model.fit(_batches(data, seed), epochs=epochs, verbose=0, callbacks=[cycle, *callbacks])


def _compile(model: keras.Model, accelerator: tfaccel.Accelerator) -> None:
    model.compile(
        keras.optimizers.AdamW(weight_decay=0.02),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        metrics=["accuracy"],
        **accelerator.compile_options(),
    )


def _batches(data: dict[str, np.ndarray], seed: int) -> tf.data.Dataset:
    with tf.device("CPU:0"):
        images = tf.constant(data["x_train"])
        labels = tf.constant(keras.utils.to_categorical(data["y_train"], 10))

    def cut(rows):
        return _shift_and_flip(tf.gather(images, rows), tf.gather(labels, rows))

    return (
        tf.data.Dataset.range(len(images))
        .shuffle(50_000, seed=seed)
        .batch(128, drop_remainder=True)
        .map(cut, num_parallel_calls=2)
        .prefetch(4)
    )


def build(name: str) -> keras.Model:
    """A quarter-width ResNet-9, a MobileNet of eight separable blocks, or five convolutions."""
    inputs = keras.Input((28, 28, 1) if name == "plain" else (32, 32, 3), name="image")
    x = {"residual": _residual, "separable": _separable, "plain": _plain}[name](inputs)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="scores")(x), name=name)


def _residual(x):
    x = _block(x, 16, "stem")
    for units in (32, 64, 128):
        x = _block(x, units, f"down_{units}", strides=2)
        if units != 64:
            y = _block(_block(x, units, f"first_{units}"), units, f"second_{units}")
            x = layers.Add(name=f"add_{units}")([x, y])
    return x


def _separable(x):
    x = _block(x, 32, "stem")
    for index, (units, strides) in enumerate(
        [(64, 1), (96, 2), (96, 1), (192, 2), (192, 1), (192, 1), (256, 2), (256, 1)]
    ):
        x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False, name=f"depthwise_{index}")(x)
        x = layers.BatchNormalization(name=f"depthwise_norm_{index}")(x)
        x = layers.ReLU(6.0, name=f"depthwise_relu_{index}")(x)
        x = _block(x, units, f"pointwise_{index}", size=1)
    return x


def _plain(x):
    for index, (units, strides) in enumerate([(16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]):
        x = _block(x, units, f"block_{index}", strides)
    return x


def _block(x, units: int, name: str, strides: int = 1, size: int = 3):
    x = layers.Conv2D(units, size, strides, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(name=f"{name}_norm")(x))


def _shift_and_flip(images, labels):
    padded = tf.pad(images, [[0, 0], [4, 4], [4, 4], [0, 0]])
    rows = tf.shape(images)[0]
    offsets = tf.random.uniform([rows, 2], 0, 9, tf.int32)
    at = offsets[:, None, :] + tf.range(images.shape[1])[None, :, None]
    shifted = tf.gather(padded, at[..., 0], axis=1, batch_dims=1)
    shifted = tf.gather(shifted, at[..., 1], axis=2, batch_dims=1)
    flip = tf.random.uniform([rows, 1, 1, 1]) < 0.5
    return tf.where(flip, shifted[:, :, ::-1], shifted), labels
