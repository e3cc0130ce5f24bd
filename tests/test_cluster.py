"""Which workers the environment names, and what is wrong with it where it names none."""

import json

import pytest

from tfaccel.cluster import Cluster, find_cluster, tf_config

TWO = {"worker": ["a:1", "b:2"]}


def config(cluster, task):
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TF_CONFIG": " "},
        {"TF_CONFIG": "{}"},
        config({"worker": ["a:1"]}, {"type": "worker", "index": 0}),
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n1"},  # of a batch script, no step
        {"JOB_COMPLETION_INDEX": "1"},  # somebody else's Kubernetes job
    ],
)
def test_a_process_alone_has_no_cluster(environment):
    assert find_cluster(environment) is None


def test_tf_config():
    found = find_cluster({"TF_CONFIG": tf_config(["a:1", "b:2"], 1)})
    assert found == Cluster(2, 1, "a:1", "TF_CONFIG", ("a:1", "b:2"))


@pytest.mark.parametrize(("kind", "index", "number"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)])
def test_a_chief_of_its_own_comes_first(kind, index, number):
    found = find_cluster(config({**TWO, "chief": ["c:3"]}, {"type": kind, "index": index}))
    assert found == Cluster(3, number, "c:3", "TF_CONFIG", ("c:3", "a:1", "b:2"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TF_CONFIG": "{"}, "Correct or unset"),
        ({"TF_CONFIG": "[]"}, "Correct or unset"),
        ({"TF_CONFIG": '{"cluster": {"worker": 3}}'}, "Correct or unset"),
        (config(TWO, None), 'Set "task"'),
        (config(TWO, {"type": "worker", "index": 2}), "worker 0 to 1"),
        (config(TWO, {"type": "worker", "index": "0"}), "worker 0 to 1"),
        (config(TWO, {"type": "boss", "index": 0}), "worker 0 to 1"),
        (config({"worker": ["a:1", "a:1"]}, {"type": "worker", "index": 0}), "two workers have one address"),
        (config({"worker": ["a:1", "b"]}, {"type": "worker", "index": 0}), "'b' is no host:port"),
        (config({"worker": ["a:1", "b:70000"]}, {"type": "worker", "index": 0}), "'b:70000' is no host:port"),
        (config(TWO, {"type": "worker", "index": True}), "worker 0 to 1"),
        (config({**TWO, "evaluator": ["e:1"]}, {"type": "worker", "index": 0}), "nothing starts evaluators"),
        (config({**TWO, "ps": ["p:1"]}, {"type": "worker", "index": 0}), "parameter servers"),
        (
            {"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"},
            "Start with srun",
        ),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"}, "task 2 of 2"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "nodes ''"),
        ({"TFACCEL_WORKERS": "2", "JOB_COMPLETION_INDEX": "2", "TFACCEL_CHIEF": "a:1"}, "dry-run"),
        ({"TFACCEL_WORKERS": "2", "JOB_COMPLETION_INDEX": "0"}, "dry-run"),
    ],
)
def test_what_is_malformed_is_refused_with_a_remedy(environment, said):
    with pytest.raises(ValueError, match="Allowed") as error:
        find_cluster(environment)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-03,5]", "n01"),
        ("n[9-12]", "n9"),
        ("node-a[7]", "node-a7"),
        ("a[1-2].lab,b3", "a1.lab"),
        ("gpu.lab.org,x", "gpu.lab.org"),
    ],
)
def test_the_chief_of_a_slurm_step_is_on_its_first_node(nodes, host):
    environment = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "2",
    }
    found = find_cluster(environment)
    assert (found.size, found.index, found.addresses) == (4, 1, ())
    assert found.chief.rpartition(":")[0] == host
    assert find_cluster({**environment, "SLURM_STEP_ID": "3"}).chief != found.chief


def test_tf_config_is_preferred():
    environment = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "TF_CONFIG": tf_config(["a:1", "b:2"], 0),
    }
    assert find_cluster(environment).source == "TF_CONFIG"
