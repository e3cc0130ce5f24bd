"""Real workers: local processes, Ray, Spark, Slurm; and what becomes of a job when one of them fails."""

import functools
import importlib.util
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import launch_cells
import numpy as np
import pytest
import slurm_cluster

import tfaccel
from tfaccel import launch
from tfaccel.cluster import tf_config
from tfaccel.launch.local import free_ports

pytestmark = pytest.mark.slow
SCRIPT = str(pathlib.Path(launch_cells.__file__))
NOTICED_S = 90  # the end of a worker must be the end of the job; unnoticed, the others wait for ever


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Workers see no GPU, and find `launch_cells`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        patch.setenv("PYTHONPATH", str(pathlib.Path(SCRIPT).parent))
        patch.setenv("PYTHONWARNINGS", "ignore")
        yield


@pytest.fixture(scope="module")
def local():
    return dict(os.environ)


class RayDriver:
    """`launch.run` on Ray, in a process of its own.

    Ray's client ends its process by `_Exit` when it comes upon a state that it has no answer to (seen under
    load: "publisher_id is empty"), and here it would be that of the tests. It says that it has a bug then;
    the cell is run once more.
    """

    def __init__(self, folder):
        self.folder = folder
        self.calls = 0
        self.process = None

    def __call__(self, function, arguments=(), **options):
        for attempt in range(2):
            answer = self._ask(function, arguments, options)
            if answer is not None:
                value, error = answer
                if error is not None:
                    raise error
                return value
            said = (self.folder / "errors").read_text()
            assert "discovered a bug in Ray" in said, said
            assert attempt == 0, said
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, function, arguments, options):
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, SCRIPT, "drive_ray", str(self.folder)]
            with (self.folder / "errors").open("w") as errors:
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, text=True)
        self.calls += 1
        (self.folder / f"call{self.calls}").write_bytes(pickle.dumps((function, list(arguments), options)))
        self.process.stdin.write(f"{self.calls}\n")
        self.process.stdin.flush()
        answer = self.folder / f"answer{self.calls}"
        ends = time.monotonic() + 240
        while not answer.exists() and self.process.poll() is None and time.monotonic() < ends:
            time.sleep(0.1)
        return pickle.loads(answer.read_bytes()) if answer.exists() else None

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def ray_driver(tmp_path_factory):
    pytest.importorskip("ray")
    driver = RayDriver(tmp_path_factory.mktemp("ray"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def spark_session():
    if importlib.util.find_spec("pyspark") is None or shutil.which("java") is None:
        pytest.skip("Spark needs pyspark and Java")
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        session = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield
        session.stop()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    try:
        with (
            slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), free_ports(2)) as environment,
            pytest.MonkeyPatch.context() as patch,
        ):
            for name, value in environment.items():
                patch.setenv(name, value)
            yield
    except slurm_cluster.NoSlurm as reason:
        pytest.skip(f"no Slurm here: {reason}")


@pytest.fixture(
    scope="module",
    params=[("local", "local"), ("ray", "ray_driver"), ("spark", "spark_session"), ("slurm", "slurm")],
    ids=lambda pair: pair[0],
)
def run_cell(request):
    """`launch.run` on one of the engines."""
    name, service = request.param
    running = request.getfixturevalue(service)
    return running if name == "ray" else functools.partial(launch.run, engine=name)


@pytest.fixture(scope="module")
def one_device():
    return launch_cells.train(2)


