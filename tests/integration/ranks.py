"""Runs a test's function on real processes that form a gloo group, without Ray.

The processes are forked from a server that has the heavy modules loaded already (importing them takes longer than the
tests); the function is found by file and name, so that test modules need not be importable.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing as mp
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "timm", "kornia.enhance", "kornia.filters", "medssl.training.loop"])


def start_ranks(body: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[ForkServerProcess]:
    """Starts `body(process, *args)` on `world` processes; `folder` takes their rendezvous, results and output."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    call = pickle.dumps((inspect.getfile(body), body.__name__, args))
    ranks = [_context.Process(target=_run, args=(folder, rank, world, call), daemon=True) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def exit_codes(ranks: Sequence[ForkServerProcess]) -> list[int | None]:
    """Waits for the ranks; what each ended with (negative: the signal). None of them is left."""
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


def run_on_ranks(body: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """What `body(process, *args)` returns on each of `world` processes; fails with the log of a rank that failed."""
    codes = exit_codes(start_ranks(body, world, folder, *args))
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}:\n{(folder / f'{rank}.log').read_text()[-3000:]}"
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def _run(folder: Path, rank: int, world: int, call: bytes) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        (folder / f"{rank}.result").write_bytes(pickle.dumps(_call(folder, rank, world, *pickle.loads(call))))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a group whose peer was killed may not shut down in order
    os._exit(0)


def _call(folder: Path, rank: int, world: int, file: str, name: str, args: tuple[Any, ...]) -> Any:
    import torch

    from medssl import collectives

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("ranks_body", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    process = collectives.join_process_group(
        rank=rank, world=world, init_method=f"file://{folder}/rendezvous", device="cpu", timeout_seconds=60
    )
    result = getattr(module, name)(process, *args)
    collectives.leave_process_group()
    return result
