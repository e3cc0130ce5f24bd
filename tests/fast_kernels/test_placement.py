"""Data in a GPU's memory. There is none here: the CPU stands in for it, with a GPU's rules for dtypes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel import free_memory
from tfaccel.fast_kernels import placement, resident, trial


@pytest.fixture
def gpu(monkeypatch):
    """What a step finds where TensorFlow has a GPU of 1 GB; gives the sizes that were put there."""
    sizes = []

    def put(tensor, device):
        kept = placement.put(tensor, "GPU:0")  # soft placement: the CPU, where there is no GPU
        sizes.append((kept.dtype.name, kept.shape.num_elements()))
        return kept

    monkeypatch.setattr(resident, "on_gpu", lambda: True)
    monkeypatch.setattr(resident, "step_device", lambda: "GPU:0")
    monkeypatch.setattr(resident, "free_gpu_memory_bytes", lambda: 1e9)
    monkeypatch.setattr(resident, "put", put)
    return sizes


def words(samples=70):
    """Token numbers (int32), bytes, and labels; the last batch of 16 is smaller."""
    random = np.random.default_rng(0)
    inputs = {
        "words": random.integers(0, 20, (samples, 5)).astype("int32"),
        "pixels": random.integers(0, 255, (samples, 4)).astype("uint8"),
        "facts": random.normal(size=(samples, 3)),  # float64: cast a batch at a time
    }
    return inputs, random.integers(0, 3, samples).astype("int32")


def build():
    layers = keras.layers
    inputs = {
        "words": keras.Input((5,), dtype="int32", name="words"),
        "pixels": keras.Input((4,), dtype="uint8", name="pixels"),
        "facts": keras.Input((3,), name="facts"),
    }
    embedded = layers.Flatten()(layers.Embedding(20, 2)(inputs["words"]))
    joined = layers.Concatenate()([embedded, layers.Rescaling(1 / 255)(inputs["pixels"]), inputs["facts"]])
    return keras.Model(inputs, layers.Dense(3)(joined))


def train(**options):
    keras.utils.set_random_seed(0)
    accelerator = tfaccel.Accelerator("one_device", "float32", kernels="fused")
    with accelerator.scope():
        model = build()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"], **accelerator.compile_options())
    dataset = accelerator.dataset(*words(), batch_size=16)
    history = model.fit(dataset, epochs=3, verbose=0, validation_data=words(30), **options)
    return model, history.history


@pytest.mark.parametrize("options", [{}, {"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}}])
def test_a_run_over_data_on_the_gpu_is_the_same_bit_for_bit(options, request):
    here, expected = train(**options)
    sizes = request.getfixturevalue("gpu")
    there, got = train(**options)
    assert got == expected
    for a, b in zip(here.get_weights(), there.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # The rows went over once for the whole run, and an order for each of three epochs.
    assert sizes.count(("int64", 70 * 5)) == 1
    assert sizes.count(("float16", 70 * 4)) == 1
    assert sizes.count(("float64", 70 * 3)) == 1
    assert sizes.count(("int64", 70)) == 1 + 3


def test_data_go_over_once_for_several_fits(gpu):
    accelerator = tfaccel.Accelerator("one_device", "float32", kernels="fused")
    with accelerator.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", **accelerator.compile_options())
    data = accelerator.dataset(np.ones((32, 4), "float32"), np.ones((32, 1), "float32"))
    for _ in range(2):
        model.fit(data, verbose=0)
        model.evaluate(data, verbose=0)
    assert gpu.count(("float32", 128)) == 1


SIZE = 70 * (5 * 8 + 4 * 2 + 3 * 8 + 8)  # of `words()` there: int32 becomes int64, uint8 float16


@pytest.mark.parametrize("free", [None, SIZE / resident.MEMORY_FRACTION - 1])
def test_data_that_take_too_much_of_the_gpu_stay_in_the_hosts_memory(gpu, monkeypatch, free):
    monkeypatch.setattr(resident, "free_gpu_memory_bytes", lambda: free)
    train()
    assert ("float16", 70 * 4) not in gpu


def test_data_that_just_fit_go_over(gpu, monkeypatch):
    monkeypatch.setattr(resident, "free_gpu_memory_bytes", lambda: SIZE / resident.MEMORY_FRACTION)
    train()
    assert ("float16", 70 * 4) in gpu


def test_strings_stay_in_the_hosts_memory(gpu):
    rows = tf.constant(["a", "b", "c", "d"])
    batches = resident.ResidentBatches((rows, tf.zeros([4])), 4, 2, False)
    begun = batches.on_device(batches.new_order())
    assert begun.batches is batches
    assert gpu == []


def test_without_a_gpu_nothing_is_moved():
    batches = resident.ResidentBatches((tf.zeros([4]),), 4, 2, False)
    assert batches.on_device(batches.new_order()).batches is batches
    assert placement.step_device() == "CPU:0"


@pytest.mark.parametrize(
    ("dtype", "device", "kept"),
    [("int32", "GPU:0", "int64"), ("int32", "CPU:0", "int32"), ("uint8", "GPU:0", "float16")],
)
def test_as_what_a_device_keeps_integers(dtype, device, kept):
    assert placement.stored_dtype(tf.as_dtype(dtype), device).name == kept


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_integers_come_back_exactly(dtype):
    limits = np.iinfo(dtype)
    some = np.linspace(limits.min, limits.max, 300).astype(dtype)
    tensor = tf.constant(some)
    back = tf.cast(placement.put(tensor, "GPU:0"), tensor.dtype)
    np.testing.assert_array_equal(back.numpy(), some)
    assert placement.can_keep(tensor.dtype)
    assert not placement.can_keep(tf.uint64)


def test_a_gpu_that_is_full_after_all_leaves_the_data_where_they_are(gpu, monkeypatch):
    def full(tensor, device):
        gpu.append("tried")
        raise tf.errors.ResourceExhaustedError(None, None, "no memory")

    monkeypatch.setattr(resident, "put", full)
    batches = resident.ResidentBatches((tf.zeros([4]),), 4, 2, False)
    for _ in range(2):
        assert batches.on_device(batches.new_order()).batches is batches
    assert gpu == ["tried"]


def test_a_limit_on_the_gpu_counts(monkeypatch):
    device = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    limit = [tf.config.LogicalDeviceConfiguration(memory_limit=4096)]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [device])
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [device])
    monkeypatch.setattr(tf.config, "get_logical_device_configuration", lambda gpu: limit)
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", lambda name: {"current": 2**20})
    monkeypatch.setattr(free_memory, "gpu_memory_bytes", lambda: 80 * 2**30)
    assert free_memory.free_gpu_memory_bytes() == 4 * 2**30 - 2**20


def test_convolutions_are_slow_in_xla_on_a_cpu_only(monkeypatch):
    def verdict(on_gpu):
        monkeypatch.setattr(trial, "on_gpu", lambda: on_gpu)
        monkeypatch.setattr(trial, "op_types", lambda program: ["Conv2D"])
        tried = trial.Trial(10**6, lambda text: None)
        for _ in range(4):
            tried.note(trial.Way.PLAIN, 1, 1.0)
        return tried.next_way(None)

    assert verdict(on_gpu=False) is trial.Way.PLAIN
    assert verdict(on_gpu=True) is trial.Way.LOOP
