"""The machine is described from what the system tells; each kind with its own facts."""

import pytest
import tensorflow as tf

from tfaccel.prepare.devices import (
    Devices,
    cpu_flags,
    describe_cpu,
    describe_gpus,
    find_tpu_environment,
    physical_memory_bytes,
)


def test_finds_this_machine_once():
    devices = Devices.find()
    assert devices is Devices.find()
    assert devices.count >= 1
    assert len(devices.names) >= 1
    assert devices.kind == ("gpu" if tf.config.list_physical_devices("GPU") else "cpu")


def test_memory_is_that_of_the_system():
    with open("/proc/meminfo") as file:
        total_kib = int(file.readline().split()[1])
    # The kernel keeps some pages out of one of the two counts.
    assert physical_memory_bytes() == pytest.approx(total_kib * 1024, rel=0.01)


def test_reads_the_cpu_flags_of_x86_and_arm(tmp_path):
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("model name : x\nflags\t\t: fpu avx2 amx_tile\n")
    arm.write_text("processor : 0\nFeatures : fp asimd fphp\n")
    assert cpu_flags(str(x86)) == {"fpu", "avx2", "amx_tile"}
    assert "fphp" in cpu_flags(str(arm))
    assert cpu_flags(str(tmp_path / "none")) == frozenset()


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16", "features"),
    [
        ({"avx2"}, False, False, ("avx2",)),
        ({"avx512f", "avx512_bf16"}, True, False, ("avx512f", "avx512_bf16")),
        ({"avx512f", "avx512_fp16", "amx_tile", "amx_bf16"}, True, True, ("avx512f", "avx512_fp16", "amx")),
        (set(), False, False, ()),
    ],
)
def test_cpu_arithmetic_follows_from_its_flags(flags, bfloat16, float16, features):
    devices = describe_cpu(frozenset(flags))
    assert (devices.bfloat16, devices.float16, devices.cpu_features) == (bfloat16, float16, features)
    assert "CPU" in str(devices)


@pytest.mark.parametrize(
    ("capabilities", "weakest", "bfloat16", "float16", "tensor_cores"),
    [
        ([(9, 0), (8, 0)], (8, 0), True, True, True),
        ([(7, 5)], (7, 5), False, True, True),
        ([(8, 6), (6, 1)], (6, 1), False, True, False),
        ([(5, 0)], (5, 0), False, False, False),
        ([None], None, False, False, False),
    ],
)
def test_the_weakest_gpu_counts(capabilities, weakest, bfloat16, float16, tensor_cores):
    details = [{"device_name": "G", "compute_capability": c} if c else {} for c in capabilities]
    devices = describe_gpus(details, memory_bytes=16 * 2**30)
    assert devices.compute_capability == weakest
    assert (devices.bfloat16, devices.float16) == (bfloat16, float16)
    assert devices.has_tensor_cores is tensor_cores
    assert "16 GiB" in str(devices)


def test_tensorflows_own_variables_are_no_sign_of_a_tpu():
    assert find_tpu_environment({"TPU_ML_PLATFORM": "Tensorflow"}) == ()
    assert find_tpu_environment({"TPU_NAME": "local"}) == ("TPU_NAME",)
    assert find_tpu_environment({"TPU_NAME": ""}) == ()
