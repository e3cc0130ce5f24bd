"""Claim: a step under tfaccel is as fast as in Keras on JAX and PyTorch, and faster than plain Keras on TF.

    pip install '.[bench]'
    python benchmarks/step_time.py                          # every row, about half an hour on 2 cores
    python benchmarks/step_time.py --models mlp lstm --batches 32
    python benchmarks/step_time.py --steps 200 --precision mixed_bfloat16 --together      # on a GPU

Each contender trains the same network with Adam in a process of its own; the processes stay alive and run an
epoch in turn, so that a noisy machine is noisy for all. The first epochs (tracing, compiling, choosing) are
reported apart, as `warm_up_seconds`. `keras_tf_best_ms` is the best of jit_compile × steps_per_execution.
A cell is the median time of a step; a row also has tfaccel's ratio to plain and to the best of all others.
On a GPU a step is a fraction of a millisecond, so an epoch should have more of them (`--steps`); `tf_xla` is
what Keras takes there by itself. PyTorch keeps its data on the GPU, and multiplies float32 as TensorFlow and
JAX do (TF32).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from _step_models import SHAPES, build_keras, build_torch, make_data

BY_HAND = {
    "tf_plain": {"jit_compile": False},
    "tf_steps": {"jit_compile": False, "steps_per_execution": 32},
    "tf_xla": {"jit_compile": True},
    "tf_xla_steps": {"jit_compile": True, "steps_per_execution": 32},
}
CONTENDERS = [*BY_HAND, "tfaccel", "jax", "torch_eager", "torch_compile"]
WARM_UP_EPOCHS = {"tfaccel": 100}  # XLA is tried only in runs that are worth it
XLA_IS_HOPELESS = ("cnn_bn", "resnet20", "depthwise")  # minutes an epoch: only if asked for by name


def keras_epoch(contender: str, name: str, batch_size: int, steps: int | None, precision: str):
    """A function that trains some epochs."""
    os.environ["KERAS_BACKEND"] = "jax" if contender == "jax" else "tensorflow"
    import keras

    x, y = make_data(name, batch_size, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if contender == "tfaccel":
        import tfaccel

        accelerator = tfaccel.Accelerator(precision=precision)
        with accelerator.scope():
            model = build_keras(name)
            model.compile("adam", loss, **accelerator.compile_options())
        data = accelerator.dataset(x, y, batch_size=batch_size)
        return lambda epochs: model.fit(data, epochs=epochs, verbose=0)
    keras.config.set_dtype_policy(precision)
    model = build_keras(name)
    options = {"steps_per_execution": 32} if contender == "jax" else BY_HAND[contender]
    model.compile("adam", loss, **options)
    return lambda epochs: model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)


def torch_epoch(contender: str, name: str, batch_size: int, steps: int | None, precision: str):
    """The same in PyTorch: a training loop as its tutorials have it, with the fused Adam."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.autocast(device, torch.bfloat16, enabled=precision == "mixed_bfloat16")
    arrays = make_data(name, batch_size, steps)
    x, y = (torch.from_numpy(array).to(device) for array in arrays)
    y, model = y.long(), build_torch(name).to(device)
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2)  # the memory stays channels-last
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    loss = torch.nn.CrossEntropyLoss()
    forward = torch.compile(model) if contender == "torch_compile" else model

    def train(epochs: int) -> None:
        for _ in range(epochs):
            order = torch.randperm(len(x), device=device)
            for rows in order.split(batch_size):
                optimizer.zero_grad(set_to_none=True)
                with half:
                    value = loss(forward(x[rows]), y[rows])
                value.backward()
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def work(contender: str, name: str, batch_size: int, steps: int | None, precision: str) -> None:
    """The child process: warms up, then trains an epoch for every line that it reads."""
    started = time.perf_counter()
    make = torch_epoch if contender.startswith("torch") else keras_epoch
    train = make(contender, name, batch_size, steps, precision)
    train(WARM_UP_EPOCHS.get(contender, 2))
    print(json.dumps(time.perf_counter() - started), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        train(2)
        seconds = (time.perf_counter() - started) / 2
        print(json.dumps(1e3 * seconds / (steps or SHAPES[name][1][batch_size])), flush=True)


class Worker:
    """A contender in its own process, which begins to warm up."""

    def __init__(self, contender: str, name: str, batch_size: int, options: argparse.Namespace):
        what = [contender, name, str(batch_size)]
        command = [sys.executable, __file__, "--worker", *what, "--precision", options.precision]
        command += ["--steps", str(options.steps)] if options.steps else []
        sharing = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        quiet = {**os.environ, **sharing, "TF_CPP_MIN_LOG_LEVEL": "3"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=quiet
        )
        self.warm_up_seconds: float | None = None
        if not options.together:
            self.warm_up()
        self.times: list[float] = []

    def warm_up(self) -> None:
        """Waits until it has."""
        self.warm_up_seconds = self.read()

    def read(self) -> float | None:
        """The next number that the process prints; None where it failed."""
        line = self.process.stdout.readline()
        return json.loads(line) if line.strip() else None

    def train(self) -> None:
        """One turn."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.times.append(self.read())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def start(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, Worker]:
    """The contenders of a row."""
    skip = options.contenders == CONTENDERS and name in XLA_IS_HOPELESS
    return {
        contender: Worker(contender, name, batch_size, options)
        for contender in options.contenders
        if not (skip and "xla" in contender)
    }


def measure(name: str, batch_size: int, workers: dict[str, Worker], options: argparse.Namespace) -> dict:
    """One row of the table."""
    skipped = [c for c in options.contenders if c not in workers]
    failed = [c for c, worker in workers.items() if worker.warm_up_seconds is None]
    running = {c: worker for c, worker in workers.items() if c not in failed}
    for _ in range(options.turns):
        for worker in running.values():
            worker.train()
    for worker in workers.values():
        worker.close()
    step_ms = {c: statistics.median(worker.times) for c, worker in running.items()}
    by_hand = [step_ms[c] for c in BY_HAND if c in step_ms]
    others = [ms for c, ms in step_ms.items() if c != "tfaccel"]
    ours = step_ms.get("tfaccel")
    return {
        "model": name,
        "batch_size": batch_size,
        "step_ms": {c: round(ms, 3) for c, ms in step_ms.items()},
        "spread_ms": {c: [round(f(worker.times), 3) for f in (min, max)] for c, worker in running.items()},
        "warm_up_seconds": {c: round(worker.warm_up_seconds, 1) for c, worker in running.items()},
        "keras_tf_best_ms": round(min(by_hand), 3) if by_hand else None,
        "faster_than_plain": round(step_ms["tf_plain"] / ours, 2) if ours and "tf_plain" in step_ms else None,
        "faster_than_best_other": round(min(others) / ours, 2) if ours and others else None,
        "not_run": {**dict.fromkeys(skipped, "XLA on a CPU"), **dict.fromkeys(failed, "failed")},
    }


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's, or those of a list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256], choices=[32, 256])
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, help="an epoch; default: few for large models, many for small ones"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "mixed_bfloat16"])
    parser.add_argument("--together", action="store_true", help="all contenders warm up side by side")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Prints one line a row and one summary line."""
    options = parse_options()
    if options.worker:
        contender, name, batch_size = options.worker
        work(contender, name, int(batch_size), options.steps, options.precision)
        return
    from _report import print_row  # imports Keras, whose backend a worker has to choose first

    rows = []
    cells = [(name, batch_size) for name in options.models for batch_size in options.batches]
    together = {cell: start(*cell, options) for cell in cells} if options.together else {}
    for workers in together.values():
        for worker in workers.values():
            worker.warm_up()
    for cell in cells:
        rows.append(measure(*cell, together.get(cell) or start(*cell, options), options))
        print_row(benchmark="step_time", precision=options.precision, **rows[-1])
    summary = {}
    for key in ("faster_than_plain", "faster_than_best_other"):
        ratios = [row[key] for row in rows if row[key]]
        if ratios:
            summary[key] = {
                "geometric_mean": round(statistics.geometric_mean(ratios), 2),
                "least": min(ratios),
            }
    print_row(benchmark="step_time", rows=len(rows), **summary)


if __name__ == "__main__":
    main()
