"""What TensorFlow is told, with described GPUs; there is none here."""

import pytest
import tensorflow as tf

import tfaccel
from tfaccel.prepare import gpu_memory

GPUS = [tf.config.PhysicalDevice(f"/physical_device:GPU:{index}", "GPU") for index in range(2)]


@pytest.fixture
def told(monkeypatch):
    """Two GPUs of 16 GiB, and what was said of them."""
    said = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: GPUS)
    monkeypatch.setattr(gpu_memory, "gpu_memory_bytes", lambda: 16 * 2**30)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda *given: said.append(given))
    monkeypatch.setattr(tf.config, "set_logical_device_configuration", lambda *given: said.append(given))
    return said


def test_without_a_limit_each_gpu_grows(told):
    assert tfaccel.limit_gpu_memory() == tuple(gpu.name for gpu in GPUS)
    assert told == [(gpu, True) for gpu in GPUS]


def test_a_limit_is_one_part_of_each_gpu_in_megabytes(told):
    tfaccel.limit_gpu_memory(3 * 2**30 + 5)
    assert told == [(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=3072)]) for gpu in GPUS]


def test_without_a_gpu_it_does_nothing():
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("there is a GPU")
    assert tfaccel.limit_gpu_memory() == tfaccel.limit_gpu_memory(2**30) == ()


def test_tensorflow_that_has_started_refuses(monkeypatch):
    tf.zeros([1])
    cpu, configure = tf.config.list_physical_devices("CPU")[0], tf.config.set_logical_device_configuration
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: GPUS)

    def as_on_the_cpu(gpu, growth):  # TensorFlow's own refusal, asked for another change that comes too late
        configure(cpu, [tf.config.LogicalDeviceConfiguration()] * 5)

    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", as_on_the_cpu)
    with pytest.raises(ValueError, match="Call limit_gpu_memory first"):
        tfaccel.limit_gpu_memory()


@pytest.mark.parametrize("given", [0, -1, 1000, 2.5e9, "4GB", True])
def test_bad_limits_are_refused(given):
    with pytest.raises(ValueError, match="memory_bytes="):
        tfaccel.limit_gpu_memory(given)


def test_more_than_there_is_is_refused(told):
    with pytest.raises(ValueError, match="at most the 17179869184"):
        tfaccel.limit_gpu_memory(17 * 2**30)
    assert told == []
