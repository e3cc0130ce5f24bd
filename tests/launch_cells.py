"""What `test_launch.py` runs on workers; as a script: `launch_cells.py CASE FOLDER [SIGNAL]`."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf

import tfaccel
from tfaccel.demo.images import load_images
from tfaccel.fast_kernels import chunks

EPOCHS = 5
KILLED_IN = 3  # the epoch at whose beginning the second worker comes to grief


def images():
    """64 real images, shrunk to 7×7, and their labels."""
    data = load_images()
    return data["x_train"][:64].reshape(64, 7, 4, 7, 4, 1).mean((2, 4)).astype("float32"), data["y_train"][
        :64
    ]


def build(accelerator):
    keras.utils.set_random_seed(1)
    with accelerator.scope():
        model = keras.Sequential(
            [
                keras.Input((7, 7, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(8, "tanh"),
                keras.layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss, **accelerator.compile_options())
    return model


def train(epochs):
    """What the chief gives back: losses, weights, and how many replicas there were."""
    accelerator = tfaccel.Accelerator(precision="float32")
    model = build(accelerator)
    x, y = images()
    history = model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    print("trained on", accelerator.strategy.num_replicas_in_sync)
    return history.history["loss"], model.get_weights(), accelerator.strategy.num_replicas_in_sync


def make_smaller():
    """The kernels of a network that was pruned and clustered in one fit."""
    accelerator = tfaccel.Accelerator(precision="float32")
    model = build(accelerator)
    everything = keras.layers.Layer
    callbacks = [tfaccel.PruneWeights(0.5, layers=everything), tfaccel.ClusterWeights(6, layers=everything)]
    x, y = images()
    model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    return [weights for weights in model.get_weights() if weights.ndim > 1]


def fail_on_the_second():
    """Raises on the second worker; the first waits for it longer than anybody wants to."""
    cluster = tfaccel.cluster.find_cluster(os.environ)
    if cluster.index == 1:
        raise KeyError("a bad day")
    time.sleep(120)


def seen():
    """The mean of the labels that each epoch saw, where each worker's pipeline shuffles without a seed."""
    accelerator = tfaccel.Accelerator(precision="float32")
    _, y = images()
    means = {}
    for policy in ("AUTO", "DATA", "OFF"):
        model = build(accelerator)
        with accelerator.scope():
            model.compile("sgd", model.loss, metrics=[mean_label])
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = getattr(
            tf.data.experimental.AutoShardPolicy, policy
        )
        data = tf.data.Dataset.from_tensor_slices(images()).with_options(options).shuffle(64)
        if policy == "OFF":  # then every worker takes its own share
            data = data.shard(2, tfaccel.cluster.find_cluster(os.environ).index)
        history = model.fit(data.batch(16), epochs=2, verbose=0)
        means[policy] = history.history["mean_label"]
    return means, float(np.mean(y))


def records(folder, split):
    """The images and labels in two binary files, the first with `split` of the 64."""
    x, y = images()
    rows = np.concatenate([x.reshape(64, -1), y[:, None].astype("float32")], axis=1)
    index = tfaccel.cluster.find_cluster(os.environ).index
    paths = [str(pathlib.Path(folder, f"{index}-{part}.bin")) for part in range(2)]
    for path, part in zip(paths, (rows[:split], rows[split:]), strict=True):
        part.tofile(path)
    data = tf.data.Dataset.from_tensor_slices(paths)
    data = data.interleave(lambda path: tf.data.FixedLengthRecordDataset(path, 4 * rows.shape[1]))
    decoded = data.map(lambda record: tf.io.decode_raw(record, tf.float32))
    return decoded.map(lambda row: (tf.reshape(row[:-1], (7, 7, 1)), tf.cast(row[-1], tf.int32)))


def seen_in_files(folder):
    """As `seen`, of files that the workers share; the second time one has more than the other."""
    accelerator = tfaccel.Accelerator(precision="float32")
    means = []
    for split in (32, 24):
        model = build(accelerator)
        with accelerator.scope():
            model.compile("sgd", model.loss, metrics=[mean_label])
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.FILE
        data = records(folder, split).with_options(options).batch(16)
        means.append(model.fit(data, epochs=2, verbose=0).history["mean_label"])
    return means, float(np.mean(images()[1]))


def clocks_apart():
    """Arrays and a stream; the second worker thinks its calls are slow: they must not grow on one only."""
    accelerator = tfaccel.Accelerator(precision="float32")
    if not accelerator.is_chief:
        chunks.CALL_SECONDS = 0.0
    x, y = images()
    losses = []
    for data in (
        accelerator.dataset(x, y, batch_size=4),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
    ):
        model = build(accelerator)
        with accelerator.scope():
            model.compile("sgd", model.loss)  # one step a call, to begin with
        losses += model.fit(data, epochs=4, verbose=0).history["loss"]
    return losses


