"""What an exported file stores its weights and computes its activations in.

| recipe | weights | activations | calibration | for |
|---|---|---|---|---|
| `float32` | float32 | float32 | no | the reference |
| `float16` | float16 | float32 | no | half the size, almost no loss |
| `dynamic_int8` | int8 | float32, quantized on the fly | no | a quarter of the size, faster on CPU |
| `int8` | int8 | int8 | yes | smallest and fastest; microcontrollers, DSPs, NPUs |

Input and output stay float32 in all of them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to store a model.

    Args:
        name: The name it is asked for by.
        needs_calibration: Whether activations have fixed ranges that must be measured on data.
        min_sqnr_db: Below this signal-to-error ratio (dB) against the Keras model the file is taken
            for broken; None where quantization may cost more and `max_drop` is the judge.
    """

    name: str
    needs_calibration: bool = False
    min_sqnr_db: float | None = None


# float32 carries 24 bits (144 dB); summing in another order over thousands of terms has cost up to
# about 60 dB of that in the models tried, so 60 dB is far from both rounding and a wrong graph (near
# 0 dB). float16 weights carry 11 bits (66 dB), less the same kind of loss.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("float32", min_sqnr_db=60.0),
        Recipe("float16", min_sqnr_db=30.0),
        Recipe("dynamic_int8"),
        Recipe("int8", needs_calibration=True),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in RECIPES:
        raise ValueError(
            f"recipe={name!r} is not known. Allowed: {', '.join(map(repr, RECIPES))}. Start with "
            "'dynamic_int8', which needs no data."
        )
    return RECIPES[name]
