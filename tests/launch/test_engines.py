"""The parts of the launcher that need no workers; `tests/test_launch.py` has those that do."""

import os
import sys
import threading

import pytest
import tensorflow as tf
import yaml

from tfaccel import launch
from tfaccel.cli import main
from tfaccel.cluster import find_cluster
from tfaccel.launch.call import call, pack, pack_script, prefixed, unpack
from tfaccel.launch.kubernetes import manifest
from tfaccel.launch.local import environment_shares


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"workers": True}, "workers=True"),
        ({"workers": 2, "engine": "mpi"}, "'local', 'ray', 'spark', 'slurm'"),
        ({"workers": 2, "max_restarts": -1}, "max_restarts=-1"),
        ({"workers": 2, "start_timeout_s": 0}, "start_timeout_s=0"),
        ({"workers": 2, "start_timeout_s": float("inf")}, "start_timeout_s=inf"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match="Allowed") as error:
        launch.run(print, **options)
    assert said in str(error.value)


def test_a_function_that_cannot_be_sent_is_refused():
    for thing in (threading.Lock(), tf.data.Dataset.range(3)):
        with pytest.raises(ValueError, match=r"can't be sent to the workers.*Allowed"):
            launch.run(lambda thing=thing: thing, workers=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "0", "x.py"], "workers=0"),
        (["--workers", "2", "missing.py"], "script='missing.py' can't be read"),
        (["--workers", "2", "--engine", "kubernetes", "x.py"], "--dry-run"),
        (["--workers", "2", "--engine", "kubernetes", "--dry-run", "x.py"], "image=''"),
        (["--workers", "0", "--engine", "kubernetes", "--dry-run", "--image", "i", "x.py"], "workers=0"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_slurm_without_srun_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs srun"):
        launch.run(print, workers=2, engine="slurm")


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_an_engine_that_is_not_installed_is_refused(monkeypatch, engine):
    for name in ("ray", "pyspark", "pyspark.sql", "py4j.protocol"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"engine='{engine}' needs .*tfaccel\[{engine}\]"):
        launch.run(print, workers=2, engine=engine)


def test_a_script_travels_as_text(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    packed = pack_script(str(script), ["--a", "b"])
    script.unlink()
    before = sys.argv
    call(packed, wanted=True)
    assert capsys.readouterr().out == "__main__ ['--a', 'b']\n"
    assert sys.argv is before


def test_a_closure_travels():
    offset = 4
    packed = pack(lambda x, *, y: x + y + offset, [1], {"y": 2})
    assert unpack(call(packed, wanted=True)) == 7
    assert call(packed, wanted=False) == b""


def test_lines_get_the_number_of_their_worker(capsys):
    with prefixed(3):
        print("one\ntwo", end="")
        print(" more")
        sys.stderr.write("no end")
    captured = capsys.readouterr()
    assert captured.out == "[worker 3] one\n[worker 3] two more\n"
    assert captured.err == "[worker 3] no end\n"


def test_workers_of_one_machine_share_its_gpus():
    shares = environment_shares({"CUDA_VISIBLE_DEVICES": "0,2,5,7"}, 2)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0,2", "5,7"]


def test_more_workers_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"workers=2.*at most 1"):
        environment_shares({"CUDA_VISIBLE_DEVICES": "0"}, 2)


def test_workers_of_one_machine_share_its_cores():
    cores = len(os.sched_getaffinity(0))
    shares = environment_shares({"CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "3"}, 2)
    assert shares == [{"TF_NUM_INTRAOP_THREADS": str(max(1, cores // 2))}] * 2


def test_the_manifest_is_an_indexed_job_whose_pods_find_one_another():
    command = ["python", "train.py", 'a "b"']
    text = manifest(command, 3, image="lab/train:1", name="fit", gpus=2, max_restarts=4)
    service, job = yaml.safe_load_all(text)
    assert service["kind"] == "Service"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": "fit"}
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == 3
    assert spec["backoffLimit"] == 12
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "fit"
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["command"] == command
    assert container["image"] == "lab/train:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    found = find_cluster({**environment, "JOB_COMPLETION_INDEX": "2"})  # which Kubernetes adds
    assert (found.size, found.index, found.chief) == (3, 2, "fit-0.fit:8470")


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"gpus": -1}, {"max_restarts": -3}, {"start_timeout_s": 0.0}]
)
def test_a_manifest_with_numbers_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*Allowed"):
        manifest(["python"], **{"workers": 2, "image": "x", **options})


@pytest.mark.parametrize("name", ["", "Fit", "1fit", "fit_1", "-fit", "f" * 60])
def test_names_that_kubernetes_does_not_take_are_refused(name):
    with pytest.raises(ValueError, match="small letters"):
        manifest(["python"], 2, image="x", name=name)


def test_the_manifest_is_printed(capsys):
    arguments = ["--engine", "kubernetes", "--dry-run", "--image", "lab/train", "--workers", "2"]
    assert main(["launch", *arguments, "train.py", "--epochs", "3"]) == 0
    _, job = yaml.safe_load_all(capsys.readouterr().out)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "train.py", "--epochs", "3"]
    assert "resources" not in container
