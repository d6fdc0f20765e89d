"""A command's life on one rank: the world is joined, watched, and left with an exit code that
all ranks agree on.

Under torchrun or Slurm the usual environment variables say which rank this is; without them the
process is a world of one, with a real process group, so that one rank and a thousand run the same
code.
"""

from __future__ import annotations

import datetime
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from sailplan.errors import (
    EXIT_FAILURE,
    EXIT_HANG,
    EXIT_STOPPED,
    ConfigurationError,
    SailplanError,
)
from sailplan.runtime.board import Board, RankNote
from sailplan.runtime.config import ParallelConfig
from sailplan.runtime.environment import (
    host_name,
    local_rank,
    local_world_size,
    world_size_from_environment,
)
from sailplan.runtime.groups import form_groups, leave_groups
from sailplan.runtime.hang_report import lost_hosts, missing, stay, table
from sailplan.runtime.leaving import code_of, end_now, first_to_say, is_lost_peer, note_lost, say
from sailplan.runtime.network import check_first_node, check_reachable
from sailplan.runtime.process import Parallel, device_type
from sailplan.runtime.signals import stop_flag
from sailplan.runtime.watch import Watch, phase, watching

BEHIND_THE_WATCH = (
    5.0  # seconds: groups time out after the watch has reported, which knows who is missing
)
CAUSE_SECONDS = 1.5  # after a lost peer, for the rank that failed first to say so


@contextmanager
def started(config: ParallelConfig) -> Iterator[Parallel]:
    """Join the world, form the groups, yield this rank's place; leave the world at the end.

    Work inside is watched: see `runtime.watch`. With several ranks, an error that leaves the block
    ends the process: it is noted for the other ranks before their connections to this one close.
    Raises ConfigurationError before any group is formed if `parallel.tensor` does not divide the
    world.
    """
    world_size = world_size_from_environment()
    config.check_world(world_size)
    rank = int(os.environ.get("RANK", "0"))
    with (
        stop_flag() as flag,
        watching(config.timeout_seconds, flag, rank) as watch,
    ):
        try:
            with phase("start"):
                device = _device(config, world_size)
                _join(watch, config, device, world_size)
                parallel = form_groups(config.tensor, device)
            yield parallel
        except BaseException as error:
            if world_size > 1:
                watch.leaving = True
                settle(error, watch)
            raise
        finally:
            if dist.is_initialized():
                leave_groups()
        watch.leaving = True
        if watch.board is not None:
            with suppress(Exception):  # a rank that is done needs nobody any more
                watch.board.leave(0, "")


