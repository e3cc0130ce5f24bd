"""Reading `.npz` files that a user names on the command line."""

from __future__ import annotations

import os
import zipfile

import numpy as np


def read_archive(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by their names.

    Args:
        path: The file.

    Raises:
        ValueError: There is no such file, or it is something else.
    """
    try:
        # numpy leaves a file open that it can't read, unless it is given one.
        with open(path, "rb") as file, np.load(file) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} can't be read: {error}. Allowed: a .npz file as np.savez writes it."
        ) from error