@pytest.mark.filterwarnings("ignore")  # Ray and Spark warn of their own matters
def test_two_workers_train_what_one_device_trains(run_cell, one_device):
    losses, weights, replicas = run_cell(launch_cells.train, [2], workers=2)
    assert replicas == 2
    assert one_device[2] == 1
    # Sums of 16 rows in another order, for 8 steps of Adam of at most 0.01 each.
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    for ours, theirs in zip(weights, one_device[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_two_workers_prune_and_cluster_what_one_device_does():
    alone = launch_cells.make_smaller()
    together = launch.run(launch_cells.make_smaller, workers=2)
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours == 0, theirs == 0)
        assert len(np.unique(ours)) <= 6
        np.testing.assert_allclose(ours, theirs, atol=1e-5)  # sums in another order, 12 steps of Adam


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_raises_ends_the_job_with_its_words(run_cell):
    begun = time.monotonic()
    with pytest.raises(launch.WorkerError, match="worker 1 raised KeyError: 'a bad day'"):
        run_cell(launch_cells.fail_on_the_second, workers=2)
    assert time.monotonic() - begun < 2 * NOTICED_S  # with the start of two workers


@pytest.mark.filterwarnings("ignore")
def test_all_workers_start_again(run_cell, tmp_path):
    answer = run_cell(launch_cells.fail_once, [str(tmp_path)], workers=2, max_restarts=1)
    assert answer == "second life"


def command(*arguments, workers=2, restarts=0):
    options = ["--workers", str(workers), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "tfaccel", "launch", *options, SCRIPT, *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("restart", folder, "")
    assert done.returncode == 0, done.stderr
    return folder, done


def weights(folder, index):
    with np.load(folder / f"weights{index}.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def test_output_has_the_number_of_its_worker_and_only_the_chief_reports(undisturbed):
    folder, done = undisturbed
    lines = done.stdout.splitlines()
    assert sum(line.startswith("[worker 0] Epoch ") for line in lines) == launch_cells.EPOCHS
    assert not [line for line in lines if line.startswith("[worker 1] Epoch")]
    assert all(line.startswith("[worker ") for line in lines)
    assert len((folder / "log.csv").read_text().splitlines()) == launch_cells.EPOCHS + 1
    assert (folder / "model.keras").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("SIGKILL", "worker 1 of 2 was ended by SIGKILL"), ("SIGSTOP", "worker 1 is frozen")],
)
def test_a_job_goes_on_from_its_backup(undisturbed, tmp_path, name, said):
    begun = time.monotonic()
    done = run("restart", tmp_path, name, restarts=1)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 2 * NOTICED_S
    assert said in done.stderr
    assert "starting all 2 again (1 of 1)" in done.stderr
    for index in range(2):
        for ours, theirs in zip(weights(tmp_path, index), weights(undisturbed[0], 0), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    epochs = [line.split(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert epochs == ["epoch", *map(str, range(launch_cells.EPOCHS))]


def is_there(pid):
    """Whether a process runs; one that has ended and that nobody has asked about counts as gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("to", "number"),
    [
        ("worker", signal.SIGTERM),
        ("launcher", signal.SIGHUP),
        ("launcher", signal.SIGKILL),
    ],
)
def test_a_signal_ends_the_job(tmp_path, to, number):
    process = subprocess.Popen(command("forever", tmp_path), stderr=subprocess.PIPE, text=True)
    places = [tmp_path / f"pid{index}" for index in range(2)]
    for _ in range(600):
        time.sleep(0.1)
        if all(place.exists() and place.read_text() for place in places):
            break
    workers = [int(place.read_text()) for place in places]
    os.kill(workers[1] if to == "worker" else process.pid, number)
    _, errors = process.communicate(timeout=NOTICED_S)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if to == "worker":
        assert "worker 1 of 2 was ended by SIGTERM" in errors
    for _ in range(50):
        if not any(map(is_there, workers)):
            return
        time.sleep(0.1)
    raise AssertionError("a worker has outlived its launcher")


def test_what_a_failed_worker_started_ends_too(tmp_path):
    begun = time.monotonic()
    done = run("parent", tmp_path)
    assert time.monotonic() - begun < NOTICED_S
    assert done.returncode == 3
    for index in range(2):
        assert not is_there(int((tmp_path / f"child{index}").read_text()))


def pair(case, folder, scripts=(SCRIPT, SCRIPT), only=(0, 1), timeout_s=30):
    """Two workers without a launcher, as users start them by hand; their exit codes and output."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, scripts[index], case, str(folder)],
            env={
                **os.environ,
                "TF_CONFIG": tf_config(addresses, index),
                "TFACCEL_START_TIMEOUT_S": str(timeout_s),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in only
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("index", [0, 1])
def test_a_peer_that_never_starts_is_named(tmp_path, index):
    codes, outputs = pair("forever", tmp_path, only=(index,), timeout_s=2)
    assert codes == [1]
    assert f"RuntimeError: worker {1 - index} (127.0.0.1:" in outputs[0]
    assert "did not start within 2 s" in outputs[0]


def test_workers_with_different_scripts_are_refused(tmp_path):
    other = tmp_path / "launch_cells.py"
    other.write_text(pathlib.Path(SCRIPT).read_text() + "\n# edited on one machine only\n")
    codes, outputs = pair("forever", tmp_path, scripts=(SCRIPT, str(other)))
    assert codes == [1, 1]
    for output in outputs:
        assert "ValueError: The workers differ in script: launch_cells.py (" in output


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("unwritable", "BackupAndRestore: backup_dir="),
        ("too_few", "fit was given 1 samples for 2 replicas"),
    ],
)
def test_bad_input_ends_the_job_before_its_first_step(tmp_path, case, said):
    done = run(case, tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "ValueError" in done.stderr


def test_a_callback_list_of_the_users_serves_two_fits(tmp_path):
    text = launch.run(launch_cells.own_list, [str(tmp_path)], workers=2)
    assert [line.split(",")[0] for line in text.splitlines()] == ["epoch", "0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("function", "restarts", "said"),
    [
        (launch_cells.leave, 0, "worker 0 ended without a result"),
        (launch_cells.give_a_lock, 0, "what 'give_a_lock' returned can't be sent back"),
        (launch_cells.fail_then_die, 1, "worker 0 of 1 was ended by SIGKILL"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_without_a_result_says_why(function, restarts, said):
    with pytest.raises(launch.WorkerError, match=said):
        launch.run(function, workers=1, max_restarts=restarts)


def test_a_function_beside_the_script_is_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("def answer():\n    return 42\n")
    (tmp_path / "main.py").write_text(
        "import beside, tfaccel\n"
        "if __name__ == '__main__':\n"
        "    print(tfaccel.launch.run(beside.answer, workers=1))\n"
    )
    monkeypatch.delenv("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1:] == ["42"], done.stderr


def test_an_accelerator_that_comes_too_late_is_refused_at_once(tmp_path):
    codes, outputs = pair("late", tmp_path, only=(0,))
    assert codes == [1]
    assert "ValueError: TensorFlow has run operations already" in outputs[0]


def test_every_sample_is_seen_once_whatever_the_sharding_policy():
    means, whole = launch.run(launch_cells.seen, workers=2)
    assert sorted(means) == ["AUTO", "DATA", "OFF"]
    # float32 means of 64 labels up to 9; a sample in place of another moves it by 1 / 64 or more.
    for policy, epochs in means.items():
        np.testing.assert_allclose(epochs, [whole] * 2, rtol=1e-5, err_msg=policy)


def test_workers_cut_their_epochs_alike_whatever_their_clocks_say():
    losses = launch.run(launch_cells.clocks_apart, workers=2)
    assert len(losses) == 8
    assert np.isfinite(losses).all()


def test_every_sample_is_seen_once_in_files_that_the_workers_share(tmp_path):
    means, whole = launch.run(launch_cells.seen_in_files, [str(tmp_path)], workers=2)
    for epochs in means:
        np.testing.assert_allclose(epochs, [whole] * 2, rtol=1e-5)


def test_canary_upstream_survives_sigterm_shuffles_apart_and_writes_everywhere(tmp_path):
    codes, outputs = pair("plain_keras", tmp_path)
    assert codes == [0, 0], outputs
    orders = [json.loads((tmp_path / f"survived{index}.json").read_text()) for index in range(2)]
    assert orders[0] != orders[1]
    assert (tmp_path / "model1.keras").exists()


def test_the_public_launcher_is_in_the_package():
    assert tfaccel.launch is launch
