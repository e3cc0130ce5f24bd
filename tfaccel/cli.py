"""The command line: a subcommand parses, calls one library function and returns an exit code.

Exit codes: 0 done, 1 an export that was refused, 2 bad arguments or data, 130 Ctrl-C; `launch` gives the code
of the worker that failed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import tfaccel
from tfaccel import launch, planning, terminal
from tfaccel.archives import load_function, load_model, read_samples, read_training_data
from tfaccel.demo.images import load_images
from tfaccel.demo.run import run_demo
from tfaccel.errors import refuse
from tfaccel.export.recipes import RECIPES
from tfaccel.export.search import OBJECTIVES
from tfaccel.launch import kubernetes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: The command line without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"tfaccel {options.command}: error: {error}", file=sys.stderr)
        return 2
    except (tfaccel.ExportError, OSError) as error:
        print(f"tfaccel {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tfaccel {options.command}: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    top = argparse.ArgumentParser(prog="tfaccel", description=tfaccel.__doc__)
    top.add_argument("--version", action="version", version=tfaccel.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add(commands, "devices", run_devices, "show what this machine has")
    command.add_argument("--json", action="store_true", help="print one JSON object")

    command = _add(commands, "plan", planning.run_plan, "show what Accelerator() chooses here, and why")
    planning.add_arguments(command)

    _add_tune(commands)

    command = _add(commands, "demo", run_demo_command, "train plain and accelerated, then export")
    command.add_argument("--data", metavar="FILE.npz", help="x_train, y_train, x_test, y_test")
    command.add_argument("--output", metavar="DIR", default="tfaccel-demo", help="default: %(default)s")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")

    _add_launch(commands)

    _add_export(commands)

    command = _add(commands, "compare", run_compare, "measure a TFLite file against its Keras model")
    command.add_argument("model", help="a .keras or .h5 file")
    command.add_argument("path", help="a TFLite file")
    command.add_argument("samples", metavar="FILE.npz", help="samples x")
    command.add_argument("--layers", action="store_true", help="rank the layers of a quantized file, too")
    command.add_argument("--plot", metavar="FILE.png", help="draw that")

    command = _add(commands, "bench", run_bench, "time a TFLite file on one sample")
    command.add_argument("path", help="a TFLite file")
    command.add_argument("--runs", type=int, default=200)
    command.add_argument("--threads", type=int, default=1)
    return top


def _add_tune(commands) -> None:
    command = _add(commands, "tune", run_tune, "choose options by training with them for a minute")
    command.add_argument("script", metavar="SCRIPT.py", help="where the function is")
    command.add_argument("data", metavar="FILE.npz", help="x and y, or x_train and y_train")
    command.add_argument(
        "--function", default="build_model", metavar="NAME", help="of compile options; default: %(default)s"
    )
    command.add_argument("--batch-size", type=planning.numbers, metavar="N,N,…", help="default: 32")
    command.add_argument("--budget-s", type=float, default=60.0, help="default: %(default)s")
    command.add_argument("--epochs", type=int, default=10, help="of the run you plan; default: %(default)s")
    command.add_argument("--anew", action="store_true", help="don't take an earlier outcome")


def _add_export(commands) -> None:
    command = _add(commands, "export", run_export, "convert a saved Keras model to a checked TFLite file")
    command.add_argument("model", help="a .keras or .h5 file")
    command.add_argument("path", help="the TFLite file to write")
    command.add_argument("--recipe", default="float32", choices=(*RECIPES, "auto"))
    command.add_argument("--calibration", metavar="FILE.npz", help="samples x, and labels y if any")
    command.add_argument("--evaluate", metavar="FILE.npz", help="x and y to score on; default: calibration's")
    command.add_argument("--max-drop", type=float, help="allowed drop of accuracy, 0..1")
    command.add_argument(
        "--layer", action="append", default=[], metavar="NAME=RECIPE", help="another recipe for a layer"
    )
    command.add_argument("--strict", action="store_true", help="refuse floats inside of an integer file")
    command.add_argument("--allow-select-ops", action="store_true", help="take TensorFlow's own operations")
    command.add_argument("--labels", metavar="FILE.txt", help="class names, one a line, to keep in the file")
    search = command.add_argument_group("recipe auto")
    search.add_argument("--minimize", choices=OBJECTIVES, help="default: size")
    search.add_argument("--budget-s", type=float, metavar="SECONDS", help="default: no limit")
    search.add_argument("--resume-from", metavar="FILE.jsonl", help="where trials are kept")


def _add_launch(commands) -> None:
    command = _add(commands, "launch", run_launch, "run a script on several workers at once")
    command.add_argument("--workers", type=int, required=True, metavar="N")
    command.add_argument("--engine", default="local", choices=(*launch.ENGINES, "kubernetes"))
    command.add_argument("--max-restarts", type=int, default=0, metavar="K", help="default: %(default)s")
    command.add_argument(
        "--start-timeout", type=float, metavar="SECONDS", help="default: 30; in Kubernetes 600"
    )
    pods = command.add_argument_group("kubernetes")
    pods.add_argument("--dry-run", action="store_true", help="print the manifest")
    pods.add_argument("--image", default="", help="container image with tfaccel and the script")
    pods.add_argument("--name", default="tfaccel", help="of the job; default: %(default)s")
    pods.add_argument("--gpus", type=int, default=0, help="of each pod; default: %(default)s")
    command.add_argument("script", help="a Python script, followed by its arguments")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _add(commands, name, run, text) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def run_devices(options: argparse.Namespace) -> int:
    """`tfaccel devices`."""
    devices = tfaccel.Devices.find()
    print(json.dumps(vars(devices)) if options.json else devices)
    return 0


def run_tune(options: argparse.Namespace) -> int:
    """`tfaccel tune`."""
    build_model = load_function(options.script, options.function)
    tuned = tfaccel.tune(
        build_model,
        read_training_data(options.data),
        options.batch_size,
        options.budget_s,
        epochs=options.epochs,
        cache=not options.anew,
    )
    print(f"\n{tuned}")
    print(f"\naccelerator = tfaccel.Accelerator({tuned.arguments()})")
    if tuned.batch_size:
        print(f"data = accelerator.dataset(x, y, batch_size={tuned.batch_size})")
    return 0


def run_demo_command(options: argparse.Namespace) -> int:
    """`tfaccel demo`."""
    data = load_images(options.data)
    with terminal.DemoProgress() as progress:
        result = run_demo(data, options.output, report=progress.report)
    if options.json:
        print(json.dumps(result.figures))
    else:
        terminal.print_demo(result, options.output)
    return 0 if result.finished else 130


def run_launch(options: argparse.Namespace) -> int:
    """`tfaccel launch`."""
    if options.engine == "kubernetes":
        print(_manifest(options), end="")
        return 0
    try:
        launch.run_script(
            options.script,
            options.arguments,
            workers=options.workers,
            engine=options.engine,
            max_restarts=options.max_restarts,
            start_timeout_s=options.start_timeout,
        )
    except launch.WorkerError as error:
        print(f"tfaccel launch: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _manifest(options: argparse.Namespace) -> str:
    if not options.dry_run:
        raise ValueError(
            "engine='kubernetes' starts nothing itself. Allowed: --dry-run, which prints the manifest. Pipe "
            "it to kubectl apply -f -."
        )
    limit = options.start_timeout
    return kubernetes.manifest(
        ["python", options.script, *options.arguments],
        options.workers,
        image=options.image,
        name=options.name,
        gpus=options.gpus,
        max_restarts=options.max_restarts,
        start_timeout_s=kubernetes.START_TIMEOUT_S if limit is None else limit,
    )


def run_export(options: argparse.Namespace) -> int:
    """`tfaccel export`."""
    for each in options.layer:
        if "=" not in each:
            raise refuse("--layer", each, "NAME=RECIPE", "Write e.g. --layer scores=float32.")
    searches = {
        "--minimize": options.minimize,
        "--budget-s": options.budget_s,
        "--resume-from": options.resume_from,
    }
    given = [name for name, value in searches.items() if value is not None]
    if given and options.recipe != "auto":
        raise refuse(given[0], searches[given[0]], "with --recipe auto", "Add it, or leave this out.")
    layers = dict(each.split("=", 1) for each in options.layer)
    labels = pathlib.Path(options.labels).read_text().splitlines() if options.labels else None
    model = load_model(options.model)
    calibration = read_samples(options.calibration, model) if options.calibration else None
    evaluate = read_samples(options.evaluate, model) if options.evaluate else None
    with terminal.ExportProgress() as progress:
        recipe = options.recipe
        if recipe == "auto":
            limits = options.budget_s, options.resume_from
            recipe = tfaccel.AutoRecipe(options.minimize or "size", *limits, progress.report)
        file = tfaccel.export_tflite(
            model,
            options.path,
            recipe,
            calibration=calibration,
            evaluate=evaluate,
            max_drop=options.max_drop,
            layers=layers or None,
            strict=options.strict,
            allow_select_ops=options.allow_select_ops,
            metadata=None if labels is None else {"labels": labels},
        )
    if file.search is not None:
        print(file.search)
    print(file)
    return 0


def run_compare(options: argparse.Namespace) -> int:
    """`tfaccel compare`."""
    model = load_model(options.model)
    samples = read_samples(options.samples, model)
    print(tfaccel.compare(model, options.path, samples))
    if options.layers or options.plot:
        layers = tfaccel.layer_report(model, options.path, samples)
        print(layers)
        if options.plot:
            print(layers.plot(options.plot))
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """`tfaccel bench`."""
    print(tfaccel.benchmark_tflite(options.path, runs=options.runs, num_threads=options.threads))
    return 0
