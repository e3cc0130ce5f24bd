"""tfmot's results, made once for the tests of all techniques."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    script = pathlib.Path(__file__).with_name("tfmot_twins.py")
    path = tmp_path_factory.mktemp("twins") / "weights.npz"
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as archive:
        return dict(archive)
