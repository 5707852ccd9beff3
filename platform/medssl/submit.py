"""Studies as jobs of a Ray cluster: packed, submitted, followed, listed and stopped.

A job gets the recipe, the files named with it, this very package and a few settings that are no secrets; credentials are
the nodes' own (environment, profile or instance role), since whatever a job is given Ray keeps and shows in its dashboard.
A study has one job at a time: submitted again while it runs, the second command follows the first job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medssl
from medssl.artifacts import digest_json
from medssl.compute import SPARE_CPUS
from medssl.errors import MedsslError, RecipeError
from medssl.job_server import ClusterError, Job, JobServer
from medssl.recipe import Recipe
from medssl.recipe_file import Family, load_all
from medssl.store import split_uri
from medssl.usage import SUBMITTER_VARIABLE, submitter

STOP_SECONDS = 600
"""How long a job that is stopped may take for its step and checkpoint before Ray kills it."""
RECIPE_FILE = "recipe.yaml"
STUDY, STORE, RECIPE, SUBMITTER = "medssl_study", "medssl_store", "medssl_recipe", "medssl_submitter"
"""What a job's metadata say."""
PASSED_ON = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION", "MEDSSL_STORE_DEADLINE_SECONDS", "RAY_USAGE_STATS_ENABLED",
)  # fmt: skip
"""Settings of the submitter's environment that go with a job: where the store is, nothing that opens it."""
_SECRET = re.compile(
    r"""(?ix) secret | credential | private | connection_?string
    | token(?!i[sz])                                   # but TOKENIZERS_PARALLELISM
    | auth(?!or(_|s?$))                                # but GIT_AUTHOR_NAME
    | pass(w|phrase|code)
    | (?<!com)(?<!by)(?<!tres) pass\d*(_|$)            # PGPASS, DB_PASS; but COMPASS, BYPASS_CACHE
    | (?<!^)(?<!old) pwd(_|$)                          # MYSQL_PWD; but PWD, the folder one is in
    | pw(_|$)
    | ((^|_)|api|access|account|storage|service|master|ssh|gpg|rsa|aes|sign(ing)?|encryption|licen[cs]e) keys?\d*(_|$)
    | (^|_)(pat|creds?|dsn|jwt|psk|sas|bearer|cookie|netrc)(_|$)
    """
)
_RECONNECT_SECONDS = 300.0


@dataclass(frozen=True)
class Submitted:
    """A job of a study, and whether it was there already."""

    job: str
    attached: bool


