"""Which kernels a step is traced with: each one only after a probe agreed with Keras's own operation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator, MutableMapping

import keras
import tensorflow as tf

from tfaccel.fast_kernels import (
    fused_attention,
    fused_batch_norm,
    fused_convolution,
    fused_einsum,
    fused_gelu,
    fused_optimizer,
    fused_recurrent,
)
from tfaccel.fast_kernels.agreement import EPSILON
from tfaccel.fast_kernels.same_random import same_random_numbers
from tfaccel.fast_kernels.trial import Way

ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
RECURRENT = (keras.layers.LSTM, keras.layers.GRU)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for some layers.

    Args:
        name: In the report.
        does: What the report says where it is used.
        serves: Whether a layer has what it replaces.
        probe: From a compute dtype to how far it lies from Keras's operation, in units of what is allowed.
        fused: From the dtypes in which it may act to a context in which it does.
        dtypes: Those that it has.
        also_in_xla: Whether it is better than what XLA makes of Keras's operations.
        across_samples: Whether it needs the samples of all replicas, which it does not get.
    """

    name: str
    does: str
    serves: Callable[[keras.layers.Layer], bool]
    probe: Callable[[str], float]
    fused: Callable[[Container[str]], contextlib.AbstractContextManager[None]]
    dtypes: Container[str] = tuple(EPSILON)
    also_in_xla: bool = False
    across_samples: bool = False


KERNELS = (
    Kernel(
        "batch_norm",
        "one fused op for each layer",
        lambda layer: isinstance(layer, keras.layers.BatchNormalization),
        fused_batch_norm.probe,
        fused_batch_norm.fused,
        also_in_xla=True,
        across_samples=True,
    ),
    Kernel(
        "convolution",
        "small kernels' gradients as matrix products",
        fused_convolution.serves,
        fused_convolution.probe,
        fused_convolution.fused,
    ),
    Kernel(
        "einsum",
        "one matrix product each",
        lambda layer: isinstance(layer, (keras.layers.EinsumDense, *ATTENTION)),
        fused_einsum.probe,
        fused_einsum.fused,
    ),
    Kernel(
        "attention",
        "two matrix products each",
        lambda layer: isinstance(layer, ATTENTION),
        lambda dtype: fused_attention.probe(),
        lambda dtypes: fused_attention.fused(),
        ("float32",),
    ),
    Kernel(
        "gelu",
        "gradient written out",
        lambda layer: getattr(layer, "activation", None) is keras.activations.gelu,
        lambda dtype: fused_gelu.probe(),
        lambda dtypes: fused_gelu.fused(),
        ("float32",),
    ),
)


class Proofs:
    """What is known about the kernels for one model and its optimizer.

    Args:
        optimizer: The one that the model is compiled with, or None.
        report: Is told, by name, what is used and why not.
        replicated: Whether the step runs on replicas of a strategy.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | None,
        report: MutableMapping[str, str],
        replicated: bool = False,
    ):
        self._kernels = [kernel for kernel in KERNELS if not (replicated and kernel.across_samples)]
        self._replicated = replicated
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._report = report
        self._update: fused_optimizer.Update | str | None = None
        self._agrees: dict[str, dict[str, bool]] = {kernel.name: {} for kernel in self._kernels}

    @property
    def variables(self) -> list[tf.Variable]:
        """What the fused update writes to beside the optimizer's own variables."""
        return list(getattr(self._update, "variables", ()))

    def prove(self, layers: list[keras.layers.Layer]) -> None:
        """Runs the probes that these layers need; not while tracing, since they make variables."""
        if tf.distribute.has_strategy():  # whose scope the caller is in: a thread of its own is outside
            with concurrent.futures.ThreadPoolExecutor(1) as outside:
                outside.submit(self._prove, layers).result()
        else:
            self._prove(layers)

    def _prove(self, layers: list[keras.layers.Layer]) -> None:
        if self._update is None and self._optimizer is not None:
            self._update = self._proven_update(self._optimizer)
        for kernel in self._kernels:
            known = self._agrees[kernel.name]
            for dtype in sorted(
                {layer.compute_dtype for layer in layers if kernel.serves(layer)} - set(known)
            ):
                known[dtype] = self._proven(kernel, dtype)

    def _proven(self, kernel: Kernel, dtype: str) -> bool:
        if dtype not in kernel.dtypes:
            self._report[kernel.name] = f"Keras's own: there is none for {dtype}"
            return False
        far = kernel.probe(dtype)
        said = kernel.does if far <= 1 else f"Keras's own: the fused way lay {far:.1f} × off"
        self._report[kernel.name] = said
        return far <= 1

    def _proven_update(self, optimizer: keras.optimizers.Optimizer) -> fused_optimizer.Update | str:
        update = fused_optimizer.fused_update(optimizer)
        if self._replicated and hasattr(update, "variables"):
            update = "the fused op would need a scratch variable on each replica"
        if not isinstance(update, str):
            far = fused_optimizer.probe(optimizer, update)
            update = update if far <= 1 else f"the fused op lay {far:.1f} × what rounding allows from it"
        own = isinstance(update, str)
        self._report["optimizer"] = f"Keras's own: {update}" if own else "one fused op for each weight"
        return update

    def can_fuse_recurrent(self, layers: list[keras.layers.Layer]) -> bool:
        """Whether there is a recurrent layer that whole programs could run; says why others can't."""
        reasons = {
            layer.name: fused_recurrent.why_not(layer) for layer in layers if isinstance(layer, RECURRENT)
        }
        left = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        if left:
            self._report["recurrent"] = f"Keras's own loop or XLA for the whole: {left}"
        return not all(reasons.values())

    def updating(self, way: Way = Way.PLAIN) -> contextlib.AbstractContextManager[None]:
        """Lets the optimizer use the fused update, if it agreed, while a step is traced, in any thread."""
        if callable(self._update) and (way is not Way.LOOP or fused_optimizer.is_for_xla(self._optimizer)):
            return fused_optimizer.fused(self._optimizer, self._update)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def tracing(self, way: Way) -> Iterator[None]:
        """Lets the kernels that agreed act while a step is traced in this thread."""
        with contextlib.ExitStack() as stack:
            for kernel in self._kernels:
                dtypes = {dtype for dtype, agrees in self._agrees[kernel.name].items() if agrees}
                if dtypes and (way is not Way.LOOP or kernel.also_in_xla):
                    stack.enter_context(kernel.fused(dtypes))
            if way is Way.LOOP:
                stack.enter_context(same_random_numbers())
            if way is Way.RECURRENT:
                stack.enter_context(fused_recurrent.fused())
            yield
