"""The command line: arguments, printing, exit codes. What it does lives in the stages and in `medssl.study`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medssl import __version__
from medssl.cli_jobs import add_commands
from medssl.errors import MedsslError, RecipeError
from medssl.stopping import StopAtOnce

_STORE_HELP = "store of the study: s3://bucket/prefix, file:///folder or a path (default: $MEDSSL_STORE, else ./medssl-store)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Messages of MedsslError are one line on standard error, no traceback."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if arguments.command in (_run, _ingest) and (arguments.address or os.environ.get("RAY_ADDRESS")):
        _use_token()
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return int(code or 0)
    except MedsslError as error:
        print(f"medssl: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        stopped = isinstance(error, StopAtOnce)
        print(f"medssl: {'stopped' if stopped else 'interrupted'}; run the same command again to go on", file=sys.stderr)
        return 143 if stopped else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _use_token() -> None:
    """Lets Ray answer a cluster that asks for a token, when the user has one; by itself it does so for local clusters only.

    Ray reads the mode when it is imported, so this comes before everything else.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or Path(named).expanduser().is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medssl", description="Learn from unlabelled medical images, and show that it helps.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"medssl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    _add_quickstart(command("quickstart", _quickstart, "a small study on synthetic images, start to report, in minutes"))
    _add_ingest(command("ingest", _ingest, "pack images and labels into a dataset in the store"))
    sub = command("inspect", _inspect, "a dataset's card, balance, bags and duplicates")
    sub.add_argument("dataset", help="URI of the dataset")
    sub.add_argument("--json", action="store_true", help="print it for machines")
    _add_study(command("run", _run, "run a study, or what is missing of it")).add_argument(
        "--address", help="address of a running Ray cluster (default: RAY_ADDRESS, else a local Ray of its own)"
    )
    sub = _add_study(command("plan", _plan, "the stages of a study, what is finished, what the rest costs, what it can show"))
    sub.add_argument("--hardware", metavar="NAME", help="estimate hours: a100, 8xh100 ..., or here (measures this machine)")
    sub.add_argument("--price", type=float, help="what a device of that hardware costs in an hour")
    _add_study(command("report", _report, "make the report of a finished study again"))
    add_commands(command, _add_study)
    sub = command("init", _init, "write a commented recipe for a dataset")
    sub.add_argument("dataset", help="URI of the dataset")
    sub.add_argument("--out", default="study.yaml", help="file to write (default: study.yaml)")
    _add_predict(command("predict", _predict, "apply a finished arm to new images"))
    _add_export(command("export", _export, "write a finished arm's encoder for other programs, with a model card"))
    sub = command("doctor", _doctor, "check what a run needs")
    sub.add_argument("--store", help="also check this store")
    sub = command("bench", _bench, "measure images/s of ingest, feed and step")
    sub.add_argument("--json", action="store_true", help="print it for machines")
    sub.add_argument("--images", type=int, default=512, help="synthetic images to measure with (default: 512)")
    return parser


