from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest
from lite_pools import png
from PIL import Image

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.lite import fetch, pools, sources
from fedml_plugin_fedmosaic.data.lite.fetch import RemoteFile, convert, fetch_file, mean_colour
from fedml_plugin_fedmosaic.data.lite.pools import open_archives, pool_index

NAMES = ("cat/1.png", "dog/2.png")


def index(prefix: str) -> dict[str, dict[str, str]]:
    return {
        name: {
            "label": name[:3],
            "member": f"{prefix}{name}",
            "colour": "".join(f"{value:02x}" for value in mean_colour(png(name))),
        }
        for name in NAMES
    }


@pytest.fixture
def known(monkeypatch):
    """Two images are the pool; returns a function that sets where they are in a source."""

    def use(prefix: str) -> None:
        for module in (fetch, pools):
            monkeypatch.setattr(module, "pool_index", lambda name: index(prefix))

    return use


def tar(path: Path, members: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def deb(path: Path, members: dict[str, bytes]) -> Path:
    inner = tar(path.with_suffix(".tar"), members, "w").read_bytes()
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": lzma.compress(inner),
    }
    content = b"!<arch>\n"
    for name, data in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        content += header.encode() + data + (b"\n" if len(data) % 2 else b"")
    path.write_bytes(content)
    return path


def members(prefix: str) -> dict[str, bytes]:
    return {f"{prefix}{name}": png(name) for name in NAMES} | {f"{prefix}other.png": b"x"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("write", "inside", "prefix"),
    [
        (lambda p, m: tar(p / "a.tgz", m, "w:gz"), "package/", "package/"),
        # GitHub puts a folder around that the index does not name.
        (lambda p, m: tar(p / "a.tar.gz", m, "w:gz"), "repo-d7d0/", ""),
        (lambda p, m: deb(p / "a.deb", m), "./usr/share/", "./usr/share/"),
    ],
    ids=["npm", "github", "debian"],
)
def test_images_are_taken_out_of_any_archive(known, tmp_path, write, inside, prefix):
    known(prefix)
    path = write(tmp_path, members(inside))
    target = tmp_path / "out/pool.zip"
    convert("pool", [path], target, digests=[""])
    pool = open_archives("pool", [target])
    assert {name: pool.read(name) for name in pool.facts} == {name: png(name) for name in NAMES}
    first = target.read_bytes()
    convert("pool", [path], target, digests=[sha256(path)])
    assert target.read_bytes() == first


def test_another_version_of_a_source_is_refused(known, tmp_path):
    known("")
    complete = {f"r/{name}": png(name) for name in NAMES}
    path = tar(tmp_path / "a.tar.gz", complete, "w:gz")
    with pytest.raises(DataError, match="expected sha256 00, got"):
        convert("pool", [path], tmp_path / "pool.zip", digests=["00"])
    tar(path, {"r/cat/1.png": png("cat/1.png")}, "w:gz")
    with pytest.raises(DataError, match="expected 2 images in its source, 1 are missing: dog/2"):
        convert("pool", [path], tmp_path / "pool.zip", digests=[""])
    stream = io.BytesIO()
    Image.new("RGB", (6, 6), "black").save(stream, "PNG")
    tar(path, {**complete, "r/cat/1.png": stream.getvalue()}, "w:gz")
    with pytest.raises(DataError, match="1 of 2 images are not those that are expected: cat/1"):
        convert("pool", [path], tmp_path / "pool.zip", digests=[""])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be read"):
        convert("pool", [path], tmp_path / "pool.zip", digests=[""])
    assert not (tmp_path / "pool.zip").exists()


def test_large_images_are_made_smaller(known, tmp_path):
    known("")
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png("cat/1.png"))) as image:
        image.resize((320, 240), Image.Resampling.NEAREST).save(stream, "PNG")
    content = {"r/cat/1.png": stream.getvalue(), "r/dog/2.png": png("dog/2.png")}
    convert("pool", [tar(tmp_path / "a.tar.gz", content, "w:gz")], tmp_path / "p.zip", digests=[""])
    with Image.open(
        io.BytesIO(open_archives("pool", [tmp_path / "p.zip"]).read("cat/1.png"))
    ) as im:
        assert im.size == (64, 48)


def test_a_file_is_fetched_once_and_checked(tmp_path):
    home = tmp_path / "home.bin"
    home.write_bytes(b"content")
    good = RemoteFile(home.as_uri(), sha256=sha256(home), size=7)
    said: list[str] = []
    path = fetch_file(good, tmp_path / "cache", said.append)
    assert path.read_bytes() == b"content"
    assert said[0].startswith(f"fetching {home.as_uri()}")
    home.unlink()
    assert fetch_file(good, tmp_path / "cache", said.append) == path
    path.unlink()
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        fetch_file(good, tmp_path / "cache", said.append)
    assert "FEDMOSAIC_DATA_SOURCES" in str(caught.value.hint)
    home.write_bytes(b"else")
    with pytest.raises(DataError, match="expected sha256"):
        fetch_file(good, tmp_path / "cache", said.append)
    assert list((tmp_path / "cache").iterdir()) == []


def test_names_of_files():
    assert RemoteFile("https://a/b/c/tar.gz/123").name == "c-123.tar.gz"
    names = RemoteFile("https://a/openclipart-png_0.18+dfsg-19_all.deb").names
    assert "openclipart-png_*0.18+dfsg-19_all.deb" in names


def test_local_copies_come_first(known, tmp_path, monkeypatch):
    known("")
    local = tmp_path / "sources"
    local.mkdir()
    monkeypatch.setenv("FEDMOSAIC_DATA_SOURCES", str(local))
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    source = sources.Source(
        pool="flags", tier="registry", title="two images", licence="none", home="https://home",
        files=(RemoteFile("https://nowhere.invalid/flags-1_all.deb"),), local=("colours.zip",),
    )  # fmt: skip
    with pytest.raises(DataError, match="two images is not here"):
        sources._open(source, print, fetch=False)
    with zipfile.ZipFile(local / "colours.zip", "w") as archive:
        for name in NAMES:
            archive.writestr(name, png(name))
    pool, origin = sources._open(source, print, fetch=False)
    assert origin == "local copy"
    assert pool.read("dog/2.png") == png("dog/2.png")
    digest = pool.digest()
    (local / "colours.zip").unlink()
    deb(local / "flags-1_all.deb", {name: png(name) for name in NAMES})
    pool, origin = sources._open(source, print, fetch=False)
    assert (origin, sorted(pool.facts)) == ("local copy", sorted(NAMES))
    assert pool.digest() == digest
    changed = pools.Pool(name="flags", facts=pool.facts, read=lambda name: png(f"another {name}"))
    assert changed.digest() != digest
    (local / "flags-1_all.deb").unlink()
    assert sources._open(source, print, fetch=False)[1] == "cache"
    monkeypatch.setenv("FEDMOSAIC_DATA_SOURCES", str(tmp_path / "none"))
    with pytest.raises(DataError, match="expected a folder, got none"):
        sources._open(source, print, fetch=False)


def test_every_pool_of_a_variant_has_a_source_with_a_licence():
    for variant in ("full", "packages"):
        for name in sources.pools_of(variant):
            source = sources.BY_POOL[name]
            assert source.licence
            assert source.home.startswith("https://")
            assert source.tier == "installed" or (source.files and pool_index(name))
            assert variant == "full" or source.tier != "download"
    assert set(sources.pools_of("full")) == {source.pool for source in sources.SOURCES} - {"scans"}
