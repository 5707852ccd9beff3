"""What one more fine-tuning on a machine adds in memory: images shared through the page cache against a copy of its own.

    python tests/benchmarks/finetune_memory.py [--processes 4] [--images 10000] [--px 72] [--labelled 256]

Processes open the same resident images, fine-tune a ResNet-18 at 64 px for an epoch, read every image once and stay, one more at
a time, as trials do that run at once. Printed is what the sum of their proportional set sizes (PSS: a page that k processes map
counts 1/k in each) grows by with each, and the last one's pages that nobody else maps (USS), from /proc/PID/smaps_rollup: Linux
only. From the second process on the growth is what the 35th adds as well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

KINDS = {"shared": "images shared", "own": "its own copy of the images"}
MIB = 2**20


def finetune_and_stay(folder: str, labelled: int, own: bool) -> None:
    """A process of the benchmark: says when it is done, and ends with its standard input."""
    import torch

    from medssl.networks.encoder import EncoderParams
    from medssl.training.feed import ResidentImages
    from medssl.training.finetune import FineTuneParams, finetune

    torch.set_num_threads(1)
    images = ResidentImages.open(folder)
    if own:
        images = ResidentImages(images.path, np.array(images.images), images.image_ids)
    rows = np.arange(labelled)
    params = FineTuneParams(head_only_epochs=0, epochs=1)
    tuned = finetune(None, EncoderParams(), images, rows, rows % 7, 7, params, learning_rate=1e-3, seed=0)
    tuned.predict(images, rows)
    int(images.tensor()[:, ::4, ::4].sum(dtype=torch.int64))  # every page
    print("done", flush=True)
    sys.stdin.read()


def memory(process: int) -> dict[str, int]:
    """Bytes: rss, pss and uss (private pages) of a process."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    held = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
    return {"rss": held["Rss"], "pss": held["Pss"], "uss": held["Private_Clean"] + held["Private_Dirty"]}


def measure(folder: Path, kind: str, processes: int, labelled: int) -> list[list[dict[str, int]]]:
    """Memory of all processes each time that one more is done."""
    running: list[subprocess.Popen[str]] = []
    found = []
    try:
        for _ in range(processes):
            command = [sys.executable, __file__, "--child", str(folder), kind, "--labelled", str(labelled)]
            one = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.append(one)
            assert one.stdout is not None
            if one.stdout.readline().strip() != "done":
                raise SystemExit("a process of the benchmark failed; its reason stands above")
            found.append([memory(each.pid) for each in running])
    finally:
        for each in running:
            each.communicate()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--px", type=int, default=72)
    parser.add_argument("--labelled", type=int, default=256)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        finetune_and_stay(options.child[0], options.labelled, options.child[1] == "own")
        return
    from medssl.training.feed import ResidentImages

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (options.images, options.px, options.px, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "images"
        ResidentImages.write(folder, pixels, [f"{n:06d}" for n in range(len(pixels))])
        print(f"{options.images} images of {options.px} px: {pixels.nbytes / MIB:.0f} MiB; MiB")
        del pixels
        for kind, title in KINDS.items():
            found = measure(folder, kind, options.processes, options.labelled)
            sums = [0, *(sum(each["pss"] for each in held) for held in found)]
            added = ", ".join(f"{(after - before) / MIB:.0f}" for before, after in pairwise(sums))
            last = found[-1][-1]
            print(f"{title}: added by each process in turn {added}")
            print(f"  the last: USS {last['uss'] / MIB:.0f}, PSS {last['pss'] / MIB:.0f}, RSS {last['rss'] / MIB:.0f}")


if __name__ == "__main__":
    main()