def fail_once(folder):
    """Raises on the second worker in its first life."""
    marker = pathlib.Path(folder, "was-here")
    if tfaccel.cluster.find_cluster(os.environ).index == 1 and not marker.exists():
        marker.write_text("")
        raise KeyError("first life")
    while not marker.exists():
        time.sleep(0.1)
    return "second life"


def mean_label(y_true, y_pred):
    return keras.ops.cast(y_true, "float32") + 0 * y_pred[:, :1]


class ComesToGrief(keras.callbacks.Callback):
    """Sends the second worker a signal, in its first life only."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def on_epoch_begin(self, epoch, logs=None):
        index = tfaccel.cluster.find_cluster(os.environ).index
        if epoch == KILLED_IN and self.name and index == 1 and os.environ["TFACCEL_RESTART"] == "0":
            os.kill(os.getpid(), getattr(signal, self.name))
            time.sleep(120)


def restart(folder, name):
    """Trains with the callbacks that write, one path for all workers, shuffled."""
    accelerator = tfaccel.Accelerator(precision="float32")
    model = build(accelerator)
    callbacks = [
        keras.callbacks.BackupAndRestore(folder / "backup"),
        keras.callbacks.ModelCheckpoint(folder / "model.keras"),
        keras.callbacks.CSVLogger(folder / "log.csv", append=True),
        ComesToGrief(name),
    ]
    data = accelerator.dataset(*images(), batch_size=16)
    model.fit(data, epochs=EPOCHS, verbose=2, callbacks=callbacks)
    # A restored epoch must be gone in the next fit.
    again = model.fit(data, epochs=2, verbose=0)
    assert len(again.history["loss"]) == 2
    index = tfaccel.cluster.find_cluster(os.environ).index
    np.savez(folder / f"weights{index}.npz", *model.get_weights())


def own_list(folder):
    """Two fits with one `CallbackList` of the user's, and with validation."""
    folder = pathlib.Path(folder)
    accelerator = tfaccel.Accelerator(precision="float32")
    model = build(accelerator)
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    writer = keras.callbacks.CSVLogger(folder / "log.csv", append=True)
    callbacks = keras.callbacks.CallbackList([backup, writer], add_history=True, model=model)
    x, y = images()
    for _ in range(2):
        model.fit(x, y, epochs=2, verbose=0, validation_data=(x, y), callbacks=callbacks)
    return (folder / "log.csv").read_text()


def leave():
    sys.exit(0)


def give_a_lock():
    return threading.Lock()


def fail_then_die():
    """Raises in its first life, is killed in its second."""
    if os.environ["TFACCEL_RESTART"] == "0":
        raise KeyError("first life")
    os.kill(os.getpid(), signal.SIGKILL)


def late(folder):
    tf.constant(1)
    tfaccel.Accelerator()


def parent(folder):
    """Leaves a child behind that keeps the output open, and fails on the second worker."""
    child = subprocess.Popen(["sleep", "60"])
    index = tfaccel.cluster.find_cluster(os.environ).index
    (folder / f"child{index}").write_text(str(child.pid))
    if index == 1:
        sys.exit(3)
    time.sleep(60)


def forever(folder):
    """Trains until it is told to end; says when it has begun."""
    accelerator = tfaccel.Accelerator(precision="float32")
    model = build(accelerator)
    index = tfaccel.cluster.find_cluster(os.environ).index
    begun = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: (folder / f"pid{index}").write_text(str(os.getpid()))
    )
    model.fit(*images(), epochs=100_000, verbose=0, callbacks=[begun])


def unwritable(folder):
    (folder / "file").write_text("")
    model = build(tfaccel.Accelerator(precision="float32"))
    model.fit(*images(), verbose=0, callbacks=[keras.callbacks.BackupAndRestore(folder / "file" / "backup")])


def too_few(folder):
    model = build(tfaccel.Accelerator(precision="float32"))
    x, y = images()
    model.fit(x[:1], y[:1], verbose=0)


def plain_keras(folder):
    """The defects as they are upstream, for the canaries: no tfaccel here."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    order = list(tf.data.Dataset.range(64).shuffle(64).as_numpy_iterator())
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    checkpoint = keras.callbacks.ModelCheckpoint(folder / f"model{index}.keras")
    checkpoint.set_model(model)
    checkpoint.on_epoch_end(0, {})
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)
    (folder / f"survived{index}.json").write_text(json.dumps([int(i) for i in order]))


def drive_ray(folder):
    """Runs the calls that `folder` holds on Ray, by their numbers from standard input, and leaves answers."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    for line in sys.stdin:
        number = line.strip()
        function, arguments, options = pickle.loads((folder / f"call{number}").read_bytes())
        try:
            answer = tfaccel.launch.run(function, arguments, engine="ray", **options), None
        except tfaccel.launch.WorkerError as error:
            answer = None, error
        (folder / "unfinished").write_bytes(pickle.dumps(answer))
        (folder / "unfinished").rename(folder / f"answer{number}")
    ray.shutdown()


if __name__ == "__main__":
    case, place = sys.argv[1], pathlib.Path(sys.argv[2])
    globals()[case](place, *sys.argv[3:])
