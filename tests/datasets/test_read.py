"""Grey and 16-bit images on their whole way: ingest, shards, decoding, the evaluation view, an encoder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from medssl.datasets.dataset import open_dataset
from medssl.datasets.read import Decoding, decoded_batches
from medssl.images import decode
from medssl.networks import EncoderParams, build_encoder
from medssl.stages.ingest import IngestOptions, ingest
from medssl.views import TwoViews, ViewParams, eval_view

PX = 48
GREY = EncoderParams(name="test_resnet", image_px=32, channels=1, mean=(0.5,), std=(0.25,))
COLOUR = EncoderParams(name="test_resnet", image_px=32)


def picture(seed: int) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((60, PX), Image.Resampling.BICUBIC))


def stored(number: int, kind: str) -> tuple[str, bytes]:
    """One picture, as 8 bits or as the 12-bit radiograph with an offset that it could come from."""
    grey = picture(number)
    image = {
        "8 bits": Image.fromarray(grey),
        "12 bits": Image.fromarray(grey.astype(np.uint16) * 4 + 900),
        "colour": Image.fromarray(np.stack([grey] * 3, axis=2)),
    }[kind]
    suffix, out = {0: "png", 1: "tiff"}[number % 2], io.BytesIO()
    image.save(out, suffix)
    return f"{kind.replace(' ', '')}_{number}.{suffix}", out.getvalue()


@pytest.mark.ray
@pytest.mark.parametrize("encoder", [GREY, COLOUR], ids=["one channel", "three channels"])
def test_grey_and_16_bit_images_from_ingest_to_features(ray_session: Any, tmp_path: Path, encoder: EncoderParams) -> None:
    lines = ["image,label"]
    for number in range(12):
        name, data = stored(number, ("8 bits", "12 bits", "colour")[number % 3])
        (tmp_path / name).write_bytes(data)
        lines.append(f"{name},{'even' if number % 2 == 0 else 'odd'}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    result = ingest(tmp_path / "table.csv", str(tmp_path / "dataset"), IngestOptions(shard_rows=5))
    assert (result.images, len(result.rejected)) == (12, 0)

    dataset = open_dataset(str(tmp_path / "dataset"))
    decoding = Decoding(40, "squash", encoder.channels)
    batches = [batch for shard in dataset.shards for batch in decoded_batches(dataset.uri, shard, decoding)]
    images = np.concatenate([batch["image"] for batch in batches])
    assert images.shape == (12, 40, 40, encoder.channels) and images.dtype == np.uint8
    for row, name in enumerate(dataset.index()["image_id"]):
        (file,) = tmp_path.glob(f"{name}.*")
        assert np.array_equal(images[row], decode(file.read_bytes(), px=40, resize="squash", channels=encoder.channels))
        # Whatever the depth, the picture is the same one: stretched to the whole range where it had 16 bits.
        expected = np.asarray(Image.fromarray(picture(int(str(name).rpartition("_")[2]))).resize((40, 40), 2)).astype(float)
        seen = images[row, :, :, 0].astype(float)
        assert np.corrcoef(seen.ravel(), expected.ravel())[0, 1] > 0.999
        assert len(np.unique(seen)) > 100

    # What is calibrated keeps its scale: a value means the same in every image.
    calibrated = Decoding(40, "squash", encoder.channels, "detector")
    assert calibrated.digest(dataset) != decoding.digest(dataset)
    kept = np.concatenate([b["image"] for shard in dataset.shards for b in decoded_batches(dataset.uri, shard, calibrated)])
    deep = np.array(["12bits" in name for name in dataset.index()["image_id"]])
    assert np.array_equal(kept[~deep], images[~deep])
    for row in np.flatnonzero(deep):
        number = int(str(dataset.index()["image_id"][row]).rpartition("_")[2])
        grey = np.asarray(Image.fromarray(picture(number)).resize((40, 40), 2)).astype(float)
        assert kept[row, :, :, 0].mean() == pytest.approx((grey.mean() * 4 + 900) * 255 / 4095, abs=1)  # 12 bits hold it

    batch = torch.from_numpy(images)
    view = eval_view(batch, encoder)
    assert view.shape == (12, encoder.channels, 32, 32)
    first, second = TwoViews(ViewParams(), encoder)(batch, seed=0, step=0)
    network = build_encoder(encoder, 0).eval()
    with torch.no_grad():
        assert all(torch.isfinite(network(images_BCHW)).all() for images_BCHW in (view, first, second))
