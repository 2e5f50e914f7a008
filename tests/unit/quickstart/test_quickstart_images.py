"""The quickstart's images: who may see which, and what is shipped."""

from __future__ import annotations

import io
import itertools
import zipfile
from importlib import resources
from typing import get_args

import pytest
from PIL import Image

from fedml_plugin_fedmosaic.data.quickstart.images import (
    AUDIENCES,
    PoolName,
    images_of,
    read_png,
)

POOLS = get_args(PoolName)
ASSETS = resources.files("fedml_plugin_fedmosaic") / "assets"


@pytest.mark.parametrize("pool", POOLS)
def test_no_image_has_two_audiences(pool: PoolName) -> None:
    seen = {
        audience: {ref for refs in images_of(pool, audience).values() for ref in refs}
        for audience in AUDIENCES
    }
    assert all(seen.values())
    for first, second in itertools.combinations(AUDIENCES, 2):
        assert not seen[first] & seen[second]


@pytest.mark.parametrize("pool", ["flags", "emoji", "clipart"])
def test_no_picture_is_bundled_twice(pool: PoolName) -> None:
    refs = [r for a in AUDIENCES for group in images_of(pool, a).values() for r in group]
    contents = {read_png(ref) for ref in refs}
    assert len(contents) == len(refs)


@pytest.mark.parametrize("pool", POOLS)
def test_every_label_has_images_for_everyone(pool: PoolName) -> None:
    labels = [set(images_of(pool, audience)) for audience in AUDIENCES]
    assert labels[0] == labels[1] == labels[2]
    assert len(labels[0]) >= 4


@pytest.mark.parametrize("pool", POOLS)
def test_images_decode_and_are_small(pool: PoolName) -> None:
    for refs in images_of(pool, "test").values():
        with Image.open(io.BytesIO(read_png(refs[0]))) as image:
            assert max(image.size) <= 64


def test_file_names_are_unique_over_all_pools() -> None:
    refs = [
        ref
        for pool in POOLS
        for audience in AUDIENCES
        for group in images_of(pool, audience).values()
        for ref in group
    ]
    assert len({ref.filename for ref in refs}) == len(refs)


def test_assets_are_small_and_have_licences() -> None:
    pools = {item.name: len(item.read_bytes()) for item in (ASSETS / "pools").iterdir()}
    archives = [name for name in pools if name.endswith(".zip")]
    assert sum(pools[name] for name in archives) < 5_500_000
    assert "README.md" in pools
    assert "LICENSE-Apache-2.0.txt" in pools
    table = (ASSETS / "pools" / "README.md").read_text(encoding="utf-8")
    for name in archives:
        assert f"`{name}`" in table
        with zipfile.ZipFile(io.BytesIO((ASSETS / "pools" / name).read_bytes())) as archive:
            assert archive.testzip() is None
            # The table's second column is the number of pictures.
            assert f"| `{name}` | {len(archive.namelist()) - 1} |" in table
    models = sum(
        len(file.read_bytes())
        for model in (ASSETS / "models").iterdir()
        if model.is_dir()
        for file in model.iterdir()
    )
    assert models < 8_000_000
