"""What two studies make at once is made once: whoever comes second waits, and takes what the first has left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tests.stages.test_search_rows import POINT, Ready, study

from medssl import leases
from medssl.artifacts import publish, read_marker
from medssl.leases import lease
from medssl.stages import encode, evaluate, transfer
from medssl.stages.context import Context
from medssl.stages.specs import Spec


def test_a_cell_that_two_studies_evaluate_at_once_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has found nothing finished when it begins; it meets the first's lease, and then only does what is left."""
    opened = study(tmp_path)
    specs = {seed: Spec("evaluate", {"seed": seed}, {}, f"head seed {seed}") for seed in range(3)}
    fewer = {seed: specs[seed] for seed in range(2)}
    context = cast(Context, Ready(opened))
    tasks = [evaluate.EvaluateTask(context, "colour", "probe", 0, 0, each, "embed-0", None, POINT) for each in (fewer, specs)]
    fit, fitted = evaluate._fit, list[list[int]]()
    second, under_way = threading.Thread(target=evaluate.evaluate, args=(tasks[1],)), threading.Event()
    read_owner = leases._read_owner

    def watched_fit(*arguments: Any) -> Any:
        fitted.append(list(arguments[5]))
        if len(fitted) == 1:
            second.start()
        else:
            under_way.set()
        assert under_way.wait(60), "the second neither fits nor waits"
        return fit(*arguments)

    def watched_read_owner(*arguments: Any) -> Any:
        under_way.set()
        return read_owner(*arguments)

    monkeypatch.setattr(evaluate, "_fit", watched_fit)
    monkeypatch.setattr(leases, "_read_owner", watched_read_owner)
    evaluate.evaluate(tasks[0])
    second.join(60)
    assert fitted == [[0, 1], [2]]
    assert all(read_marker(opened.store, spec.name) is not None for spec in specs.values())


def embedded(context: Context, spec: Spec) -> None:
    encode._encode(encode.EmbedTask(context, spec, "colour", "probe", None, 0), {}, None)


def transferred(context: Context, spec: Spec) -> None:
    transfer.transfer(transfer.TransferTask(context, {"evaluate-0": spec}, None, [0], [0], ["a"], {"evaluate-0": 0}))


@pytest.mark.parametrize(("module", "makes", "work"), [(encode, "_make", embedded), (transfer, "_probabilities", transferred)])
def test_a_task_waits_for_another_studys_and_makes_nothing(
    module: Any, makes: str, work: Callable[[Context, Spec], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, spec = study(tmp_path), Spec("embed", {}, {}, "features")
    made, waits, read_owner = list[Any](), threading.Event(), leases._read_owner
    monkeypatch.setattr(encode, "export", lambda: None)  # to a Ray that is not there
    monkeypatch.setattr(module, makes, lambda *arguments: made.append(arguments) or waits.set())

    def watched_read_owner(*arguments: Any) -> Any:
        waits.set()
        return read_owner(*arguments)

    second = threading.Thread(target=work, args=(cast(Context, Ready(opened)), spec))
    with lease(opened.store, spec.name):
        monkeypatch.setattr(leases, "_read_owner", watched_read_owner)
        second.start()
        assert waits.wait(60), "it neither makes nor waits"
        files = {"features.npy": b"x"}
        publish(opened.store, spec.name, stage=spec.stage, version=1, config={}, inputs={}, files=files, facts={})
    second.join(60)
    assert not made and not second.is_alive()