def _device(config: ParallelConfig, world_size: int) -> torch.device:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # connections to all other ranks, mapped shards, and pipes of workers
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if device_type() == "cuda":
        number = local_rank()
        if number >= torch.cuda.device_count():
            raise ConfigurationError(
                f"host {host_name()}: found {torch.cuda.device_count()} GPUs, expected one for each "
                f"of {local_world_size(world_size)} ranks: start fewer, or look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES there"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        return device
    share = len(os.sched_getaffinity(0)) // local_world_size(world_size)
    torch.set_num_threads(_threads_to_be_had(config.threads or max(1, share)))
    return torch.device("cpu")


def _threads_to_be_had(wanted: int) -> int:
    """Return the wanted number of threads, or OpenMP's limit of this process where it is lower.

    OpenMP then starts fewer threads than torch was told of, and the others are waited for.
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    return min(wanted, int(limit)) if limit.isdigit() and int(limit) else wanted


def _join(watch: Watch, config: ParallelConfig, device: torch.device, world_size: int) -> None:
    timeout = datetime.timedelta(seconds=config.timeout_seconds + BEHIND_THE_WATCH)
    backend, bound = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    if world_size == 1:
        store = dist.HashStore()  # no file: a rank that is killed would leave it behind
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=bound
        )
        return
    # torchrun's agent has the store already; without it rank 0 opens it when the group is formed.
    early = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not early:
        check_first_node()
    else:
        _show_on(watch, Board.of_launch(config.timeout_seconds))
        _check_devices(watch, device)
    if world_size > local_world_size(world_size):
        check_reachable()
    dist.init_process_group(backend, timeout=timeout, device_id=bound)
    if not early:
        _show_on(watch, Board.of_launch(config.timeout_seconds))


def _check_devices(watch: Watch, device: torch.device) -> None:
    """Raise ConfigurationError on all ranks where only some have a GPU: their messages would never
    meet.
    """
    assert watch.board is not None
    if watch.board.count(f"device/{device.type}") == 1:
        watch.board.write(f"device of/{device.type}", f"rank {watch.note.rank} ({watch.note.host})")
    watch.meet("devices")
    counts = {kind: watch.board.counted(f"device/{kind}") for kind in ("cuda", "cpu")}
    if all(counts.values()):
        raise ConfigurationError(
            f"GPUs: found by {counts['cuda']} ranks and not by {counts['cpu']}, such as "
            f"{watch.board.read('device of/cpu')}, expected by all or none: look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES there"
        )


def _show_on(watch: Watch, board: Board) -> None:
    """Let the others see this rank at once: one that is lost before its watch's first look is named."""
    watch.note.seen = time.time()
    board.show(watch.note)
    watch.board = board


def settle(error: BaseException, watch: Watch) -> None:
    """Say an error as often as it has to be said in the job, note it, and leave the process with
    the job's exit code.
    """
    watch.gate.acquire()  # where the watch leaves already, it ends the process under us
    board, line = watch.board, f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, SailplanError) and not (
        error.exit_code == EXIT_FAILURE and error.__cause__ and is_lost_peer(error.__cause__)
    ):
        if first_to_say(str(error), board):
            say(str(error))
        end_now(code_of(error), str(error), board)
    if isinstance(error, KeyboardInterrupt):
        end_now(EXIT_FAILURE, "interrupted", board)
    if isinstance(error, SailplanError) or is_lost_peer(error):
        _lost(line, watch)
    told = "".join(traceback.format_exception(error))
    if first_to_say(told, board):
        print(told, file=sys.stderr, end="", flush=True)
    end_now(EXIT_FAILURE, line, board)


def _lost(line: str, watch: Watch) -> None:
    """Leave after a collective failed: with the job's code where a rank says why, else with 70."""
    board, where = watch.board, f"in {watch.note.phase} at step {watch.note.step}"
    deadline = time.monotonic() + CAUSE_SECONDS
    with suppress(Exception):
        while board is not None and time.monotonic() < deadline:
            if board.failed():
                say(f"left {where}, as a peer did: {board.cause()}")
                end_now(None, "", board)
            if watch.flag.name is not None and board.counted("code/75"):
                end_now(EXIT_STOPPED, "stopped", board)
            time.sleep(0.1)
        if board is not None and board.count("lost") == 1:
            patience = 2 * watch.tick + 1
            notes = _until_missing(board, patience)
            now = time.time()
            gone = missing(notes, now, patience)
            named = (
                ", ".join(
                    f"{rank} ({note.host})" if (note := notes[rank]) else str(rank) for rank in gone
                )
                or "that is not known"
            )
            note_lost(lost_hosts(notes, now, patience))
            say(
                f"lost a peer {where}: rank {named}, which said nothing before; resume with "
                f"resume=auto ({line[:200]})"
            )
            for row in table(notes, now, patience):
                say(row)
            board.write("table", "written")
            end_now(EXIT_HANG, line, board)
        if board is not None:
            stay(watch.note, board, watch.tick)  # or the table would name this rank, too
    say(f"lost a peer {where} ({line[:200]})")
    end_now(EXIT_HANG, line, board)


def _until_missing(board: Board, patience: float) -> list[RankNote | None]:
    """Return the ranks' notes once one of them is old enough to tell a lost rank by."""
    deadline = time.monotonic() + patience + 1
    while True:
        notes = board.notes()
        if missing(notes, time.time(), patience) or time.monotonic() > deadline:
            return notes
        time.sleep(0.2)
