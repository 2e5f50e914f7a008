"""Fetches a source's file, checks it, and takes the pool's images out of it."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote, urlsplit

from PIL import Image, ImageStat, UnidentifiedImageError

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.lite.pools import pool_index

Say = Callable[[str], object]
Index = Mapping[str, Mapping[str, str]]

_CHUNK = 1 << 20
_TIMEOUT_S = 60
_MAX_SIDE = 105
"""Images with a longer side are made smaller: what looks at them takes 64 pixels."""
_SIDE = 64
_SPRITE_SIDE = 28
_SPRITES_PER_ROW = 30
_COLOUR_TOLERANCE = 24
_FAIR_SHARE = 0.02
"""Share of the images whose colour may differ more, for decoders that round otherwise."""
_AR_MAGIC = b"!<arch>\n"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at its home.

    Attributes:
        url: where.
        sha256: its digest; empty where the home makes the file anew for each request.
        size: bytes, for progress.
    """

    url: str
    sha256: str = ""
    size: int = 0

    @property
    def name(self) -> str:
        """The file's name, with an ending that says what it is."""
        parts = urlsplit(self.url).path.split("/")
        if "tar.gz" in parts:
            return f"{parts[2]}-{parts[-1]}.tar.gz"
        return unquote(parts[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which other clients store it: apt writes a package's epoch into it."""
        quoted = quote(self.name)
        stem, _, rest = self.name.partition("_")
        return (self.name, quoted, f"{stem}_*{rest}") if rest else (self.name, quoted)


def fetch_file(file: RemoteFile, folder: Path, say: Say) -> Path:
    """Downloads a file unless it is there; proxies are taken from the environment.

    Args:
        file: what.
        folder: where to.
        say: told at the start and at every tenth of a file of known size.

    Raises:
        DataError: it cannot be fetched, or its digest is wrong.
    """
    target = folder / file.name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{file.name}.{os.getpid()}.part"
    say(f"fetching {file.url}" + (f" ({file.size / 1e6:.0f} MB)" if file.size else ""))
    try:
        request = urllib.request.Request(file.url, headers={"User-Agent": "fedmosaic"})  # noqa: S310
        with (
            urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response,  # noqa: S310
            part.open("wb") as stream,
        ):
            _copy(response, stream, file, say)
        _check_digest(part, file.sha256, file.url)
        part.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{file.url} cannot be fetched: {getattr(error, 'reason', error)}",
            hint="run this where there is internet, or put the file into the folder that "
            "FEDMOSAIC_DATA_SOURCES names; '--packages-only' needs only package registries",
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _copy(source: IO[bytes], target: IO[bytes], file: RemoteFile, say: Say) -> None:
    done, told = 0, 0
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        done += len(chunk)
        tenth = 10 * done // file.size if file.size else 0
        if told < tenth < 10:
            told = tenth
            say(f"  {10 * tenth} %")


def _check_digest(path: Path, expected: str, name: str) -> None:
    if not expected:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DataError(
            f"{name}: expected sha256 {expected}, got {found}",
            hint="the file is damaged or another version; remove it and run the command again",
        )


def convert(pool: str, files: Sequence[Path], target: Path, *, digests: Sequence[str]) -> None:
    """Writes a zip with the images of a pool, as ``target``.

    Args:
        pool: name.
        files: of the source, in its order.
        target: zip to write; in one step.
        digests: expected sha256 of every file, empty where unknown.

    Raises:
        DataError: a file is not what it should be, or images are missing or different.
    """
    for path, digest in zip(files, digests, strict=True):
        _check_digest(path, digest, str(path))
    index = pool_index(pool)
    images: dict[str, bytes] = {}
    for path in files:
        if path.suffix == ".png":
            images.update(_sprites(path, index))
            continue
        wanted: dict[str, list[str]] = {}
        for key, facts in index.items():
            wanted.setdefault(facts["member"], []).append(key)
        for member, content in _members(path, wanted.keys()):
            for key in wanted.get(member, ()):
                images[key] = _small(content)
    _check_images(pool, index, images, colours=not all(digests))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pool-") as scratch:
        part = Path(scratch, target.name)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for key in sorted(images):
                # A fixed date: the same images make the same file.
                archive.writestr(zipfile.ZipInfo(key, (1980, 1, 1, 0, 0, 0)), images[key])
        part.replace(target)


def _members(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive's files, without the folder that GitHub puts around.

    One pass, because going back in a compressed archive means to start again.
    """
    try:
        with _tar(path) as archive:
            for member in archive:
                name = member.name
                if path.name.endswith(".tar.gz"):
                    name = name.partition("/")[2]
                stream = archive.extractfile(member) if name in wanted else None
                if stream is not None:
                    yield name, stream.read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", hint="remove it and run the command again"
        ) from error


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    """The tar archive that a file is or, for a Debian package, holds."""
    with path.open("rb") as stream:
        if stream.read(len(_AR_MAGIC)) == _AR_MAGIC:
            _seek_data(stream, path)
        else:
            stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            yield archive


def _seek_data(stream: IO[bytes], path: Path) -> None:
    """Replaces the stream's content by the payload of a Debian package.

    An ``ar`` archive is a list of members: a header of 60 bytes (name 16, .., size 10 at 48), then
    the content, padded to an even length.
    """
    while header := stream.read(60):
        size = int(header[48:58])
        if header[:16].strip().startswith(b"data.tar"):
            return
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{path}: expected a Debian package with data.tar, got none")


def _sprites(path: Path, index: Index) -> dict[str, bytes]:
    """The images of an overview picture: three rows per label, labels from the top."""
    with Image.open(path) as source:
        sheet = source.convert("L")
    result = {}
    for key in index:
        label, _, number = key.removesuffix(".png").partition("_")
        row, column = divmod(int(number), _SPRITES_PER_ROW)
        top, left = (3 * int(label) + row) * _SPRITE_SIDE, column * _SPRITE_SIDE
        cut = sheet.crop((left, top, left + _SPRITE_SIDE, top + _SPRITE_SIDE))
        stream = io.BytesIO()
        cut.save(stream, "PNG")
        result[key] = stream.getvalue()
    return result


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _small(content: bytes) -> bytes:
    """The file as it is, or as a PNG of 64 pixels if it is larger than needed."""
    try:
        # Some clip art has a hundred megapixels; the archive's digest says that it is genuine.
        with _large_images_allowed(), Image.open(io.BytesIO(content)) as image:
            if max(image.size) <= _MAX_SIDE:
                return content
            small = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P") else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"an image of a source does not decode: {error}") from error
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return stream.getvalue()


def mean_colour(content: bytes) -> tuple[int, int, int]:
    """Mean red, green and blue of an image file, on white where transparent."""
    with Image.open(io.BytesIO(content)) as source:
        image = source.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    red, green, blue = (round(mean) for mean in ImageStat.Stat(flat).mean)
    return red, green, blue


def _check_images(pool: str, index: Index, images: Mapping[str, bytes], *, colours: bool) -> None:
    """Whether all images are there and, unless a digest has said so, are the right ones."""
    missing = [key for key in index if key not in images]
    if missing:
        raise DataError(
            f"pool {pool}: expected {len(index)} images in its source, {len(missing)} are missing: "
            f"{', '.join(missing[:3])}",
            hint="the source is another version than the one named",
        )
    wrong = []
    if not colours:
        return
    for key, facts in index.items():
        expected = bytes.fromhex(facts["colour"])
        found = mean_colour(images[key])
        if max(abs(a - b) for a, b in zip(expected, found, strict=True)) > _COLOUR_TOLERANCE:
            wrong.append(key)
    if len(wrong) > _FAIR_SHARE * len(index):
        raise DataError(
            f"pool {pool}: {len(wrong)} of {len(index)} images are not those that are expected: "
            f"{', '.join(wrong[:3])}",
            hint="the source is another version than the one named",
        )
