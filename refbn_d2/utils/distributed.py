"""Start worker processes, by --num-gpus or torchrun and on several machines, and connect them."""

import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from refbn_d2.utils.errors import ConfigError, RefBNError, WorkerKilledError
from refbn_d2.utils.torch_compat import destroy_process_group, join

logger = logging.getLogger(__name__)

GRACE = 10.0  # seconds that the other workers have to end by themselves after one has failed


def launch(
    main: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    args: tuple,
) -> Any:
    """Call `main(*args)` in every worker process; nccl on CUDA, gloo on the CPU.

    Under torchrun (RANK and WORLD_SIZE in the environment) this process is one of its workers, and
    the numbers and `dist_url` are not used. A single worker runs in this process, and its result is
    returned.

    Raises:
        ConfigError: no worker, more GPUs than the machine has, or dist_url "auto" for several
            machines.
        RefBNError, OSError: the first of these that a worker raises.
        WorkerKilledError: a signal ended a worker.
        ProcessRaisedException: a worker raises any other error; holds its traceback.
        SystemExit: a worker ends with this code.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return _worker(local_rank, main, rank, size, local_size, "env://", device, args)
    if num_gpus_per_machine < 1:
        raise ConfigError(f"--num-gpus {num_gpus_per_machine}; allowed: 1 or more.")
    if device == "cuda" and num_gpus_per_machine > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {num_gpus_per_machine}; allowed: up to {torch.cuda.device_count()}, the "
            "number of this machine's GPUs."
        )
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        return main(*args)
    if dist_url == "auto":
        if num_machines > 1:
            raise ConfigError(
                "--dist-url auto is for a single machine; for several, give tcp://host:port."
            )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    errors = mp.get_context("spawn").SimpleQueue()
    context = mp.start_processes(
        _spawned,
        args=(errors, machine_rank, num_gpus_per_machine, main, world_size, dist_url, device, args),
        nprocs=num_gpus_per_machine,
        join=False,
    )
    # Workers stop after an iteration that they agree on, and write a checkpoint. Wait for them.
    handlers = {
        number: signal.signal(number, lambda number, frame: _pass_on(number, context.processes))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not join(context, grace_period=GRACE):
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        if not errors.empty():
            raise errors.get() from None
        if isinstance(error, mp.ProcessExitedException):
            if error.exit_code < 0:
                raise WorkerKilledError(
                    f"Worker {error.error_index} was killed by {error.signal_name}, so the others "
                    "were ended. If nobody killed it, the machine may be out of memory. Resume "
                    "with --resume."
                ) from None
            raise SystemExit(error.exit_code) from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def planned_world_size(num_gpus_per_machine: int, num_machines: int) -> int:
    """Return the number of workers that `launch` starts, or that torchrun has started."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(1, num_machines * num_gpus_per_machine)


def starts_worker_0(machine_rank: int) -> bool:
    """Return whether this process calls `launch` for worker 0, or is worker 0 under torchrun."""
    return int(os.environ.get("RANK", machine_rank)) == 0


def _pass_on(number: int, processes: list) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def _spawned(local_rank, errors, machine_rank, local_size, main, world_size, url, device, args):
    os.setsid()  # Ctrl-C in a terminal reaches only the parent, which passes it on once
    rank = machine_rank * local_size + local_rank
    try:
        _worker(local_rank, main, rank, world_size, local_size, url, device, args)
    except (RefBNError, OSError) as error:
        logger.debug("", exc_info=True)  # goes to log.txt
        errors.put(error)
        raise


def _worker(local_rank, main, rank, world_size, local_size, dist_url, device, args):
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    else:  # share the cores between the workers
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=dist_url, rank=rank, world_size=world_size)
    try:
        return main(*args)
    finally:
        destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every worker calls this."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Return worker 0's value on every worker."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value: Any) -> list:
    """Return the values of all workers on worker 0, [] on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model`; with several workers, in DistributedDataParallel with local buffers."""
    if world_size() == 1:
        return model
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=device_ids, broadcast_buffers=False
    )


def share_buffers(model: nn.Module) -> None:
    """Copy worker 0's buffers, such as the saved running statistics, to every worker."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def mean_over_workers(values: list[float], device: torch.device) -> list[float]:
    """Return each value's mean over the workers, on every worker, by one collective."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return (tensor / world_size()).tolist()
