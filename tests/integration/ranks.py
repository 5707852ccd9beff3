"""Runs a test's function on real processes that form a gloo group, without Ray.

Run as a program it is one rank: the function is found by file and name, so that test modules need not be importable.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180


def start_ranks(body: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[subprocess.Popen[bytes]]:
    """Starts `body(process, *args)` on `world` processes; `folder` takes their rendezvous, results and output."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call.pickle").write_bytes(pickle.dumps((inspect.getfile(body), body.__name__, args)))
    (folder / "rendezvous").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world):
        command = [sys.executable, __file__, str(folder), str(rank), str(world)]
        with open(folder / f"{rank}.log", "wb") as log:
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return ranks


def results(ranks: Sequence[subprocess.Popen[bytes]], folder: Path) -> list[Any]:
    """Waits for the ranks and returns what `body` returned on each; fails with the log of a rank that failed."""
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(TIMEOUT_SECONDS)
            assert code == 0, f"rank {rank} ended with {code}:\n{(folder / f'{rank}.log').read_text()[-3000:]}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(len(ranks))]


def run_on_ranks(body: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """What `body(process, *args)` returns on each of `world` processes."""
    return results(start_ranks(body, world, folder, *args), folder)


def _main(folder: Path, rank: int, world: int) -> None:
    import torch
    from medssl import collectives

    torch.set_num_threads(1)
    file, name, args = pickle.loads((folder / "call.pickle").read_bytes())
    spec = importlib.util.spec_from_file_location("ranks_body", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    process = collectives.join_process_group(
        rank=rank, world=world, init_method=f"file://{folder}/rendezvous", device="cpu", timeout_seconds=60
    )
    result = getattr(module, name)(process, *args)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    collectives.leave_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
