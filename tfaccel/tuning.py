"""`tune`: the options of `Accelerator`, chosen by training for some seconds with each.

When to use: before a run that takes longer than the search. The right options differ by model and machine:
XLA with many steps a call makes a small network many times as fast on a CPU, and a convolutional one many
times as slow.

How it searches: real `fit`s of the same first batches from the same weights. Every candidate gets one short
trial; those that lead are trained on in turn (successive halving), until the budget is spent. What compiling
takes counts against the planned run. A candidate whose losses depart from float32's further than rounding and
other random numbers explain is rejected.

Reference: Jamieson & Talwalkar, 2016, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", https://arxiv.org/abs/1502.07943 (successive halving).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfaccel import tuned_options
from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.keras_fixes.random_state import layer_names_kept, random_state_kept
from tfaccel.prepare.candidates import plain
from tfaccel.prepare.trial_run import Sample
from tfaccel.tuned_options import TunedOptions
from tfaccel.tuning_search import Search


def tune(
    build_model: Callable[..., keras.Model],
    dataset: Any,
    batch_size: int | Sequence[int] | None = None,
    budget_s: float = 60.0,
    *,
    epochs: int = 10,
    steps_per_epoch: int | None = None,
    strategy: str | tf.distribute.Strategy = "auto",
    cache: bool = True,
    verbose: int = 1,
) -> TunedOptions:
    """Finds the fastest options for a model and its data on this machine, by training with them.

    Tried are: Keras's own step and the fused one, with XLA and without, one step a call and many, half
    precision where the hardware multiplies it, and batch sizes if several are given. Models of yours are
    left alone, as are the random state and the data; the candidates are built, trained and dropped.

    Args:
        build_model: Called with `jit_compile` and `steps_per_execution`, to be passed on to `compile`; gives
            a new, compiled model each time.
        dataset: What `fit` is to get: arrays as `(x, y)`, a batched `tf.data.Dataset`, or a `PyDataset`.
        batch_size: Samples a batch, for arrays. Several: the first is what the others are compared with; a
            larger batch wants a larger learning rate. Default 32.
        budget_s: About how long the search may take, s. Compiling can't be interrupted. Default 60.
        epochs: Of the run that you plan; compiling is counted against it. Default 10.
        steps_per_epoch: Batches an epoch, for data of unknown length.
        strategy: As for `Accelerator`.
        cache: Whether an earlier outcome for this model, data, budget, machine and versions is taken, and
            this one kept, in `~/.cache/tfaccel/tuned`. Default True.
        verbose: 1 prints a line for each trial; 0 is silent. Default 1.

    Returns:
        What was chosen, with the table of the trials; for `Accelerator(tuned=...)`.

    Raises:
        ValueError: A bad argument; a `build_model` that gives no compiled model, or the same one twice;
            several workers. What plain Keras raises for the model and the data is raised too.

    Example:
        >>> def build_model(**compile_options):
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        ...     model.compile("adam", "mse", **compile_options)
        ...     return model
        >>> x, y = np.ones((64, 4)), np.ones((64, 2))
        >>> tuned = tfaccel.tune(build_model, (x, y), budget_s=2, epochs=50, verbose=0)
        >>> accelerator = tfaccel.Accelerator(tuned=tuned)
        >>> with accelerator.scope():
        ...     model = build_model(**accelerator.compile_options())
        >>> history = model.fit(accelerator.dataset(x, y), epochs=3, verbose=0)

    Reference:
        Jamieson & Talwalkar, 2016, https://arxiv.org/abs/1502.07943.
    """
    sizes = _check(build_model, batch_size, budget_s, epochs, steps_per_epoch)
    sample = Sample(dataset, steps_per_epoch)
    if sizes and not sample.arrays:
        raise refuse("batch_size", batch_size, "None for data that comes in batches", "Leave it out.")
    sizes = sizes or ([32] if sample.arrays else [None])
    with random_state_kept(), layer_names_kept():
        search = Search(build_model, sample, strategy, epochs, budget_s, verbose)
        asked = {"sizes": sizes, "steps": sample.steps(sizes[0]), "epochs": epochs, "budget_s": budget_s}
        asked["strategy"] = str(strategy)
        search.begin(plain(search.devices, sizes[0]))
        form = sample.first(1, sizes[0])
        key = tuned_options.signature(search.baseline.model, form, search.devices, asked)
        known = tuned_options.read(key) if cache else None
        if known is not None:
            return known
        search.run(sizes[1:])
    found = search.outcome()
    if cache:
        tuned_options.write(key, found)
    return found


def _check_options(build_model: Any) -> None:
    """Raises ValueError for a function that does not take compile options, where that can be told."""
    try:
        inspect.signature(build_model).bind(jit_compile=False, steps_per_execution=1)
    except TypeError as error:
        name = getattr(build_model, "__name__", "build_model")
        raise ValueError(
            f"{name} does not take the compile options ({error}). Allowed: def {name}(**compile_options). "
            "Pass them on to model.compile."
        ) from error
    except ValueError:  # a builtin without a signature
        return


def _check(
    build_model: Any,
    batch_size: Any,
    budget_s: float,
    epochs: int,
    steps_per_epoch: int | None,
) -> list[int | None]:
    """Raises ValueError for what can't be; gives the batch sizes."""
    if not callable(build_model):
        allowed = "a function of compile options that gives a compiled model"
        raise refuse("build_model", build_model, allowed, "Pass the function, not the model.")
    _check_options(build_model)
    several = isinstance(batch_size, Sequence)
    sizes = list(batch_size) if several else [] if batch_size is None else [batch_size]
    if (several and not sizes) or not all(is_whole(size, 1) for size in sizes):
        raise refuse("batch_size", batch_size, "an integer ≥ 1, or several", "Leave it out for 32.")
    if not is_number(budget_s, 0) or budget_s == 0:
        raise refuse("budget_s", budget_s, "seconds > 0", "60 are enough for most models.")
    if not is_whole(epochs, 1):
        raise refuse("epochs", epochs, "an integer ≥ 1", "Those that you will pass to fit.")
    if steps_per_epoch is not None and not is_whole(steps_per_epoch, 1):
        raise refuse("steps_per_epoch", steps_per_epoch, "an integer ≥ 1", "Leave it out to ask the data.")
    return [int(size) for size in sizes]