def submit(
    recipe: str | Path,
    store: str,
    server: JobServer,
    *,
    overrides: Sequence[str] = (),
    include: Sequence[str] = (),
    variables: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Submitted:
    """Submits a study, or finds the job that is running it.

    Args:
        recipe: the study's YAML file.
        store: the store's URI; every node must reach it.
        server: the cluster's job server.
        overrides: `path.to.field=value`, passed on to `medssl run`.
        include: further files and folders that the recipe names, put beside it.
        variables: NAME or NAME=VALUE, set for the job; none that look like secrets.
        tell: called with lines for the user.

    Raises:
        RecipeError: the recipe, an included path or a variable is not valid.
        ClusterError: the cluster cannot be reached, refuses the token, is too small, has another version of Ray, or runs the
            study with other values.
    """
    family = load_all(recipe, overrides)
    store = _store_of_a_job(store)
    settings = _variables(variables)
    version = server.probe()
    _check_version(version)
    if server.is_open():
        tell(f"warning: the cluster at {server.address} asks for no token: whoever reaches it can run programs on it")
    if store.startswith("file:"):
        tell(f"the store {store} is a folder: it must be the same one on every node of the cluster")
    name, digest = family.name, digest_json({name: each.canonical() for name, each in family.recipes.items()})
    jobs = server.jobs()  # once: a job that comes after it has the number that this one chooses, and is found by it
    running = _running(jobs, name, store)
    if running is None:
        _check_resources(family, server.resources())
    if running is not None:
        if running.metadata.get(RECIPE) != digest:
            raise ClusterError(
                f"study '{name}' is being run with other values by job {running.id} of {running.metadata.get(SUBMITTER)}: wait "
                f"for it, stop it (medssl stop {running.id}), or give this study another name"
            )
        return Submitted(running.id, attached=True)
    metadata = {STUDY: name, STORE: store, RECIPE: digest, SUBMITTER: submitter()}
    command = ["python", "-m", "medssl.cli", "run", RECIPE_FILE, "--store", store]
    command += [word for override in overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory(prefix="medssl-job-") as folder:
        _pack(Path(folder), Path(recipe), include)
        _check_packed(Path(folder), family, tell)
        job = _job_id(jobs, name, digest_json([digest, store]))
        return _send(server, job, shlex.join(command), Path(folder), settings, metadata)


def follow(server: JobServer, job: str, write: Callable[[str], None]) -> int:
    """Writes what a job prints until it ends; its exit code. Goes on where it was after a lost connection.

    Raises:
        ClusterError: there is no such job, or the cluster stays away for five minutes.
    """
    written = 0
    while True:
        written += _tail(server, job, written, write)
        found = _patiently(lambda: server.job(job))
        if found.is_over:
            try:
                write(_patiently(lambda: server.logs(job))[written:])
            except ClusterError as error:  # the node that kept them is gone; how the job ended is known all the same
                write(f"medssl: the rest of the log cannot be read: {error}\n")
            return exit_code(found)
        time.sleep(1.0)


def exit_code(job: Job) -> int:
    """The exit code of a job's command; where it never got one, 143 for a stopped job and 1 for one that was lost."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 143
    return job.exit_code or 1


def find_job(server: JobServer, name: str) -> Job:
    """The job of this id, or the running (else latest) one of this study; `STUDY.DATASET`, as a study on several datasets is
    called in alerts and panels, finds the job of the whole.

    Raises:
        ClusterError: there is none, or several run.
    """
    found = server.jobs()
    for job in found:
        if job.id == name:
            return job
    whole = name
    while not (of_study := [job for job in found if job.metadata.get(STUDY) == whole]) and "." in whole:
        whole = whole.rpartition(".")[0]
    if not of_study:
        raise ClusterError(f"no job and no study '{name}' on {server.address}: `medssl jobs` lists them")
    running = [job for job in of_study if not job.is_over]
    if len(running) > 1:
        several = ", ".join(f"{job.id} ({job.metadata.get(SUBMITTER)}, {job.metadata.get(STORE)})" for job in running)
        raise ClusterError(f"several jobs run a study '{name}': name one of {several}")
    return (running or of_study)[0]


def stop(server: JobServer, job: Job, *, wait_seconds: float = STOP_SECONDS + 30) -> Job:
    """Stops a job in order and waits for its end: a pretraining finishes its step and writes a checkpoint.

    Raises:
        ClusterError: it has not ended after `wait_seconds`.
    """
    if job.is_over:
        return job
    server.stop(job.id)
    end = time.monotonic() + wait_seconds
    while True:
        found: Job = _patiently(lambda: server.job(job.id))
        if found.is_over:
            return found
        if time.monotonic() > end:
            raise ClusterError(f"job {job.id} was told to stop {wait_seconds:.0f} s ago and still runs: medssl logs {job.id}")
        time.sleep(0.5)


# -- before the start ------------------------------------------------------------------------------------------


def _check_version(version: str) -> None:
    import ray

    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ClusterError(
            f"the cluster runs Ray {version} and this medssl needs {ray.__version__.rpartition('.')[0]}: use an image that has it"
        )


def _check_resources(family: Family, there: Mapping[str, float]) -> None:
    for recipe in family.recipes.values():
        if recipe.compute.wait_for_nodes_minutes:
            continue  # the cluster grows on demand
        pretrains = any(arm.objective is not None for arm in recipe.arms)
        for name, amount in recipe.compute.needed(pretrains=pretrains).items():
            if amount > there.get(name, 0.0):
                what = "GPUs" if name == "GPU" else f"CPUs ({SPARE_CPUS} of them for reading)"
                raise ClusterError(
                    f"study '{recipe.study}' asks for {amount:g} {what} and the cluster has {there.get(name, 0.0):g}: lower "
                    "compute.workers, add nodes, or where nodes come on demand set compute.wait_for_nodes_minutes"
                )


def _store_of_a_job(given: str) -> str:
    """The store's URI in one form, since jobs are told apart by it.

    Raises:
        RecipeError: a path that begins in the folder one happens to be in.
    """
    scheme, place = split_uri(given)
    if scheme == "s3":
        return f"s3://{place}"
    if not given.startswith(("/", "~", "file:///")):
        raise RecipeError(
            f"store '{given}' is a folder below this one, which the cluster does not have: give --store s3://BUCKET/PATH, or the "
            "absolute path of a folder that every node mounts"
        )
    return Path(place).as_uri()


def _running(jobs: Sequence[Job], study: str, store: str) -> Job | None:
    for job in jobs:
        if not job.is_over and job.metadata.get(STUDY) == study and job.metadata.get(STORE) == store:
            return job
    return None


def _variables(given: Sequence[str]) -> dict[str, str]:
    """The job's environment: what is passed on from here, and NAME=VALUE or NAME as the user says."""
    found = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name) and "@" not in os.environ[name]}
    for text in given:
        name, separator, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise RecipeError(f"--env '{name}' is no variable's name: write NAME or NAME=VALUE")
        if _SECRET.search(name):
            raise RecipeError(
                f"--env {name} looks like a secret, and Ray keeps and shows what a job is given: set it on the nodes instead "
                "(cluster/README.md: credentials)"
            )
        if not separator and name not in os.environ:
            raise RecipeError(f"--env {name} is not set here: write {name}=VALUE, or set it")
        found[name] = value if separator else os.environ[name]
        if re.search(r"://[^/@\s]+@", found[name]):
            raise RecipeError(
                f"--env {name} holds a URL with a user or password, and Ray keeps and shows what a job is given: set it on the "
                "nodes instead (cluster/README.md: credentials)"
            )
    return found


