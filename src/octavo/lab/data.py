"""The lab's data set, MNIST or where it cannot be had scikit-learn's digits, and the order of its batches."""

import enum
import gzip
import logging
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MIRRORS: Final[Sequence[str]] = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Smallest first: a mirror that turns out to be bad has then cost little.
CHECKSUMS: Final[Mapping[str, str]] = {
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
}

_MAGIC: Final = {1: 0x00000801, 3: 0x00000803}
_KIND: Final = {0x00000801: "labels", 0x00000803: "images"}
_MAX_IDX, _MAX_DOWNLOAD, _CHUNK = 1 << 30, 1 << 24, 1 << 16
_CONNECT_S, _READ_S, _ANSWER_S, _FILE_S = 3.0, 3.0, 3.5, 300.0
_REPLACE: Final = "replace it by a complete copy, or unset OCTAVO_DATA"


class DataError(ValueError):
    """A data set that cannot be had as asked: the message says what was found, in which file, and what to do."""


class _Unavailable(DataError):
    """MNIST cannot be had here; `Source.AUTO` goes on with the digits."""


class Source(enum.Enum):
    """Which data set `load` returns."""

    AUTO = "auto"
    """MNIST where it can be had, otherwise the digits; `Dataset.source` says which and why."""
    MNIST = "mnist"
    """MNIST or an error."""
    DIGITS = "digits"
    """scikit-learn's bundled handwritten digits; needs no file and no network."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """Images and labels for training and for testing.

    name: "mnist", "digits" or "fake"; source: a sentence saying where the data came from.
    train_images, test_images: uint8 [N, 28, 28], 0 is background; train_labels, test_labels: uint8 [N], 0 to 9.

    Raises `DataError` for any other shape, dtype or label, for unequal counts, and for no data.
    """

    name: Literal["mnist", "digits", "fake"]
    source: str
    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes

    def __post_init__(self) -> None:
        _check_pair(self.train_images, self.train_labels, "training data", "correct the arrays")
        _check_pair(self.test_images, self.test_labels, "test data", "correct the arrays")


def _check_pair(images: Bytes, labels: Bytes, what: str, remedy: str) -> None:
    got = f"got images {images.dtype}{list(images.shape)} and labels {labels.dtype}{list(labels.shape)}; {remedy}"
    if images.dtype != np.uint8 or labels.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.ndim != 1:
        raise DataError(f"{what}: must be uint8 images [N, 28, 28] and uint8 labels [N], {got}")
    if not 0 < len(images) == len(labels):
        raise DataError(f"{what}: must be as many images as labels and at least one, {got}")
    if labels.max() > 9:
        raise DataError(f"{what}: labels must be 0 to 9, got {labels.max()}; {remedy}")


def load(source: Source = Source.AUTO, *, cache: Path | None = None, mirrors: Sequence[str] = MIRRORS) -> Dataset:
    """The data set, from the first place that has it.

    MNIST is looked for in `$OCTAVO_DATA` (the four IDX files, plain or .gz, there or in `MNIST/raw` below it; any
    number of images), then in the folder `mnist` of `cache` (by default `$OCTAVO_CACHE`, else the user's cache
    directory), and is otherwise downloaded there from `mirrors` (base URLs, in turn). Files in the cache are the
    standard ones, held to their SHA-256. Where nothing can be reached the answer comes within seconds.

    Raises `DataError` when files in `$OCTAVO_DATA` are broken, under AUTO too, or when MNIST alone will do and fails.
    """
    if source is Source.DIGITS:
        return _digits("as asked")
    aside = ""
    if root := os.environ.get("OCTAVO_DATA"):
        files = _find(Path(os.path.expanduser(root)))
        missing = [name.removesuffix(".gz") for name in CHECKSUMS if name not in files]
        if not missing:
            return _read(files, f"MNIST from OCTAVO_DATA={root}")
        aside = f"; OCTAVO_DATA={root} was passed over, it lacks {', '.join(missing)}"
    try:
        import pooch

        base = cache or Path(os.path.expanduser(os.environ.get("OCTAVO_CACHE") or pooch.os_cache("octavo")))
        folder = base / "mnist"
        download(folder, mirrors=mirrors)
    except (_Unavailable, ImportError) as error:
        if source is Source.AUTO:
            return _digits(f"because MNIST is not available: {error}{aside}")
        remedy = "set OCTAVO_DATA to a folder with its four IDX files, or use --data digits"
        raise DataError(f"MNIST is not available: {error}{aside}; {remedy}") from None
    return _read({name: folder / name for name in CHECKSUMS}, f"MNIST from the cache, {folder}{aside}")


def load_folder(folder: Path, *, mirrors: Sequence[str] = MIRRORS) -> Dataset:
    """MNIST from `folder`, or from `MNIST/raw` below it, which is filled from `mirrors` where it holds none of the files.

    Raises `DataError` where some of the files are missing or broken, or the download fails.
    """
    files = _find(folder)
    missing = [name.removesuffix(".gz") for name in CHECKSUMS if name not in files]
    if files and missing:
        raise DataError(f"data_dir {folder} lacks {', '.join(missing)}; add them, or name another folder")
    if not files:
        try:
            download(folder, mirrors=mirrors)
        except (_Unavailable, ImportError) as error:
            remedy = "name a folder with MNIST's four IDX files, or remove data_dir"
            raise DataError(f"data_dir {folder} has no MNIST, and it cannot be had: {error}; {remedy}") from None
    return _read(files or {name: folder / name for name in CHECKSUMS}, f"MNIST from {folder}")


def fake(samples: int, *, seed: int) -> Dataset:
    """Random images of random classes, for trying a set-up out: as many for testing as for training."""
    draws = np.random.Generator(np.random.Philox(key=np.array([seed, 1 << 32], dtype=np.uint64)))
    parts = [draws.integers(0, high, shape, np.uint8) for high, shape in ((256, (samples, 28, 28)), (10, samples)) * 2]
    return Dataset(
        name="fake",
        source="random images",
        train_images=parts[0],
        train_labels=parts[1],
        test_images=parts[2],
        test_labels=parts[3],
    )


def _find(root: Path) -> dict[str, Path]:
    """The files in `root` or in `MNIST/raw` below it, whichever has more, by the name of their .gz form."""
    found = []
    for folder in (root, root / "MNIST" / "raw"):
        candidates = [(name, folder / form) for name in CHECKSUMS for form in (name.removesuffix(".gz"), name)]
        # os.path rather than Path: an unreadable folder counts as one without the files.
        found.append({name: path for name, path in candidates if os.path.isfile(path)})
    return max(found, key=len)


def _read(files: Mapping[str, Path], source: str) -> Dataset:
    arrays = {}
    for part, key in (("train", "train"), ("t10k", "test")):
        images, labels = files[f"{part}-images-idx3-ubyte.gz"], files[f"{part}-labels-idx1-ubyte.gz"]
        pair = read_idx(images, ndim=3), read_idx(labels, ndim=1)
        _check_pair(*pair, f"{images} with {labels.name}", "replace both by MNIST's, or unset OCTAVO_DATA")
        arrays[f"{key}_images"], arrays[f"{key}_labels"] = pair
    return Dataset(name="mnist", source=source, **arrays)


def read_idx(path: Path, *, ndim: int) -> Bytes:
    """One IDX file, gzipped if its name ends in .gz: uint8 [N] for `ndim` 1 (labels), [N, H, W] for 3 (images).

    The header must match the contents to the byte, and no more is read than the header promises, at most 1 GiB.

    Raises `DataError` naming the file when it cannot be read, is not IDX, holds labels where images belong or the
    reverse, or is truncated, oversized, empty or corrupt. The layout is the one on the MNIST database's page.
    """
    if ndim not in _MAGIC:
        raise ValueError(f"ndim must be 1 (labels) or 3 (images), got {ndim}; pass one of the two")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * ndim)
            shape = _shape(header, path, ndim)
            size, content = math.prod(shape), bytearray()
            # In chunks, so that memory follows what is there and not what the header claims.
            while chunk := file.read(min(_CHUNK, size + 1 - len(content))):
                content += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; {_REPLACE}") from None
    if len(content) != size:
        got = f"truncated: {len(content)}" if len(content) < size else f"oversized: more than {size}"
        raise DataError(f"{path} is {got} bytes follow its header, which says {shape}; {_REPLACE}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _shape(header: bytes, path: Path, ndim: int) -> list[int]:
    magic, wanted = int.from_bytes(header[:4], "big"), _MAGIC[ndim]
    if len(header) >= 4 and magic != wanted:
        if magic in _KIND:
            raise DataError(f"{path} holds {_KIND[magic]}, must hold {_KIND[wanted]}; swap the files back")
        raise DataError(f"{path} must begin with 0x{wanted:08x} (IDX {_KIND[wanted]}), got 0x{magic:08x}; {_REPLACE}")
    if len(header) < 4 + 4 * ndim:
        raise DataError(f"{path} is truncated: its header is {4 + 4 * ndim} bytes, got {len(header)}; {_REPLACE}")
    shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
    if not 0 < math.prod(shape) <= _MAX_IDX:
        raise DataError(f"{path} must hold 1 to {_MAX_IDX} bytes, its header says {shape}; {_REPLACE}")
    return shape


def download(folder: Path, *, mirrors: Sequence[str] = MIRRORS, checksums: Mapping[str, str] = CHECKSUMS) -> None:
    """Make `folder` hold every file of `checksums` (name to SHA-256); those that it holds already are left alone.

    Each of `mirrors` (base URLs) is tried once, in turn. A file takes its name only when its checksum holds, so an
    interrupted or corrupt download leaves none. Safe for several processes at once.

    Raises `DataError` when the folder cannot be written to or no mirror has a good copy; ImportError without pooch.
    """
    import pooch

    logger, failures = pooch.get_logger(), []
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        held = {name: pooch.file_hash(folder / name) for name in checksums if (folder / name).is_file()}
        missing = [name for name, checksum in checksums.items() if held.get(name) != checksum]
        for mirror in mirrors:
            failures += _fetch_all(mirror, folder, checksums, missing)
        if not missing:
            return
    except OSError as error:
        raise _Unavailable(f"cannot download to {folder}: {error} (OCTAVO_CACHE names another folder)") from None
    finally:
        logger.setLevel(level)
    raise _Unavailable("; ".join(failures) or "no mirror was named")


def _fetch_all(mirror: str, folder: Path, checksums: Mapping[str, str], missing: list[str]) -> list[str]:
    """Take from `missing` the files that this mirror gives; returns why it did not give the first of the others."""
    import requests
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    failures = []
    for name in tuple(missing):
        url = f"{mirror.rstrip('/')}/{name}"
        try:
            _fetch(url, folder / name, f"sha256:{checksums[name]}")
            missing.remove(name)
        except requests.HTTPError as error:
            failures.append(f"{url} cannot be had ({str(error).partition(' for url')[0]})")
        except (TimeoutError, requests.Timeout, ReadTimeoutError):
            return failures[:1] or [f"{url} does not answer in time"]
        except (requests.RequestException, HTTPError) as error:
            return failures[:1] or [f"{url} cannot be had ({type(error).__name__})"]
        except ValueError:
            failures.append(f"{url} has a wrong checksum")
    return failures[:1]


def _fetch(url: str, path: Path, checksum: str) -> None:
    import pooch
    import requests

    answered, outcome = threading.Event(), Future[str]()

    def stream(url: str, output_file: str, _pooch: Any) -> None:
        with requests.get(url, stream=True, timeout=(_CONNECT_S, _READ_S)) as response, open(output_file, "wb") as file:
            answered.set()
            response.raise_for_status()
            # Raw: requests would unpack the .gz where a server declares it as a content encoding.
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                if file.tell() + file.write(chunk) > _MAX_DOWNLOAD:
                    raise ValueError(f"{url} exceeds {_MAX_DOWNLOAD} bytes")

    def work() -> None:
        try:
            outcome.set_result(pooch.retrieve(url, checksum, path.name, path.parent, downloader=stream))
        except Exception as error:
            outcome.set_exception(error)
        answered.set()

    # In a thread that can be left behind: name resolution heeds no time-out.
    threading.Thread(target=work, daemon=True).start()
    if not answered.wait(_ANSWER_S):
        raise TimeoutError(url)
    outcome.result(_FILE_S)


def _digits(why: str) -> Dataset:
    """The 1,797 digits of scikit-learn (8x8, 0 to 16), split 1,437 to 360 by a fixed permutation.

    A value becomes value * 255 / 16, rounded to nearest-even; each pixel becomes 3x3; a border of 2 makes 24 into 28.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"the digits need scikit-learn, got none ({why}); pip install 'octavo[lab]'") from None
    bunch = load_digits()
    pixels = np.kron(np.rint(bunch.images * 255 / 16), np.ones((1, 3, 3)))
    images = np.pad(pixels, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = bunch.target.astype(np.uint8)
    train, test = np.split(np.random.Generator(np.random.Philox(key=0)).permutation(len(images)), [1437])
    return Dataset(
        name="digits",
        source=f"scikit-learn's bundled handwritten digits scaled to 28x28, {why}",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )


def batches(n: int, batch_size: int, *, epoch: int, seed: int, drop_last: bool = True) -> Iterator[NDArray[np.int64]]:
    """The batches of one epoch over `n` samples: int64 [batch_size] indices, each sample at most once.

    The order is NumPy's permutation under Philox keyed by (seed, epoch) and depends on nothing else, so that every
    framework trains on the same batches. With `drop_last` a last, smaller batch is left out, unless it is the only one.

    Raises `ValueError` when `n` or `batch_size` is below 1, or `epoch` or `seed` is not in [0, 2**64).
    """
    for name, value, low in (("n", n, 1), ("batch_size", batch_size, 1), ("epoch", epoch, 0), ("seed", seed, 0)):
        if not low <= value < 1 << 64:
            raise ValueError(f"{name} must be at least {low} and below 2**64, got {value}; pass such a number")
    order = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))).permutation(n)
    stop = n - n % batch_size if drop_last and n >= batch_size else n
    return (order[i : min(i + batch_size, stop)] for i in range(0, stop, batch_size))
