"""`tfaccel plan`: what would be chosen, what training needs in memory, what more workers would bring."""

from __future__ import annotations

import argparse
import os

import tfaccel
from tfaccel import scaling, terminal
from tfaccel.archives import load_model
from tfaccel.cluster import find_cluster
from tfaccel.prepare import execution, precision, strategy
from tfaccel.prepare.memory import free_memory, shown_bytes


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of the subcommand."""
    command.add_argument("--strategy", default="auto", choices=strategy.NAMES)
    command.add_argument("--precision", default="auto", choices=precision.NAMES)
    command.add_argument("--jit", default="auto", choices=("auto", "on", "off"))
    command.add_argument("--kernels", default="auto", choices=execution.KERNELS)
    command.add_argument("--model", metavar="FILE.keras", help="what training it needs in memory")
    command.add_argument("--batch-size", type=int, default=32, help="of one device; default: %(default)s")
    _add_scaling(command)


def _add_scaling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "scaling", "what more workers would bring to --model, each with its own batch"
    )
    group.add_argument("--workers", type=numbers, metavar="N,N,…", help="such as 8,64,512")
    group.add_argument("--bandwidth", default="10Gb/s", help="of each worker's link; default: %(default)s")
    group.add_argument("--latency-us", type=float, default=50.0, help="of a message; default: %(default)s")
    group.add_argument("--devices", type=int, default=1, help="in each worker; default: %(default)s")
    group.add_argument("--local-bandwidth", default="50GB/s", help="between them; default: %(default)s")
    group.add_argument("--step-ms", type=float, help="measured elsewhere, with --gradient-mb, for no model")
    group.add_argument("--gradient-mb", type=float, help="4 bytes for each trainable weight in float32")


def numbers(text: str) -> list[int]:
    """Of "8,64,512"."""
    return [int(each) for each in text.split(",")]


def run_plan(options: argparse.Namespace) -> int:
    """`tfaccel plan`."""
    if options.workers:
        return _run_scaling(options)
    if options.model:
        return _run_memory(options)
    cluster = find_cluster(os.environ)
    if cluster is not None and options.strategy in ("auto", "multi_worker"):
        raise ValueError(
            f"{cluster.source} names {cluster.size} workers, and the strategy would wait until all have "
            "started. Allowed: plan on one machine. Leave the job's environment, or choose --strategy "
            "one_device."
        )
    jit: str | bool = "auto" if options.jit == "auto" else options.jit == "on"
    accelerator = tfaccel.Accelerator(options.strategy, options.precision, jit, options.kernels)
    terminal.print_plan(accelerator)
    return 0


def _run_memory(options: argparse.Namespace) -> int:
    """`tfaccel plan --model`."""
    model = load_model(options.model)
    if not model.compiled or model.optimizer is None:
        model.compile("adam")  # the loss is a stand-in, as the labels are not known
    print(tfaccel.estimate_memory(model, options.batch_size))
    print(f"{shown_bytes(free_memory())} are free on one device here")
    return 0


def _run_scaling(options: argparse.Namespace) -> int:
    """`tfaccel plan --workers`."""
    network = scaling.Network(
        scaling.parse_bandwidth(options.bandwidth),
        options.latency_us / 1e6,
        options.devices,
        scaling.parse_bandwidth(options.local_bandwidth),
    )
    if options.model:
        model = load_model(options.model)
        step_ms, size = scaling.measure_step(model, options.batch_size), scaling.gradient_bytes(model)
    elif options.step_ms and options.gradient_mb:
        step_ms, size = options.step_ms, options.gradient_mb * 1e6
    else:
        raise ValueError(
            "--workers needs a step to start from, and none was given. Allowed: --model FILE.keras, or both "
            "--step-ms and --gradient-mb. Save yours with model.save."
        )
    terminal.print_scaling(step_ms, size, scaling.predict_scaling(step_ms, size, options.workers, network))
    return 0
