"""The networks of `step_time.py`, once in Keras and once in PyTorch, and the data that they train on."""

import numpy as np

# name: shape of one sample, steps an epoch for batches of 32 and of 256
SHAPES = {
    "mlp": ((784,), {32: 400, 256: 100}),
    "tabular": ((200,), {32: 200, 256: 60}),
    "cnn_bn": ((32, 32, 3), {32: 24, 256: 6}),
    "resnet20": ((32, 32, 3), {32: 12, 256: 3}),
    "depthwise": ((32, 32, 3), {32: 24, 256: 6}),
    "transformer": ((64, 128), {32: 16, 256: 3}),
    "lstm": ((32, 16), {32: 60, 256: 20}),
    "gru": ((32, 16), {32: 60, 256: 20}),
}
CLASSES = 10


def make_data(name: str, batch_size: int, steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Random samples and labels, for so many steps: the time of a step does not depend on them."""
    shape, usual = SHAPES[name]
    random = np.random.default_rng(0)
    samples = batch_size * (steps or usual[batch_size])
    x = random.random((samples, *shape), dtype="float32")
    return x, random.integers(0, CLASSES, samples).astype("int32")


def build_keras(name: str):
    """The network in Keras, on whichever backend runs."""
    import keras

    layers = keras.layers
    inputs = x = keras.Input(SHAPES[name][0])

    def convolve(x, filters, size=3, strides=1, act=True):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        return layers.ReLU()(x) if act else x

    if name == "mlp":
        x = layers.Dense(128, activation="relu")(x)
    elif name == "tabular":
        for units in (1024, 512):
            x = layers.Dense(units, activation="relu")(x)
    elif name == "cnn_bn":
        for filters in (16, 32, 64):
            x = convolve(convolve(x, filters), filters, strides=2)
        x = layers.GlobalAveragePooling2D()(x)
    elif name == "resnet20":
        x = convolve(x, 16)
        for filters in (16, 32, 64):
            for block in range(3):
                strides = 2 if filters > 16 and block == 0 else 1
                y = convolve(convolve(x, filters, strides=strides), filters, act=False)
                x = convolve(x, filters, 1, strides, act=False) if strides > 1 else x
                x = layers.ReLU()(layers.Add()([x, y]))
        x = layers.GlobalAveragePooling2D()(x)
    elif name == "depthwise":
        x = convolve(x, 16, strides=2)
        for filters in (32, 64, 64, 128):
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
            x = convolve(layers.ReLU()(layers.BatchNormalization()(x)), filters, 1)
        x = layers.GlobalAveragePooling2D()(x)
    elif name == "transformer":
        for _ in range(2):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(4, 32)(y, y)])
            y = layers.Dense(512, activation="gelu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(128)(y)])
        x = layers.GlobalAveragePooling1D()(x)
    else:
        x = (layers.LSTM if name == "lstm" else layers.GRU)(64)(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def build_torch(name: str):
    """The same network in PyTorch; images come as NCHW in channels-last memory."""
    import torch
    from torch import nn

    def convolve(before, filters, size=3, strides=1, act=True):
        parts = [nn.Conv2d(before, filters, size, strides, size // 2, bias=False), nn.BatchNorm2d(filters)]
        return nn.Sequential(*parts, *([nn.ReLU()] if act else []))

    def pooled(*parts, filters):
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, CLASSES))

    class Residual(nn.Module):
        def __init__(self, before, filters, strides):
            super().__init__()
            self.body = nn.Sequential(
                convolve(before, filters, 3, strides), convolve(filters, filters, act=False)
            )
            self.skip = convolve(before, filters, 1, strides, False) if strides > 1 else nn.Identity()

        def forward(self, x):
            return torch.relu(self.skip(x) + self.body(x))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer
            blocks = [layer(128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)]
            self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(128, CLASSES)

        def forward(self, x):
            return self.head(self.blocks(x).mean(1))

    class Recurrent(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.body, self.head = kind(16, 64, batch_first=True), nn.Linear(64, CLASSES)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    if name == "tabular":
        units = [nn.Linear(200, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU()]
        return nn.Sequential(*units, nn.Linear(512, CLASSES))
    if name == "transformer":
        return Transformer()
    if name in ("lstm", "gru"):
        return Recurrent(nn.LSTM if name == "lstm" else nn.GRU)
    before, parts = 3, []
    if name == "cnn_bn":
        for filters in (16, 32, 64):
            parts += [convolve(before, filters), convolve(filters, filters, strides=2)]
            before = filters
        return pooled(*parts, filters=64)
    if name == "resnet20":
        parts, before = [convolve(3, 16)], 16
        for filters in (16, 32, 64):
            for block in range(3):
                parts.append(Residual(before, filters, 2 if filters > 16 and block == 0 else 1))
                before = filters
        return pooled(*parts, filters=64)
    parts, before = [convolve(3, 16, strides=2)], 16
    for filters in (32, 64, 64, 128):
        depthwise = nn.Conv2d(before, before, 3, 1, 1, groups=before, bias=False)
        parts += [depthwise, nn.BatchNorm2d(before), nn.ReLU(), convolve(before, filters, 1)]
        before = filters
    return pooled(*parts, filters=128)
