"""What an exported file stores its weights in, and what it computes in.

| recipe | weights | computes in | calibration | for |
|---|---|---|---|---|
| `float32` | float32 | float32 | no | the reference |
| `float16` | float16 | float32 | no | half the size, almost no loss |
| `weight_only_int8` | int8 | float32 | no | a quarter of the size, the least loss, no speed |
| `dynamic_int8` | int8 | int8, ranges found on the fly | no | a quarter of the size, faster on CPU |
| `int4_weights` | int4 | int8, ranges found on the fly | no | an eighth of the size; watch the score |
| `int8` | int8 | int8 | yes | smallest and fastest; DSPs, NPUs |
| `int8_integer_io` | int8 | int8, inputs and outputs too | yes | microcontrollers without floats |
| `int16x8` | int8 | int16 | yes | where int8 activations lose too much |

Weights have a scale for each output channel. With calibration data they are rounded so that what their layer
computes changes least (`rounding.py`). The dynamic recipes keep depthwise and tiny layers computing in
float32: turning their inputs into integers costs more than it saves. Inputs and outputs stay float32 but in
`int8_integer_io`.
"""

from __future__ import annotations

import dataclasses

from tfaccel.errors import refuse


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to store a model.

    Args:
        name: The name it is asked for by.
        weight_bits: 32 and 16 are floats, 8 and 4 integers.
        activation_bits: Of fixed ranges measured on data: 8 or 16; 0 where activations are floats.
        dynamic: Whether activations are turned into int8 on the fly, each by its own range.
        integer_io: Whether the file's inputs and outputs are integers.
        min_sqnr_db: Below this signal-to-error ratio (dB) against the Keras model the file is taken
            for broken; see `SQNR_FLOOR_DB`.
    """

    name: str
    weight_bits: int = 32
    activation_bits: int = 0
    dynamic: bool = False
    integer_io: bool = False
    min_sqnr_db: float = 60.0

    @property
    def needs_calibration(self) -> bool:
        """Whether activations have fixed ranges that must be measured on data."""
        return self.activation_bits > 0


# float32 carries 24 bits (144 dB); summing in another order over thousands of terms has cost up to
# about 60 dB of that in the models tried, so 60 dB is far from both rounding and a wrong graph (near
# 0 dB). float16 weights carry 11 bits (66 dB), less the same kind of loss. With integers an output that is
# wrong by a third of its size (10 dB) ranks no classes any more, whatever the score on a few samples says;
# four bits are allowed half of its size (6 dB).
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("float32"),
        Recipe("float16", 16, min_sqnr_db=30.0),
        Recipe("weight_only_int8", 8, min_sqnr_db=10.0),
        Recipe("dynamic_int8", 8, dynamic=True, min_sqnr_db=10.0),
        Recipe("int4_weights", 4, dynamic=True, min_sqnr_db=6.0),
        Recipe("int8", 8, 8, min_sqnr_db=10.0),
        Recipe("int8_integer_io", 8, 8, integer_io=True, min_sqnr_db=10.0),
        Recipe("int16x8", 8, 16, min_sqnr_db=10.0),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in RECIPES:
        allowed = ", ".join(map(repr, (*RECIPES, "auto")))
        raise refuse("recipe", name, allowed, "Start with 'dynamic_int8', which needs no data.")
    return RECIPES[name]
