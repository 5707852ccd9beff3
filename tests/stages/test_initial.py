"""Initial weights: where a file is sought, what counts as the same weights, what is put in place for the workers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from tests import finished_study

from medssl.artifacts import folder
from medssl.errors import DataError, RecipeError
from medssl.networks import EncoderParams, build_encoder, save_weights
from medssl.recipe_file import load
from medssl.stages.context import Context, Opened
from medssl.stages.encode import InitialiseTask, _failure, _initialise
from medssl.stages.initial import STAGED, facts_of, stage_weights, weights_digests
from medssl.stages.specs import Spec
from medssl.store import Store, open_store
from medssl.training.feed import ResidentImages
from medssl.views import eval_view

SMALL = EncoderParams(name="test_resnet", image_px=32)


def recipe(*weights: str) -> Any:
    arms = [{"name": f"arm{n}", "initial_weights": text} for n, text in enumerate(weights)]
    protocols = [{"name": "p", "kind": "linear_probe"}]
    encoder = {"name": "test_resnet", "image_px": 32}
    return load({"study": "s", "dataset": "datasets/d", "encoder": encoder, "arms": arms, "protocols": protocols})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store, and an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return open_store(str(tmp_path / "store"), create=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_where_a_file_is_sought(store: Store, tmp_path: Path) -> None:
    store.write("weights/a.pth", b"in the store")
    assert weights_digests(recipe("random", "weights/a.pth"), store) == {"arm1": digest(b"in the store")}
    Path("weights").mkdir()
    Path("weights/a.pth").write_bytes(b"here")
    elsewhere = tmp_path / "b.ckpt"
    elsewhere.write_bytes(b"elsewhere")
    chosen = recipe("weights/a.pth", str(elsewhere), elsewhere.as_uri(), store.uri_of("weights/a.pth"), "../b.ckpt")
    found = weights_digests(chosen, store)
    assert list(found.values()) == [digest(b) for b in (b"here", b"elsewhere", b"elsewhere", b"in the store", b"elsewhere")]


def test_what_is_no_file_of_weights(store: Store) -> None:
    for given, kind, words in [
        ("nowhere.pth", DataError, f"'nowhere.pth': there is no such file in {Path.cwd()} or in {store.uri}"),
        ("/nowhere/w.pth", DataError, "'/nowhere/w.pth': there is no such file"),
        ("../w.pth", DataError, "'../w.pth': there is no such file"),
        ("weights.npz", RecipeError, "'weights.npz': give `random`, `timm`, `timm:NAME`, `arm:NAME`, `function`, or a file"),
        ("https://example.org/w.pth", RecipeError, "download the file"),
        ("timm:no_such_net", RecipeError, "'no_such_net' is no timm model"),
    ]:
        with pytest.raises(kind) as refused:
            weights_digests(recipe(given), store)
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_timms_weights_are_known_by_name_without_a_download(store: Store) -> None:
    own, named, tagged = weights_digests(recipe("timm", "timm:test_resnet", "timm:test_resnet.r160_in1k"), store).values()
    assert own == named == tagged


def staged(store: Store, given: str, told: str | None = None) -> Any:
    chosen = recipe(given)
    digests = weights_digests(chosen, store)
    spec = Spec("initialise", {}, {"initial_weights": told or digests["arm0"]}, "initialise arm0 seed 0")
    return spec.name, stage_weights(chosen, store, [(chosen.arms[0], 0, spec)])


def test_staged_weights_are_the_files_in_our_layout(store: Store) -> None:
    encoder = build_encoder(SMALL, 7)
    tensors = {f"module.{name}": value for name, value in encoder.state_dict().items()}
    store.write("w.safetensors", save(tensors | {"module.fc.bias": torch.zeros(10)}))
    name, given = staged(store, "w.safetensors")
    data = folder(store, name).read(STAGED)
    assert data == save_weights(encoder) and given[name].uri == folder(store, name).uri_of(STAGED)
    facts = given[name].facts
    assert facts["source"] == "w.safetensors" and facts["sha256"] == digest(data)
    assert facts["source_digest"] == digest(store.read("w.safetensors"))
    assert facts["summary"].endswith("loaded from 'module.*'; dropped 1 (fc 1); none missing")
    assert facts_of(given[name]) == {"initial_weights": facts} and facts_of(None) == {}
    assert set(load_tensors(data)) == set(encoder.state_dict())


def test_what_does_not_fit_names_arm_encoder_and_file(store: Store) -> None:
    store.write("w.safetensors", save(dict(build_encoder(EncoderParams(image_px=32), 0).state_dict())))
    with pytest.raises(DataError, match=r"^arm 'arm0', encoder test_resnet, initial_weights 'w.safetensors': .* fit"):
        staged(store, "w.safetensors")
    with pytest.raises(DataError, match="changed while the study ran"):
        staged(store, "w.safetensors", told="0" * 64)


@pytest.mark.parametrize("count", [257, 258])
def test_no_batch_norm_is_estimated_on_a_single_image(tmp_path: Path, count: int) -> None:
    """257 images are no batch of 256 and another of one, on whose feature map of 1 x 1 a batch norm has no variance."""
    encoder = {"name": "resnet18", "image_px": 32}
    splits = ["train", "val", "test"]
    changes = {"encoder": encoder, "pretraining_splits": splits, "allow_judged_in_pretraining": True}
    finished_study.write_dataset(tmp_path, open_store(str(tmp_path / "store"), create=True).sub("datasets/squares"), count)
    study = finished_study.make(tmp_path, changes, evaluated=False)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    images = ResidentImages.write(tmp_path / "resident", pixels, [str(n) for n in range(count)])
    opened = Opened(study.store, study.dataset, study.recipe, study.specs, images)
    task = InitialiseTask(Context("", "", "", {}, {}), Spec("initialise", {}, {}, ""), "random", 0)
    seen: list[tuple[int, int]] = []
    files = _initialise(opened, task, torch.device("cpu"), lambda done, total: seen.append((done, total)))
    assert seen == {257: [(257, 257)], 258: [(256, 258), (258, 258)]}[count]
    first = build_encoder(EncoderParams(**encoder), 0)
    with torch.no_grad():
        before = first.get_submodule("conv1")(eval_view(torch.from_numpy(pixels), EncoderParams(**encoder)))
    mean = load_tensors(files["encoder.safetensors"])["bn1.running_mean"]
    if count == 257:  # one batch: its own moments
        torch.testing.assert_close(mean, before.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_tasks_own_error_is_not_said_to_be_a_loss() -> None:
    """Ray does a task again where its process was lost, not where it raised: that is said at once, in one line."""
    raised = ray.exceptions.RayTaskError("_encode", "a traceback\nof lines", ValueError("no such thing\nand more"))
    assert str(_failure("embed", raised.as_instanceof_cause(), 9)) == "embed: ValueError: no such thing"
    ours = ray.exceptions.RayTaskError("_encode", "a traceback", DataError("image 3 is gone"))
    found = _failure("embed", ours.as_instanceof_cause(), 9)
    assert type(found) is DataError and str(found) == "image 3 is gone"
    lost = _failure("embed", ray.exceptions.WorkerCrashedError(), 9)
    assert str(lost).startswith("embed: a task was lost 9 times: ") and "\n" not in str(lost)
