"""One op per weight for the optimizer's update, where Keras 3 runs a dozen.

Keras 3 writes its optimizers in backend-neutral operations: Adam is about 14 of them for each variable, each
with its own pass over memory and its own scheduling. TensorFlow still has the fused training ops of Keras 2.
They are called here on the user's own optimizer object and its own slot variables, in place of
`optimizer.update_step` only; so clipping, weight decay, EMA, accumulation, loss scaling, constraints,
`iterations`, `get_config` and saving stay what they are. RMSprop without momentum takes the op with one,
which is given memory of its own to write to: one number a weight. Adam has an update for the rows of an
embedding, too: of some thirty passes over memory of the table's size a third is left.

Keras's own update is used for the other optimizers' sparse gradients, for variables that are not float32, and
for optimizers without such an op (Adagrad, Nadam, Lion, Lamb: TensorFlow's adds epsilon at another place, or
there is none). For those, one flat update of all weights together was tried: 1.2, 1.6 and 2.7 × the time of
Keras's own for Nadam, Lion and Adagrad on a network of 20 weights, because putting them together and apart
costs more than the operations that are saved.

Measured by `benchmarks/step_time.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.agreement import EPSILON, UNITS, worst_disagreement
from tfaccel.fast_kernels.placement import step_device

Update = Callable[[Any, Any, tf.Variable, Any], None]


def _adam(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
    """Kingma & Ba (2015), https://arxiv.org/abs/1412.6980, in the order of section 2's last paragraph."""
    _apply_adam(optimizer, gradient, variable, learning_rate, optimizer.beta_2)


def _apply_adam(
    optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any, beta_2_of_slot: Any
) -> None:
    number = functools.partial(tf.cast, dtype=variable.dtype)
    step = number(optimizer.iterations) + 1
    beta_1 = number(optimizer.beta_1)
    arguments = {
        "var": variable.handle,
        "m": _slot(optimizer, "_momentums", variable),
        "v": _slot(optimizer, "_velocities", variable),
        "beta1_power": beta_1**step,
        "beta2_power": number(optimizer.beta_2) ** step,
        "lr": number(learning_rate),
        "beta1": beta_1,
        "beta2": number(beta_2_of_slot),
        "epsilon": number(optimizer.epsilon),
        "grad": gradient,
    }
    if optimizer.amsgrad:
        vhat = _slot(optimizer, "_velocity_hats", variable)
        tf.raw_ops.ResourceApplyAdamWithAmsgrad(vhat=vhat, **arguments)
    else:
        tf.raw_ops.ResourceApplyAdam(**arguments)


def _adam_of_rows(
    optimizer: Any, gradient: tf.IndexedSlices, variable: tf.Variable, learning_rate: Any
) -> None:
    """Adam for a gradient of some rows, each as often as it comes; the slots of the others decay, too.

    As in Keras the squares of a row's parts are summed, where a dense gradient has the square of their sum.
    So the velocities are made here, and the op, with a decay of 1, leaves them. Sums are by segments: adding
    to the slots in place would be faster, but TensorFlow does it in an order that differs from run to run.
    """
    number = functools.partial(tf.cast, dtype=variable.dtype)
    rows, size = gradient.values, variable.shape[0]
    squares = tf.square(rows) * number(1 - optimizer.beta_2)
    velocities = _slot_variable(optimizer, "_velocities", variable)
    summed = tf.math.unsorted_segment_sum(squares, gradient.indices, size)
    velocities.assign(velocities * number(optimizer.beta_2) + summed)
    table = tf.math.unsorted_segment_sum(rows, gradient.indices, size)
    _apply_adam(optimizer, table, variable, learning_rate, 1.0)


def _sgd(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
    """Sutskever et al. (2013), http://proceedings.mlr.press/v28/sutskever13.html, as Keras has it."""
    number = functools.partial(tf.cast, dtype=variable.dtype)
    if optimizer.momentum == 0:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.handle, alpha=number(learning_rate), delta=gradient
        )
        return
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=_slot(optimizer, "momentums", variable),
        lr=number(learning_rate),
        grad=gradient,
        # A schedule may cycle it: then it is a tensor that poses as a float.
        momentum=number(tf.convert_to_tensor(optimizer.momentum)),
        use_nesterov=optimizer.nesterov,
    )