def _add_quickstart(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--store", default="medssl-quickstart", help="folder for everything it makes (default: ./medssl-quickstart)")
    sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the recipe")
    sub.add_argument("--json", action="store_true", help="print results for machines")


def _add_study(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("recipe", help="the study's YAML file")
    sub.add_argument("--store", help=_STORE_HELP)
    sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field, as arms.0.epochs=5")
    sub.add_argument("--json", action="store_true", help="print results for machines")
    return sub


_LAYOUTS = (
    "isic2018", "isic2019", "isic2019-paper000", "ham10000", "isic2017", "padufes20", "dermnet", "oral", "oral-paper000",
    "breakhis400", "kather2016", "patchcamelyon", "kermany", "chexpert", "nih14", "covid-cxr", "busi", "brain-mri", "eurosat",
    "dicom",
)  # fmt: skip
"""Names of `datasets.layouts.LAYOUTS`, which a test compares; importing them here would slow every command."""
_COLUMNS = ("image", "image-id", "label", "patient", "bag", "split", "site", "device", "sex", "age")


def _add_ingest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", help="a table (.csv, .tsv, .parquet), or a folder with one folder per class")
    sub.add_argument("--to", required=True, metavar="URI", help="where the dataset goes: s3://bucket/path or file:///folder")
    sub.add_argument("--root", help="folder or s3:// URI that image paths start from and never leave (default: the table's)")
    sub.add_argument("--layout", metavar="NAME", help=f"the unpacked folder of a public dataset: {', '.join(_LAYOUTS)}")
    sub.add_argument("--partial", action="store_true", help="take a folder with fewer images than the public dataset has")
    sub.add_argument("--name", help="name of the dataset (default: the last part of the URI)")
    for column in _COLUMNS:
        sub.add_argument(f"--{column}-column", metavar="COLUMN", help=f"column that holds the {column.replace('-', ' ')}")
    sub.add_argument("--label-separator", metavar="TEXT", help="text between several labels of one image")
    sub.add_argument("--findings", metavar="A,B", help="columns that are findings: missing splits are stratified by them")
    sub.add_argument("--drop", action="append", default=[], metavar="COLUMN", help="leave a column of the table out")
    sub.add_argument("--licence", default="", help="licence text for the dataset card")
    sub.add_argument("--seed", type=int, default=0, help="seed of missing splits (default: 0)")
    sub.add_argument("--shares", metavar="TRAIN,VAL,TEST", help="shares of missing splits (default: 0.6,0.1,0.3)")
    sub.add_argument("--held-out", metavar="COLUMN=VALUE", help="make the images of one site (device, ...) the test split")
    sub.add_argument("--allow-leakage", action="store_true", help="take a split with a patient on two sides, and record it")
    sub.add_argument("--pseudonymise", action="store_true", help="replace patient ids by keyed hashes")
    sub.add_argument("--key-file", help="file with the key of --pseudonymise (default: the environment's MEDSSL_PSEUDONYM_KEY)")
    sub.add_argument("--reject-limit", type=float, default=0.05, help="largest share of unusable images (default: 0.05)")
    sub.add_argument("--address", help="address of a running Ray cluster (default: RAY_ADDRESS, else a local Ray of its own)")
    sub.add_argument("--json", action="store_true", help="print the result for machines")


def _add_predict(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("arm", help="name of an arm of a finished study, or the URI of one of its evaluate artifacts")
    sub.add_argument("images", nargs="+", help="image files, or folders of them")
    sub.add_argument("--out", required=True, help="file to write: .csv or .parquet")
    sub.add_argument("--store", help=_STORE_HELP)
    sub.add_argument("--study", help="the study, where several in the store have such an arm")
    sub.add_argument("--protocol", help="protocol whose head is used (default: the study's first)")
    sub.add_argument("--pretraining-seed", type=int, default=0, help="which encoder (default: 0)")
    sub.add_argument("--label-draw", type=int, default=0, help="which label draw (default: 0)")
    sub.add_argument("--seed", type=int, default=0, help="which head seed (default: 0)")
    sub.add_argument("--calibrated", action="store_true", help="scale by the temperature that fits the validation images")


def _add_export(sub: argparse.ArgumentParser) -> None:
    formats = ("timm", "torchvision", "safetensors", "onnx")
    sub.add_argument("arm", help="name of an arm of a finished study")
    sub.add_argument("--format", required=True, choices=formats, help="what the file is for; safetensors is medssl's own")
    sub.add_argument("--out", required=True, help="file to write; its model card goes beside it, named FILE.card.md")
    sub.add_argument("--store", help=_STORE_HELP)
    sub.add_argument("--study", help="the study, where several in the store have such an arm")
    sub.add_argument("--seed", type=int, default=0, help="which pretraining seed's encoder (default: 0)")
    sub.add_argument("--json", action="store_true", help="print the result for machines")


def store_uri(given: str | None) -> str:
    """The store that a command works on."""
    return given or os.environ.get("MEDSSL_STORE") or "medssl-store"


def _run(arguments: argparse.Namespace) -> int:
    from medssl.console import Console
    from medssl.family import run_all
    from medssl.recipe_file import load_all

    family = load_all(arguments.recipe, arguments.set)  # once: it may be edited while the study runs
    with Console() as console:
        results = run_all(
            family,
            store_uri(arguments.store),
            overrides=arguments.set,
            on_event=console,
            address=arguments.address,
        )
    return _print_results(arguments, family, results)


def _report(arguments: argparse.Namespace) -> int:
    from medssl.console import Console
    from medssl.family import report_all
    from medssl.recipe_file import load_all

    family = load_all(arguments.recipe, arguments.set)
    with Console() as console:
        results = report_all(family, store_uri(arguments.store), overrides=arguments.set, on_event=console)
    return _print_results(arguments, family, results)


def _print_results(arguments: argparse.Namespace, family: Any, results: dict[str, Any]) -> int:
    """One study as it is; of several each under its dataset's name, and where the page of all is."""
    from medssl.family import page_uri

    page = page_uri(family, store_uri(arguments.store))
    if page is None:
        return _print_result(next(iter(results.values())), arguments.json)
    if arguments.json:
        studies = {name: result.to_json() for name, result in results.items()}
        print(json.dumps({"studies": studies, "report": page}, allow_nan=False))
        return 0
    for name, result in results.items():
        print(f"{name}:")
        _print_result(result, False)
    print(f"all together: {page}")
    return 0


def _print_result(result: Any, as_json: bool) -> int:
    if as_json:
        print(json.dumps(result.to_json(), allow_nan=False))
    else:
        print(result.to_text())
        print(f"report: {result.report_uri}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from medssl.family import plan_all
    from medssl.recipe_file import load_all

    if arguments.price is not None and not arguments.hardware:
        raise RecipeError("--price is what a device of --hardware costs: give both")
    family = load_all(arguments.recipe, arguments.set)
    plans = plan_all(family, store_uri(arguments.store))
    costs = _costs(arguments, family, plans) if arguments.hardware else {}
    if arguments.json:
        found = {name: [asdict(line) for line in lines] for name, lines in plans.items()}
        for name, each in costs.items():
            found[name].append({"stage": "cost", **asdict(each), "total_hours": each.total})
        print(json.dumps(found if len(found) > 1 else next(iter(found.values()))))
        return 0
    for name, lines in plans.items():
        if len(plans) > 1:
            print(f"{name}:")
        _print_plan(lines)
        if name in costs:
            print(costs[name].to_text())
    return 0


def _costs(arguments: argparse.Namespace, family: Any, plans: dict[str, Any]) -> dict[str, Any]:
    from medssl.costs import cost, hardware

    on = hardware(arguments.hardware)
    return {recipe.study: cost(recipe, plans[recipe.study], on, arguments.price) for recipe in family.recipes.values()}


def _print_plan(lines: Sequence[Any]) -> None:
    from medssl.claims import assumptions

    width = max(len(line.label) for line in lines)
    for line in lines:
        cost = f"{line.images:>12,} images" if line.images else ""
        print(f"{line.label:<{width}}  {line.state:<18}{cost}".rstrip())
    left = [line for line in lines if line.state not in ("finished", "shared")]
    total = f", {sum(line.images for line in left):,} images known so far" if left else ": nothing to do"
    print(f"{sum(line.state == 'finished' for line in lines)} of {len(lines)} finished{total}")
    saved = sum(line.users - 1 for line in lines)
    if saved:
        print(f"{saved} further stages need not be made: arms or protocols share the above")
    if others := sum(line.state == "shared" for line in lines):
        print(f"{others} of these stages are made for a study above and shared")
    comparisons = [comparison for line in lines for comparison in line.comparisons]
    for comparison in comparisons:
        print(comparison.to_text())
    if comparisons:
        print(assumptions(comparisons))


def _quickstart(arguments: argparse.Namespace) -> int:
    from medssl.console import Console
    from medssl.quickstart import quickstart

    with Console() as console:
        result = quickstart(Path(arguments.store), overrides=arguments.set, on_event=console)
    return _print_result(result, arguments.json)


def _ingest(arguments: argparse.Namespace) -> int:
    from medssl.console import Console
    from medssl.datasets.held_out import HeldOut
    from medssl.datasets.pseudonyms import read_key
    from medssl.datasets.splits import read_shares
    from medssl.datasets.table import TableColumns
    from medssl.events import Event
    from medssl.stages.ingest import IngestOptions, ingest

    if arguments.key_file and not arguments.pseudonymise:
        raise RecipeError("--key-file is the key of --pseudonymise: give both or neither")
    names = [column.replace("-", "_") for column in _COLUMNS]
    options = IngestOptions(
        name=arguments.name,
        layout=arguments.layout,
        partial=arguments.partial,
        columns=TableColumns(**{name: getattr(arguments, f"{name}_column") for name in names}),
        root=arguments.root,
        label_separator=arguments.label_separator,
        drop=tuple(arguments.drop),
        findings=tuple(name.strip() for name in arguments.findings.split(",")) if arguments.findings else (),
        licence=arguments.licence,
        seed=arguments.seed,
        shares=read_shares(arguments.shares) if arguments.shares is not None else None,
        held_out=HeldOut.parse(arguments.held_out) if arguments.held_out is not None else None,
        allow_leakage=arguments.allow_leakage,
        pseudonym_key=read_key(arguments.key_file) if arguments.pseudonymise else None,
        reject_limit=arguments.reject_limit,
    )
    with Console() as console:
        result = ingest(
            arguments.source,
            arguments.to,
            options,
            address=arguments.address,
            on_progress=console.on_progress("ingest"),
            on_wait=lambda owner: print(f"the dataset is being ingested by {owner}; waiting", file=sys.stderr),
            tell=lambda line: console(Event("message", line)),
        )
    print(json.dumps(result.to_json()) if arguments.json else result.to_text())
    return 1 if result.rejected else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from medssl.stages.inspect import inspect_dataset, render_text

    facts = inspect_dataset(arguments.dataset)
    print(json.dumps(facts) if arguments.json else render_text(facts))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from medssl.starter import starter_recipe

    path = Path(arguments.out)
    if path.exists():
        raise RecipeError(f"{path} is there already: name another file with --out, nothing was written")
    text = starter_recipe(arguments.dataset)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}; name another file with --out") from None
    print(f"wrote {path}; next: medssl run {path} --store URI")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from medssl.stages.predict import predict

    written = predict(
        arguments.arm, arguments.images, Path(arguments.out), store_uri=store_uri(arguments.store), study=arguments.study,
        protocol=arguments.protocol, pretraining_seed=arguments.pretraining_seed, label_draw=arguments.label_draw,
        head_seed=arguments.seed, calibrated=arguments.calibrated,
    )  # fmt: skip
    print(written.to_text())
    return 1 if written.rejected else 0


def _export(arguments: argparse.Namespace) -> int:
    from medssl.stages.export import export

    written = export(
        arguments.arm, arguments.format, Path(arguments.out), store_uri=store_uri(arguments.store), study=arguments.study,
        pretraining_seed=arguments.seed,
    )  # fmt: skip
    print(json.dumps(written.to_json()) if arguments.json else written.to_text())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from medssl.stages.doctor import run_checks

    checks = run_checks(arguments.store)
    for check in checks:
        advice = f" - {check.advice}" if check.advice and not check.ok else ""
        print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}{advice}")
    return 0 if all(check.ok for check in checks) else 1


def _bench(arguments: argparse.Namespace) -> int:
    from medssl.stages.bench import bench, render_text

    rows = bench(images=arguments.images)
    print(json.dumps(rows) if arguments.json else render_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