def _pack(folder: Path, recipe: Path, include: Sequence[str]) -> None:
    """The job's working directory: the recipe, and what the user names with it."""
    shutil.copyfile(recipe, folder / RECIPE_FILE)
    for given in include:
        try:
            _copy(given, folder)
        except OSError as error:  # no right to read; below a folder (shutil.Error: a list of from, to, why) a link to nothing
            path, _, why = error.args[0][0] if isinstance(error, shutil.Error) else (given, folder, error.strerror or error)
            raise RecipeError(f"--with {given}: {path} cannot be copied ({why}): mend or remove it") from None


def _copy(given: str, folder: Path) -> None:
    source = Path(given).expanduser()
    if not source.exists():
        raise RecipeError(f"--with {given}: there is no such file or folder")
    place = source if not source.is_absolute() and ".." not in source.parts else Path(source.name)
    target = folder / place
    if target.exists():
        raise RecipeError(f"--with {given}: {place} is there twice; give them other names")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():  # without its ignore files, which Ray would obey: what is kept from git is named here to go along
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".gitignore", ".rayignore"))
    else:
        shutil.copyfile(source, target)


def _check_packed(folder: Path, family: Family, tell: Callable[[str], None]) -> None:
    """Refuses a file that the recipe names and that is here, where the job would not have it."""
    for what, given in dict.fromkeys(named for recipe in family.recipes.values() for named in _files_named(recipe)):
        path = Path(given).expanduser()
        if "://" in given or not path.is_file():
            continue  # a file of the store or of the nodes
        if path.is_absolute():
            tell(f"{what}: {given} has to be there on every node of the cluster")
        elif ".." in path.parts or not (folder / path).exists():
            renamed = f", and write {path.name} in the recipe" if ".." in path.parts else ""
            raise RecipeError(f"{what}: {given} is a file here, which the job would not have: add --with {given}{renamed}")


