"""Strategy, precision, XLA and steps: the tables of the modules, and every bad name."""

import dataclasses
import time

import keras
import pytest
import tensorflow as tf

from tfaccel.cluster import tf_config
from tfaccel.keras_fixes.compile_checks import is_distributed
from tfaccel.prepare import strategy as strategy_module
from tfaccel.prepare.devices import Devices
from tfaccel.prepare.execution import (
    choose_batch_norm,
    choose_jit,
    choose_kernels,
    choose_steps_per_execution,
    explain_replicas,
)
from tfaccel.prepare.precision import choose_precision
from tfaccel.prepare.strategy import (
    choose_strategy,
    connect_tpu_strategy,
    default_strategy,
)

CPU = Devices("cpu", 1, ("CPU",))
TPU = Devices("tpu", 8, ("TPU",), bfloat16=True)


def gpu(count, capability):
    return Devices(
        "gpu", count, ("GPU",) * count, compute_capability=capability,
        bfloat16=capability >= (8, 0), float16=capability >= (5, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "policy"),
    [
        (CPU, "float32"),
        (dataclasses.replace(CPU, bfloat16=True, float16=True), "float32"),
        (gpu(1, (6, 1)), "float32"),
        (gpu(1, (7, 0)), "mixed_float16"),
        (gpu(1, (7, 5)), "mixed_float16"),
        (gpu(1, (8, 0)), "mixed_bfloat16"),
        (gpu(2, (9, 0)), "mixed_bfloat16"),
        (TPU, "mixed_bfloat16"),
        (Devices("gpu", 1, ("GPU",)), "float32"),
    ],
)
def test_precision_follows_the_hardware(devices, policy):
    choice = choose_precision("auto", devices)
    assert choice.value.name == policy
    assert choice.reason
    assert not choice.by_user


def test_float16_on_a_device_without_it_is_refused():
    with pytest.raises(ValueError, match=r"mixed_float16.*no float16 arithmetic"):
        choose_precision("mixed_float16", CPU)
    assert choose_precision("mixed_float16", gpu(1, (7, 0))).by_user
    assert choose_precision("bfloat16", CPU).value.name == "bfloat16"


def test_a_policy_object_is_taken_as_it_is():
    policy = keras.DTypePolicy("mixed_bfloat16")
    assert choose_precision(policy, CPU).value is policy


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision='fp16'.*Allowed: 'auto'"):
        choose_precision("fp16", CPU)


@pytest.mark.parametrize("devices", [CPU, gpu(1, (8, 0))])
def test_one_device_needs_no_strategy(devices):
    choice = choose_strategy("auto", devices, environment={})
    assert not is_distributed(choice.value)


def test_mirrored_on_request(helpers):
    choice = choose_strategy("mirrored", CPU)
    assert choice.value.num_replicas_in_sync == 2
    assert is_distributed(choice.value)


def test_a_strategy_object_is_taken_as_it_is():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    assert choose_strategy(strategy, CPU).value is strategy


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"strategy='ddp'.*'mirrored'"):
        choose_strategy("ddp", CPU)


def test_multi_worker_without_tf_config_is_refused():
    with pytest.raises(ValueError, match=r"nothing names any.*TF_CONFIG"):
        choose_strategy("multi_worker", CPU, environment={})


@pytest.mark.parametrize("requested", ["auto", "multi_worker"])
def test_multi_worker_when_the_environment_says_so(monkeypatch, requested):
    made = []
    monkeypatch.setattr(strategy_module, "_of_workers", lambda cluster, kind: made.append(cluster) or "made")
    environment = {"TF_CONFIG": tf_config(["a:1", "b:1"], 1)}
    choice = choose_strategy(requested, CPU, environment=environment)
    assert choice.value == "made"
    assert "TF_CONFIG names 2 workers; this is worker 1" in choice.reason
    assert made[0].addresses == ("a:1", "b:1")


def test_tpu_is_used_when_it_answers():
    named = dataclasses.replace(CPU, tpu_environment=("TPU_NAME",))
    stand_in = default_strategy()
    choice = choose_strategy("auto", named, environment={}, connect_tpu=lambda: stand_in)
    assert choice.value is stand_in
    assert "answered" in choice.reason
    assert choose_strategy("tpu", TPU, connect_tpu=lambda: stand_in).by_user


def test_a_tpu_that_does_not_answer_costs_no_run():
    def silent():
        raise RuntimeError("no answer within 60 s")

    named = dataclasses.replace(CPU, tpu_environment=("TPU_NAME",))
    choice = choose_strategy("auto", named, environment={}, connect_tpu=silent)
    assert not is_distributed(choice.value)
    assert "no answer" in choice.reason


def test_tpu_without_a_sign_of_one_is_refused():
    with pytest.raises(ValueError, match="no sign of a TPU"):
        choose_strategy("tpu", CPU)


