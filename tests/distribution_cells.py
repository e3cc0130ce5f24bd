"""Small trainings under a strategy, one for each cell of the matrix, and what came out of them.

`python tests/distribution_cells.py STRATEGY FILE`: its cells, in a process of their own for four devices,
and in one process for each worker under `TF_CONFIG`.
"""

import itertools
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import tfaccel

AXES = {
    "strategy": ("one_device_strategy", "mirrored2", "mirrored4", "multi_worker"),
    "precision": ("float32", "mixed_bfloat16", "mixed_float16"),
    "jit": (False, True),
    "steps_per_execution": (1, 3),
    "accumulation": (None, 2),
    "clip": (None, "clipnorm", "global_clipnorm", "clipvalue"),
    "data": ("arrays", "dataset", "tf_data", "py_dataset", "generator"),
    "batches": ("even", "odd"),
    "optimizer": ("SGD", "Adam", "AdamW", "RMSprop", "Lion"),
    "callback": (None, "schedule", "best_weights", "mask"),
    "layers": ("dense", "batch_norm", "dropout", "recurrent", "embedding", "train_step"),
    "kernels": ("auto", "plain"),
}
EPOCHS = 2


def refusal(cell):
    """What the error says where a cell is refused; None where it must run."""
    if cell["jit"] and cell["layers"] == "train_step":
        return "Keras's own train_step"
    several = cell["strategy"] != "one_device_strategy"
    return "XLA can't exchange" if cell["jit"] and several and cell["layers"] == "batch_norm" else None


def plain(cell, **changes):
    """The cell as plain Keras runs it on one device, rightly: the steps one by one, without XLA."""
    return {**cell, "kernels": "plain", "jit": False, "steps_per_execution": 1, **changes}


def pairwise(seed=0):
    """Cells such that every two values of two axes meet in one; the same list in every process."""
    random = np.random.default_rng(seed)
    names = list(AXES)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(AXES[a]))
        for j in range(len(AXES[b]))
    }
    cells = []
    while pairs:
        candidates = []
        for _ in range(30):
            choice = {name: int(random.integers(len(AXES[name]))) for name in names}
            choice["jit"] = int(random.random() < 0.15)  # compiling takes longer than all the rest
            a, i, b, j = sorted(pairs)[int(random.integers(len(pairs)))]
            choice |= {a: i, b: j}
            met = {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)} & pairs
            candidates.append((len(met), len(candidates), choice, met))
        _, _, choice, met = max(candidates)
        pairs -= met
        cells.append({name: AXES[name][index] for name, index in choice.items()})
    return cells