def _rmsprop(
    optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any, momentum: Any = None
) -> None:
    """Hinton (2012), lecture 6e; centered: Graves (2013), https://arxiv.org/abs/1308.0850, eq. 38 to 45."""
    number = functools.partial(tf.cast, dtype=variable.dtype)
    arguments = {
        "var": variable.handle,
        "ms": _slot(optimizer, "_velocities", variable),
        "mom": _slot(optimizer, "_momentums", variable) if momentum is None else momentum.handle,
        "lr": number(learning_rate),
        "rho": number(optimizer.rho),
        "momentum": number(optimizer.momentum),
        "epsilon": number(optimizer.epsilon),
        "grad": gradient,
    }
    if optimizer.centered:
        tf.raw_ops.ResourceApplyCenteredRMSProp(
            mg=_slot(optimizer, "_average_gradients", variable), **arguments
        )
    else:
        tf.raw_ops.ResourceApplyRMSProp(**arguments)


class RMSpropWithoutMomentum:
    """RMSprop with `momentum=0` by the op that has one.

    The op writes `0 · momentum + change` before it subtracts that; Keras has no such slot. Nobody reads what
    stands there.
    """

    def __init__(self) -> None:
        self._momentums: dict[str, tf.Variable] = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """What the op writes to beside the slots of Keras."""
        return list(self._momentums.values())

    def __call__(self, optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
        """As the other updates."""
        name = variable._unique_id
        if name not in self._momentums:
            with tf.init_scope():
                zeros = tf.zeros(variable.shape, variable.dtype)
                self._momentums[name] = tf.Variable(zeros, trainable=False, name="unused_momentum")
        _rmsprop(optimizer, gradient, variable, learning_rate, self._momentums[name])


def _adamax(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
    """Kingma & Ba (2015), https://arxiv.org/abs/1412.6980, algorithm 2."""
    number = functools.partial(tf.cast, dtype=variable.dtype)
    beta_1 = number(optimizer.beta_1)
    tf.raw_ops.ResourceApplyAdaMax(
        var=variable.handle,
        m=_slot(optimizer, "_m", variable),
        v=_slot(optimizer, "_u", variable),
        beta1_power=beta_1 ** (number(optimizer.iterations) + 1),
        lr=number(learning_rate),
        beta1=beta_1,
        beta2=number(optimizer.beta_2),
        epsilon=number(optimizer.epsilon),
        grad=gradient,
    )


def _adadelta(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
    """Zeiler (2012), https://arxiv.org/abs/1212.5701, algorithm 1."""
    number = functools.partial(tf.cast, dtype=variable.dtype)
    tf.raw_ops.ResourceApplyAdadelta(
        var=variable.handle,
        accum=_slot(optimizer, "_accumulated_grads", variable),
        accum_update=_slot(optimizer, "_accumulated_delta_vars", variable),
        lr=number(learning_rate),
        rho=number(optimizer.rho),
        epsilon=number(optimizer.epsilon),
        grad=gradient,
    )


# By the function that an optimizer inherits: a subclass with an update of its own is left alone.
UPDATES: dict[Any, Update] = {
    keras.optimizers.Adam.update_step: _adam,
    keras.optimizers.SGD.update_step: _sgd,
    keras.optimizers.RMSprop.update_step: _rmsprop,
    keras.optimizers.Adamax.update_step: _adamax,
    keras.optimizers.Adadelta.update_step: _adadelta,
}
# For gradients of some rows; where there is none, Keras's own is used.
UPDATES_OF_ROWS: dict[Any, Update] = {_adam: _adam_of_rows}
# What the updates read of an optimizer, and whose update they stand for.
SETTINGS: dict[Update, tuple[type, tuple[str, ...]]] = {
    _adam: (keras.optimizers.Adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    _sgd: (keras.optimizers.SGD, ("momentum", "nesterov")),
    _rmsprop: (keras.optimizers.RMSprop, ("rho", "momentum", "epsilon", "centered")),
    _adamax: (keras.optimizers.Adamax, ("beta_1", "beta_2", "epsilon")),
    _adadelta: (keras.optimizers.Adadelta, ("rho", "epsilon")),
}


def is_for_xla(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether XLA knows the op of an optimizer. Not with `amsgrad`: it fuses Keras's own update by itself."""
    return not getattr(optimizer, "amsgrad", False)


def fused_update(optimizer: keras.optimizers.Optimizer) -> Update | str:
    """The fused update of an optimizer, or the reason why there is none.

    Args:
        optimizer: The one that updates weights (not a `LossScaleOptimizer`).
    """
    name = type(optimizer).__name__
    update = UPDATES.get(getattr(type(optimizer), "update_step", None))
    if update is None:
        return f"TensorFlow has no fused op that computes {name}'s update"
    if "update_step" in vars(optimizer):
        return f"this {name} has an update_step of its own"
    if update is _rmsprop and not optimizer.momentum > 0:
        return RMSpropWithoutMomentum()
    return update


@contextlib.contextmanager
def fused(optimizer: keras.optimizers.Optimizer, update: Update) -> Iterator[None]:
    """Lets `optimizer.apply` use the fused update while the block lasts: wrap the tracing of a step.

    Args:
        optimizer: The user's own; nothing stays on it. One that got an `update_step` meanwhile is let alone.
        update: What `fused_update` gave.
    """
    if "update_step" in vars(optimizer):
        yield
        return
    original, of_rows = optimizer.update_step, UPDATES_OF_ROWS.get(update)

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        way = of_rows if isinstance(gradient, tf.IndexedSlices) else update
        if way is None or variable.dtype != tf.float32:
            original(gradient, variable, learning_rate)
        else:
            way(optimizer, tf.cast(gradient, variable.dtype), variable, learning_rate)

    optimizer.update_step = update_step
    try:
        yield
    finally:
        del optimizer.update_step


def probe(optimizer: keras.optimizers.Optimizer, update: Update, steps: int = 3) -> float:
    """Runs Keras's update and a fused one on two small optimizers; how far they lie apart.

    One of two weights gets its gradients as rows, where there is an update for those.

    Args:
        optimizer: Whose settings are tried; it is not touched.
        update: The one to try, for instance what `fused_update` gave.
        steps: Updates, with gradients of very different sizes.

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    base, names = SETTINGS[UPDATES[type(optimizer).update_step]]
    # A rate of 1, so that the change is not lost in the rounding of the weights.
    settings = {"learning_rate": 1.0, **{name: getattr(optimizer, name) for name in names}}
    random = np.random.default_rng(0)
    start = random.normal(size=(16, 4)).astype("float32")
    sizes = 10.0 ** random.uniform(-4, 1, steps)
    gradients = [(size * random.normal(size=(16, 4))).astype("float32") for size in sizes]
    rows = random.integers(0, 8, (steps, 16))  # some come several times, others never
    weights = 2 if update in UPDATES_OF_ROWS else 1
    states = []
    for fuse in (False, True):
        with tf.device(step_device()):
            variables = [keras.Variable(start, dtype="float32", name="probe") for _ in range(weights)]
            twin = base(**settings)
            twin.build(variables)
            with fused(twin, update) if fuse else contextlib.nullcontext():
                for gradient, some in zip(gradients, rows, strict=True):
                    table = tf.IndexedSlices(tf.constant(gradient), tf.constant(some), tf.constant([16, 4]))
                    twin.apply([tf.constant(gradient), table][:weights])
            states.append([v.numpy() for v in [*variables, *twin.variables]])
    before = [*[start] * weights, *(np.zeros_like(a) for a in states[0][weights:])]
    return worst_disagreement(states[0], states[1], before, _tolerance(optimizer))


def _tolerance(optimizer: keras.optimizers.Optimizer) -> float:
    """The op takes a decay such as beta_2 in float32 and subtracts it from 1 there: `eps / (1 - beta_2)`."""
    decays = [getattr(optimizer, name, None) for name in ("beta_1", "beta_2", "rho", "momentum")]
    return EPSILON["float32"] * (
        UNITS + max(1 / (1 - d) for d in [0.0, *decays] if isinstance(d, float) and d < 1)
    )


def _slot(optimizer: Any, name: str, variable: tf.Variable) -> tf.Tensor:
    return _slot_variable(optimizer, name, variable).handle


def _slot_variable(optimizer: Any, name: str, variable: tf.Variable) -> tf.Variable:
    return getattr(optimizer, name)[optimizer._get_variable_index(variable)].value