@pytest.mark.slow
def test_an_unreachable_tpu_is_given_up_in_time(monkeypatch):
    """The real resolver against a closed port, which TensorFlow alone waits for over 590 s."""
    monkeypatch.setenv("TPU_NAME", "grpc://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer within 8 s"):
        connect_tpu_strategy(timeout_s=8)
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_machine_without_tpu_kernels_says_so(monkeypatch):
    monkeypatch.setenv("TPU_NAME", "local")
    with pytest.raises(RuntimeError):
        connect_tpu_strategy(timeout_s=60)


def test_parameter_server_is_refused():
    class Stub(tf.distribute.experimental.ParameterServerStrategy):
        """A real one needs a running cluster; the type decides."""

        def __init__(self):
            pass

    with pytest.raises(ValueError, match=r"can't drive model\.fit"):
        choose_strategy(Stub(), CPU)


def mirrored():
    return choose_strategy("mirrored", CPU).value


def central_storage():
    return tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])


def test_jit_choices():
    one = default_strategy()
    assert choose_jit("auto", CPU, one).value is False
    assert choose_jit("auto", gpu(1, (8, 0)), one).value == "auto"
    assert choose_jit("auto", gpu(2, (8, 0)), mirrored()).value is False
    assert choose_jit(True, CPU, one).value is True
    assert choose_jit(True, CPU, mirrored()).value is True
    with pytest.raises(ValueError, match=r"jit=True.*CentralStorageStrategy"):
        choose_jit(True, CPU, central_storage())
    with pytest.raises(ValueError, match="jit='yes'"):
        choose_jit("yes", CPU, one)


def test_steps_per_execution_choices():
    one = default_strategy()
    assert choose_steps_per_execution("auto", "auto", one).value > 1
    assert choose_steps_per_execution("auto", "plain", one).value == 1
    assert choose_steps_per_execution("auto", "auto", mirrored()).value > 1
    assert choose_steps_per_execution("auto", "auto", central_storage()).value == 1
    assert choose_steps_per_execution(2, "auto", mirrored()).value == 2
    assert choose_steps_per_execution(7, "auto", one).value == 7
    for bad in (0, -1, 1.5, True, "many"):
        with pytest.raises(ValueError, match="steps_per_execution"):
            choose_steps_per_execution(bad, "auto", one)
    with pytest.raises(ValueError, match="CentralStorageStrategy"):
        choose_steps_per_execution(2, "auto", central_storage())


@pytest.mark.parametrize(
    ("requested", "devices", "value"),
    [
        ("plain", CPU, "plain"),
        ("auto", CPU, "fused"),
        ("fused", CPU, "fused"),
        ("auto", gpu(1, (8, 0)), "plain"),
        ("fused", gpu(1, (8, 0)), "fused"),
    ],
)
def test_kernels_follow_the_device(requested, devices, value):
    choice = choose_kernels(requested, devices, tf.distribute.get_strategy())
    assert choice.value == value
    assert choice.reason
    assert choice.by_user == (requested != "auto")


def test_kernels_under_several_replicas():
    assert choose_kernels("auto", CPU, mirrored()).value == "fused"
    assert choose_kernels("auto", gpu(2, (8, 0)), mirrored()).value == "plain"
    assert choose_kernels("auto", CPU, central_storage()).value == "plain"
    with pytest.raises(ValueError, match="kernels='fused' is not usable"):
        choose_kernels("fused", CPU, central_storage())
    with pytest.raises(ValueError, match="kernels='fast' is not usable"):
        choose_kernels("fast", CPU, tf.distribute.get_strategy())


def test_batch_norm_choices():
    one = default_strategy()
    assert choose_batch_norm("auto", one).value == "local"
    assert choose_batch_norm("auto", mirrored()).value == "synchronized"
    assert choose_batch_norm("local", mirrored()).value == "local"
    with pytest.raises(ValueError, match="batch_norm='global' is not usable"):
        choose_batch_norm("global", one)


@pytest.mark.parametrize(
    ("strategy", "devices", "all_reduce"),
    [
        (tf.distribute.MirroredStrategy, CPU, "to one device"),
        (tf.distribute.MirroredStrategy, TPU, "TensorFlow's"),
        (tf.distribute.MultiWorkerMirroredStrategy, CPU, "ring"),
        (tf.distribute.MultiWorkerMirroredStrategy, dataclasses.replace(CPU, kind="gpu"), "NCCL"),
    ],
)
def test_the_all_reduce_and_the_batch_are_explained(strategy, devices, all_reduce):
    class Four(strategy):
        num_replicas_in_sync = 4

        def __init__(self):
            pass  # its devices are not asked for

    explained = explain_replicas(Four(), devices)
    assert explained["all_reduce"].value == all_reduce
    assert explained["batch_size"].value == "global, 1/4 each"
    assert "multiply it by 4" in explained["batch_size"].reason


def test_one_replica_needs_no_explanation():
    assert explain_replicas(default_strategy(), CPU) == {}
