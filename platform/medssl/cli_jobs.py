"""The commands of those who run a cluster and its store: submit, jobs, logs, stop, usage, gc, forget."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medssl.job_server import Job, JobServer

Command = Callable[[str, Callable[[argparse.Namespace], "int | None"], str], argparse.ArgumentParser]
_ADDRESS = "the cluster's job server, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS)"


def add_commands(command: Command, add_study: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> None:
    """Adds the commands; `add_study` gives the arguments that every command of a study has."""
    sub = add_study(command("submit", _submit, "run a study as a job of a Ray cluster, and follow it"))
    sub.add_argument("--address", help=_ADDRESS)
    sub.add_argument("--detach", action="store_true", help="leave it running and return at once")
    sub.add_argument("--with", dest="include", action="append", default=[], metavar="PATH", help="a further file it names")
    sub.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable for the job; no secrets")
    sub = command("jobs", _jobs, "the studies on a cluster")
    sub.add_argument("--address", help=_ADDRESS)
    sub.add_argument("--all", action="store_true", help="other jobs of the cluster too")
    sub.add_argument("--json", action="store_true", help="print it for machines")
    sub = command("logs", _logs, "what a job has printed")
    sub.add_argument("job", help="a job, or a study")
    sub.add_argument("--address", help=_ADDRESS)
    sub.add_argument("--follow", action="store_true", help="go on until it ends; leaves with its exit code")
    sub = command("gc", _gc, "list what no study of a store needs any more, and remove it when told to")
    sub.add_argument("store", help="the store's URI")
    sub.add_argument("--drop", action="append", default=[], metavar="STUDY", help="a study that is not needed any more")
    sub.add_argument("--delete", action="store_true", help="remove what is listed")
    sub.add_argument("--json", action="store_true", help="print it for machines")
    sub = command("usage", _usage, "hours that runs took in a store, by study and submitter")
    sub.add_argument("store", help="the store's URI")
    sub.add_argument("--json", action="store_true", help="print it for machines")
    sub = command("forget", _forget, "remove a patient's images from a dataset, and mark what was made with them")
    sub.add_argument("patient", help="the patient's id")
    sub.add_argument("--dataset", required=True, metavar="URI", help="the dataset, or its name in the store")
    sub.add_argument("--store", help="store of the studies that may have used it (default: $MEDSSL_STORE, else ./medssl-store)")
    sub.add_argument("--pseudonymise", action="store_true", help="the dataset has keyed hashes in place of ids like this one")
    sub.add_argument("--key-file", help="file with the key (default: the environment's MEDSSL_PSEUDONYM_KEY)")
    sub.add_argument("--json", action="store_true", help="print it for machines")
    sub = command("stop", _stop, "stop a job in order: its step, a checkpoint, then out")
    sub.add_argument("job", help="a job, or a study")
    sub.add_argument("--address", help=_ADDRESS)


def _server(arguments: argparse.Namespace) -> JobServer:
    from medssl.job_server import JobServer, read_token, server_address

    server = JobServer(server_address(arguments.address), read_token())
    server.probe()
    return server


def _submit(arguments: argparse.Namespace) -> int:
    from medssl.cli import store_uri
    from medssl.submit import submit

    server = _server(arguments)
    done = submit(
        arguments.recipe, store_uri(arguments.store), server, overrides=arguments.set, include=arguments.include,
        variables=arguments.env, tell=lambda line: print(f"medssl: {line}", file=sys.stderr),
    )  # fmt: skip
    state = "is running it already: following that one" if done.attached else "submitted"
    print(f"medssl: job {done.job} {state}", file=sys.stderr)
    if arguments.detach:
        print(json.dumps({"job": done.job, "attached": done.attached}) if arguments.json else done.job)
        return 0
    return _follow(server, done.job)


def _follow(server: JobServer, job: str) -> int:
    from medssl.submit import follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = follow(server, job, write)
    except KeyboardInterrupt:
        print(f"\nmedssl: job {job} goes on; medssl logs {job} --follow shows it, medssl stop {job} ends it", file=sys.stderr)
        return 130
    print(f"medssl: job {job} left with {code}", file=sys.stderr)
    return code


def _jobs(arguments: argparse.Namespace) -> int:
    from medssl.submit import STUDY

    found = [job for job in _server(arguments).jobs() if arguments.all or STUDY in job.metadata]
    rows = [_row(job) for job in found]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    columns = ("job", "study", "status", "submitter", "started", "took", "store")
    cells = [[str(row[name] if row[name] is not None else "") for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    for line in [list(columns), *cells] if cells else []:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if not cells:
        print("no studies on this cluster" + ("" if arguments.all else "; --all lists its other jobs"))
    return 0


def _row(job: Job) -> dict[str, Any]:
    from medssl.submit import STORE, STUDY, SUBMITTER

    started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.started_ms / 1000)) if job.started_ms else None
    end = job.ended_ms or time.time() * 1000
    took = f"{(end - job.started_ms) / 60000:.1f} min" if job.started_ms else None
    return {
        "job": job.id, "study": job.metadata.get(STUDY), "status": job.status, "submitter": job.metadata.get(SUBMITTER),
        "started": started, "took": took, "store": job.metadata.get(STORE), "exit_code": job.exit_code,
    }  # fmt: skip


def _logs(arguments: argparse.Namespace) -> int:
    from medssl.submit import find_job

    server = _server(arguments)
    job = find_job(server, arguments.job)
    if arguments.follow:
        return _follow(server, job.id)
    sys.stdout.write(server.logs(job.id))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from medssl.submit import find_job, stop

    server = _server(arguments)
    job = find_job(server, arguments.job)
    if job.is_over:
        print(f"job {job.id} is over already: {job.status}")
        return 0
    print(f"medssl: stopping job {job.id}: its step and a checkpoint first", file=sys.stderr)
    found = stop(server, job)
    print(f"job {found.id}: {found.status}; the study goes on where it is when it is submitted again")
    return 0


def _usage(arguments: argparse.Namespace) -> int:
    from medssl.store import open_store
    from medssl.usage import summed

    rows = summed(open_store(arguments.store))
    if arguments.json:
        print(json.dumps(rows))
        return 0
    print(f"{'study':<32}{'submitter':<28}{'runs':>5}{'hours':>10}{'CPU hours':>11}{'GPU hours':>11}")
    for row in rows:
        sums = f"{row['runs']:>5}{row['hours']:>10.2f}{row['cpu_hours']:>11.2f}{row['gpu_hours']:>11.2f}"
        print(f"{row['study']:<32}{row['submitter']:<28}{sums}")
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    from medssl.cli import store_uri
    from medssl.datasets.pseudonyms import read_key
    from medssl.forgetting import forget
    from medssl.store import open_store

    key = read_key(arguments.key_file) if arguments.pseudonymise or arguments.key_file else None
    done = forget(arguments.patient, arguments.dataset, open_store(store_uri(arguments.store)), key)
    print(json.dumps(done.to_json()) if arguments.json else done.to_text())
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from medssl.leftovers import find_leftovers, remove
    from medssl.store import open_store

    store = open_store(arguments.store)
    found = find_leftovers(store, arguments.drop)
    if arguments.json:
        rows = [{"name": a.name, "stage": a.stage, "bytes": a.size, "finished": a.is_finished} for a in found.artifacts]
        print(json.dumps({"artifacts": rows, "studies": found.studies, "unreadable": found.unreadable, "running": found.running}))
    else:
        for artifact in found.artifacts:
            print(f"{artifact.name}  {artifact.size / 1e6:,.1f} MB{'' if artifact.is_finished else '  (not finished)'}")
        print(f"{len(found.artifacts)} artifacts, {found.size / 1e6:,.1f} MB, that none of {len(found.studies)} studies needs")
    if arguments.delete:
        removed = remove(store, found)
        print(f"removed {removed}", file=sys.stderr)
        return 0
    for name, reason in found.unreadable.items():
        print(f"what study '{name}' needs cannot be told: {reason}", file=sys.stderr)
    if found.artifacts and not arguments.json:
        print("nothing was removed: --delete does it")
    return 0