def _files_named(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe may name a file for, and the name."""
    weights = [(f"initial_weights of arm '{arm.name}'", arm.initial_weights) for arm in recipe.arms]
    return weights + [(f"predictions of arm '{arm.name}'", arm.predictions) for arm in recipe.outside]


def _job_id(jobs: Sequence[Job], study: str, digest: str) -> str:
    """`<study>-<recipe and store>-<number>`: two who submit at once choose the same, and one is told that it is taken."""
    stem = f"{study}-{digest[:8]}"
    numbers = [job.id.removeprefix(f"{stem}-") for job in jobs if job.id.startswith(f"{stem}-")]
    return f"{stem}-{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"


def _send(
    server: JobServer, name: str, entrypoint: str, folder: Path, variables: Mapping[str, str], metadata: Mapping[str, str]
) -> Submitted:  # fmt: skip
    runtime_env = {
        "working_dir": str(folder),
        "py_modules": [str(Path(medssl.__file__).resolve().parent)],
        "env_vars": {
            "PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), SUBMITTER_VARIABLE: metadata[SUBMITTER],
            **variables,
        },
        "excludes": ["__pycache__", "*.pyc"],
    }
    end = time.monotonic() + _RECONNECT_SECONDS
    while True:
        try:
            _client(server).submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env, metadata={**metadata})
            return Submitted(name, attached=False)
        except (RuntimeError, OSError, ValueError) as error:  # OSError: what requests raises of lost connections, too
            if "No available agent" in str(error) and time.monotonic() < end:  # a head that has only just come up
                time.sleep(2.0)
                continue
            if "already" in str(error) and any(job.id == name and not job.is_over for job in server.jobs()):
                return Submitted(name, attached=True)
            reason = ([line for line in str(error).splitlines() if line.strip()] or ["no reason given"])[-1][:300]
            hint = ": run the same command again" if isinstance(error, OSError) else ""
            raise ClusterError(f"{server.address} did not take the job ({reason}){hint}") from None


def _client(server: JobServer) -> Any:
    """Ray's own client, which uploads what a job needs."""
    try:
        import aiohttp  # type: ignore[import-not-found,unused-ignore]  # noqa: F401  # ray[default] brings it
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise MedsslError("submitting jobs needs Ray's job client: pip install 'medssl[cluster]'") from None
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):  # they tell of every package and connection
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    from ray.exceptions import AuthenticationError

    try:
        return JobSubmissionClient(server.address, headers=server.headers)
    except AuthenticationError as error:  # RAY_AUTH_MODE asks for a token where the cluster asks for none
        raise ClusterError(f"Ray's client has no token for {server.address} ({error.message}): set RAY_AUTH_TOKEN") from None


# -- while it runs ---------------------------------------------------------------------------------------------


def _tail(server: JobServer, job: str, skip: int, write: Callable[[str], None]) -> int:
    """Writes what a job prints after its first `skip` characters until the connection ends; how many it wrote."""
    written, seen, writing = 0, 0, False

    async def read() -> None:
        nonlocal written, seen, writing
        async for text in _client(server).tail_job_logs(job):
            fresh = text[max(0, skip + written - seen) :]
            seen += len(text)
            if fresh:
                writing = True
                write(fresh)
                writing = False
                written += len(fresh)

    from aiohttp import ClientError  # type: ignore[import-not-found,unused-ignore]

    try:
        asyncio.run(read())
    except (OSError, RuntimeError, ClientError):  # whatever cut it: the job's state, asked for next, tells what it means
        if writing:  # it is not the cluster that left, but who reads this, as `head` does
            raise
    return written


def _patiently(ask: Callable[[], Any]) -> Any:
    """The answer of a cluster that may be away for a while."""
    end = time.monotonic() + _RECONNECT_SECONDS
    while True:
        try:
            return ask()
        except ClusterError as error:
            if "no Ray cluster answers" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(2.0)