class OwnStep(keras.Model):
    """A training step by hand, as Keras's guide writes it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return self.get_metrics_result()


def samples():
    """61 samples with integer features (so that an embedding can take them) and targets."""
    random = np.random.default_rng(0)
    x = random.integers(0, 7, (61, 6)).astype("float32")
    x[:, 4:] = np.where(random.random((61, 2)) < 0.5, 0, x[:, 4:])  # what the recurrent layer masks
    y = (x @ random.normal(size=(6, 1)) / 10).astype("float32")
    return x, y


def build(cell):
    """The compiled model of a cell; call it inside of the scope."""
    keras.utils.set_random_seed(1)
    layers, kind = keras.layers, cell["layers"]
    inputs = keras.Input((6,))
    x = layers.Rescaling(1 / 7)(inputs)
    if kind == "recurrent":
        x = layers.GRU(4)(layers.Masking()(layers.Reshape((6, 1))(x)))
    elif kind == "embedding":
        x = layers.Flatten()(layers.Embedding(7, 3)(inputs))
    x = layers.Dense(8, activation="tanh")(x)
    if kind == "batch_norm":
        x = layers.BatchNormalization(momentum=0.5)(x)
    if kind == "dropout":
        x = layers.Dropout(0.3, seed=3)(x)
    outputs = layers.Dense(1, dtype="float32")(x)
    return (OwnStep if kind == "train_step" else keras.Model)(inputs, outputs)


def make_optimizer(cell):
    options = {} if cell["clip"] is None else {cell["clip"]: 0.05}
    if cell["optimizer"] == "SGD":
        options["momentum"] = 0.9
    rate = 0.003 if cell["optimizer"] == "Lion" else 0.01
    kind = getattr(keras.optimizers, cell["optimizer"])
    optimizer = kind(rate, gradient_accumulation_steps=cell["accumulation"], **options)
    if cell["precision"] == "mixed_float16":
        # Keras's own 2 ** 15 overflows in some first steps: in the sum of a batch, not in a share's.
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**8)
    return optimizer


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, i):
        rows = slice(i * self.size, (i + 1) * self.size)
        return self.x[rows], self.y[rows]


class Mask(keras.callbacks.Callback):
    """Sets weights while the model trains, as pruning does."""

    def on_epoch_begin(self, epoch, logs=None):
        kernel = next(v for v in self.model.trainable_variables if v.name == "kernel")
        kernel.assign(kernel * keras.ops.cast(np.arange(kernel.shape[0])[:, None] > 0, kernel.dtype))


def callbacks(cell):
    return {
        None: [],
        "schedule": [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)],
        "best_weights": [keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)],
        "mask": [Mask()],
    }[cell["callback"]]


def run(strategy, cell):
    """Trains a cell; weights, losses and an evaluation, or the text of the error before the first step."""
    x, y = samples()
    size = 16
    if cell["batches"] == "even":
        x, y = x[:48], y[:48]
    else:
        size = 15  # not even among two replicas, and the last batch holds one sample
    model = None
    try:
        accelerator = tfaccel.Accelerator(
            strategy,
            keras.DTypePolicy(cell["precision"]),  # by name, a CPU without float16 would refuse it
            cell["jit"],
            cell["kernels"],
            steps_per_execution=cell["steps_per_execution"],
        )
        with accelerator.scope():
            model = build(cell)
            model.compile(make_optimizer(cell), "mse", metrics=["mae"], **accelerator.compile_options())
        fit(accelerator, model, cell, x, y, size)
    except ValueError as error:
        seen = model is not None and model.optimizer is not None and model.optimizer.iterations is not None
        steps = keras.ops.convert_to_numpy(model.optimizer.iterations) if seen else 0
        return {"error": np.array(str(error)), "steps": np.array(steps)}
    evaluated = np.array(model.evaluate(x, y, batch_size=size, verbose=0))
    weights = {f"weight_{i:02}": w for i, w in enumerate(model.get_weights())}
    steps = keras.ops.convert_to_numpy(model.optimizer.iterations)
    history = np.array([values for _, values in sorted(model.history.history.items())])
    return {**weights, "history": history, "evaluated": evaluated, "steps": np.array(steps)}


def fit(accelerator, model, cell, x, y, size):
    options = {
        "epochs": EPOCHS,
        "verbose": 0,
        "shuffle": False,
        "callbacks": callbacks(cell),
        "validation_data": (x[:20], y[:20]),
        "validation_batch_size": size,
    }
    if cell["data"] == "arrays":
        model.fit(x, y, batch_size=size, **options)
    elif cell["data"] == "dataset":
        model.fit(accelerator.dataset(x, y, batch_size=size, shuffle=False), **options)
    elif cell["data"] == "tf_data":
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(size), **options)
    elif cell["data"] == "py_dataset":
        model.fit(Batches(x, y, size), **options)
    else:
        batches = Batches(x, y, size)
        forever = (batches[i % len(batches)] for i in itertools.count())
        model.fit(forever, steps_per_epoch=len(batches), **options)


def seen(strategy, kernels):
    """The mean of the targets that each epoch saw, from arrays shuffled with another seed in each process."""
    x, y = samples()
    accelerator = tfaccel.Accelerator(strategy, "float32", kernels=kernels)
    with accelerator.scope():
        model = build({"layers": "dense"})
        model.compile("sgd", "mse", metrics=[mean_target], **accelerator.compile_options())
    keras.utils.set_random_seed(os.getpid())
    model.fit(x, y, batch_size=16, epochs=3, verbose=0)
    return np.array(model.history.history["mean_target"] + [np.mean(y)])


def overflow(strategy):
    """Loss scale, steps and whether weights are finite after a batch that overflows in the second replica."""
    x, y = samples()
    y = np.concatenate([y[:15], [[1e38]], y[16:]]).astype("float32")
    accelerator = tfaccel.Accelerator(strategy, "float32")
    with accelerator.scope():
        model = build({"layers": "dense"})
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=1024.0)
        model.compile(optimizer, "mse", **accelerator.compile_options())
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    scale, steps = (keras.ops.convert_to_numpy(v) for v in (optimizer.dynamic_scale, optimizer.iterations))
    return np.array([scale, steps, all(np.isfinite(w).all() for w in model.get_weights())])


def mean_target(y_true, y_pred):
    """A metric: the mean over the samples says which of them were seen."""
    return y_true + 0 * y_pred


def mirrored(replicas):
    """Of logical CPUs; TensorFlow must have been told to have that many."""
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def main(kind, path):
    """Runs the cells of a strategy, and saves what `run` gave."""
    if kind == "mirrored4":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
        )
    made = tf.distribute.MultiWorkerMirroredStrategy() if kind == "multi_worker" else mirrored(4)
    results = {}
    for number, cell in enumerate(pairwise()):
        if cell["strategy"] == kind:
            print("cell", number, cell, flush=True)
            results |= {f"{number}/{name}": value for name, value in run(made, cell).items()}
    for kernels in AXES["kernels"]:
        results[f"-1/{kernels}"] = seen(made, kernels)
    results["-1/overflow"] = overflow(made)
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
