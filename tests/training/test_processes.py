import pytest

from repvgg.training.processes import check_processes, cluster_plugins, rank, started_together

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
}
SLURM = {
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
CHILD = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
KUBERNETES = {
    "KUBERNETES_PORT": "tcp://1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
    "WORLD_SIZE": "2",
    "RANK": "1",
}


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes"),
    [
        ({}, 1, 1),
        ({}, 8, 4),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, 1),
        (TORCHRUN, 2, 2),
        (TORCHRUN, [0, 1], 2),
        (TORCHRUN, "0,1", 2),
        (TORCHRUN, "2", 2),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "auto", 1),
        (SLURM, 2, 2),
        (SLURM | TORCHRUN, 2, 2),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, 1, 1),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 1, 1),
        (CHILD, 2, 1),
        ({"LOCAL_RANK": "0"}, 1, 1),
        (CHILD | {"NODE_RANK": "1", "WORLD_SIZE": "4"}, 2, 2),
        (KUBERNETES, 1, 2),
    ],
)
def test_a_trainer_that_agrees_with_its_launcher_is_accepted(environment, devices, num_nodes):
    check_processes(devices, num_nodes, accelerator="cpu", environment=environment)


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "message"),
    [
        (TORCHRUN, 1, 1, r"torchrun started 4 .* pass trainer.devices=2 trainer.num_nodes=2"),
        (TORCHRUN, 2, 1, r"torchrun started 4 .* trainer.num_nodes=2"),
        (TORCHRUN, 4, 1, r"torchrun started 4 .* --nnodes=1 --nproc_per_node=4"),
        (TORCHRUN, "auto", 2, r"torchrun started 4"),
        (SLURM, 1, 1, r"SLURM started 4 tasks on 2 nodes; pass trainer.devices=2"),
        (SLURM, 4, 1, r"--nodes=1 --ntasks-per-node=4"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 2, 1, r"SLURM started 1 tasks"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 1, 1, r"SLURM started 2 tasks"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 2, 1, r"srun with --ntasks-per-node=2"),
        ({"RANK": "1"}, 1, 1, r"RANK=1: .* run unset RANK"),
        ({"RANK": "1"}, 2, 1, r"RANK=1"),
        ({"RANK": "one"}, 1, 1, r"RANK='one': must be an integer"),
        ({"WORLD_SIZE": "2"}, 1, 1, r"WORLD_SIZE=2: .* run unset WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, 1, 1, r"LOCAL_RANK=1: .* run unset LOCAL_RANK"),
        (CHILD, 1, 1, r"WORLD_SIZE=2"),
        (CHILD | {"RANK": "0"}, 2, 1, r"RANK=0"),
        (KUBERNETES, 1, 1, r"WORLD_SIZE=2 processes were started"),
        ({}, "two", 1, r"trainer.devices=two: must be a number, a list or auto"),
    ],
)
def test_a_trainer_that_disagrees_with_its_launcher_is_an_error(
    environment, devices, num_nodes, message
):
    with pytest.raises(ValueError, match=message) as error:
        check_processes(devices, num_nodes, accelerator="cpu", environment=environment)

    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "number", "together"),
    [
        ({}, 0, False),
        (TORCHRUN, 3, True),
        (SLURM, 3, True),
        (SLURM | TORCHRUN | {"RANK": "2"}, 2, True),
        (CHILD, 1, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 0, False),
        ({"NODE_RANK": "1"}, 1, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, 1, False),
    ],
)
def test_one_process_writes_and_processes_started_together_are_known(environment, number, together):
    assert rank(environment) == number
    assert started_together(environment) == together


def test_slurm_does_not_requeue_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")

    (plugin,) = cluster_plugins()

    assert not plugin.auto_requeue
    assert cluster_plugins({}) == cluster_plugins(SLURM | TORCHRUN) == []
