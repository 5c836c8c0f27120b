"""The processes of a run: who started them, which one this is, and how many there are."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """0 in the process that writes the files of a run, more than 0 in all others.

    Lightning's `rank_zero_only.rank` is 0 in the first process of every machine until there is a
    Trainer, and the folder of a run is locked before.
    """
    node = _integer(environment, "NODE_RANK", 0)  # of Lightning, on several machines
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if key in environment:
            return _integer(environment, key) + (node if key == "LOCAL_RANK" else 0)
    return node


def started_together(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or srun started this process, and others beside it."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return _integer(environment, "WORLD_SIZE", 1) > 1
    return _uses_slurm(environment) and _integer(environment, "SLURM_NTASKS") > 1


def check_processes(
    devices: int | str | list[int],
    num_nodes: int,
    *,
    accelerator: str = "auto",
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Check that as many processes were started as a trainer expects; returns their number.

    Args:
        devices: of each node, as `lightning.Trainer` takes them.
        num_nodes: machines.
        accelerator: decides how many devices "auto" and -1 are.
        environment: variables that torchrun, SLURM and Lightning set.

    Raises:
        ValueError: the numbers differ, or variables of a launcher are left over. Training would
            wait forever, or several processes would each train alone into one folder.
    """
    on_node = _count(devices, accelerator)
    expected = on_node * num_nodes
    here = f"trainer.devices={devices} trainer.num_nodes={num_nodes}"
    if "TORCHELASTIC_RUN_ID" in environment:
        total = _integer(environment, "WORLD_SIZE", 1)
        local = _integer(environment, "LOCAL_WORLD_SIZE", total)
        if (local, total) != (on_node, expected):
            nodes = total // local
            raise ValueError(
                f"{here}: torchrun started {total} processes, {local} on this node; pass "
                f"trainer.devices={local} trainer.num_nodes={nodes}, or run torchrun with "
                f"--nnodes={num_nodes} --nproc_per_node={on_node}"
            )
    elif _uses_slurm(environment):
        _check_slurm(environment, here, on_node, num_nodes)
    elif "LOCAL_RANK" in environment:  # Lightning starts its processes with it
        node = _integer(environment, "NODE_RANK", 0)
        position = node * on_node + _integer(environment, "LOCAL_RANK")
        total = _integer(environment, "WORLD_SIZE", expected)
        if total != expected or position >= expected:
            key = "WORLD_SIZE" if total != expected else "LOCAL_RANK"
            _reject_left_over(environment, key, here, expected)
        if _integer(environment, "RANK", position) != position:
            _reject_left_over(environment, "RANK", here, expected)
    elif "KUBERNETES_PORT" not in environment or "MASTER_ADDR" not in environment:
        if _integer(environment, "RANK", 0) != 0:
            _reject_left_over(environment, "RANK", here, expected)
        if _integer(environment, "WORLD_SIZE", expected) not in (1, expected):
            _reject_left_over(environment, "WORLD_SIZE", here, expected)
    elif _integer(environment, "WORLD_SIZE", 1) != expected:
        raise ValueError(
            f"{here}: WORLD_SIZE={environment['WORLD_SIZE']} processes were started; pass devices "
            "and num_nodes whose product it is"
        )
    return expected


def cluster_plugins(
    environment: Mapping[str, str] = os.environ,
) -> "list[ClusterEnvironment]":
    """The plugin that keeps a `lightning.Trainer` from requeueing a SLURM job.

    Otherwise Lightning would handle SIGUSR1, write hpc_ckpt_1.ckpt into its default_root_dir and
    start every later run from that. `callbacks.SaveOnSignal` handles the signal. Pass the folder of
    the run as `default_root_dir` too: Lightning then finds no such file of another run.
    """
    if "TORCHELASTIC_RUN_ID" in environment or not _uses_slurm(environment):
        return []
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)]


def _check_slurm(environment: Mapping[str, str], here: str, on_node: int, num_nodes: int) -> None:
    tasks = _integer(environment, "SLURM_NTASKS")
    nodes = _integer(environment, "SLURM_NNODES", num_nodes)
    per_node = _integer(environment, "SLURM_NTASKS_PER_NODE", tasks // nodes)
    if (tasks, nodes, per_node) != (on_node * num_nodes, num_nodes, on_node):
        raise ValueError(
            f"{here}: SLURM started {tasks} tasks on {nodes} nodes; pass "
            f"trainer.devices={max(1, tasks // nodes)} trainer.num_nodes={nodes}, or run srun with "
            f"--nodes={num_nodes} --ntasks-per-node={on_node}"
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise ValueError(
            f"SLURM_NTASKS={tasks}: the number of tasks on each node is missing; run srun with "
            f"--ntasks-per-node={on_node}"
        )


def _reject_left_over(environment: Mapping[str, str], key: str, here: str, expected: int) -> None:
    raise ValueError(
        f"{key}={environment[key]}: set, but {here} is {expected} processes and neither torchrun "
        f"nor srun started this one; run unset {key}, or start the processes with torchrun"
    )


def _uses_slurm(environment: Mapping[str, str]) -> bool:
    """Lightning's own rule: in an interactive shell the tasks of SLURM do not count."""
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in environment and not interactive


def _count(devices: int | str | list[int], accelerator: str) -> int:
    """Devices on each node."""
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        if accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.accelerator.device_count())
    listed = [part for part in str(devices).split(",") if part.strip()]
    if len(listed) == 1 and listed[0].strip().isdecimal() and int(listed[0]) > 0:
        return 1 if "," in str(devices) else int(listed[0])
    if len(listed) > 1:
        return len(listed)
    raise ValueError(
        f"trainer.devices={devices}: must be a number, a list or auto; pass for example "
        "trainer.devices=1"
    )


def _integer(environment: Mapping[str, str], key: str, default: int | None = None) -> int:
    if default is not None and key not in environment:
        return default
    try:
        return int(environment[key])
    except ValueError:
        raise ValueError(f"{key}={environment[key]!r}: must be an integer; unset {key}") from None
