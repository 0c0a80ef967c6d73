"""The lab's data: strict IDX files, downloads from a real local server, and the fall to the digits."""

import contextlib
import gzip
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from octavo.lab.data import CHECKSUMS, DataError, Dataset, Source, batches, download, load, read_idx

REAL_MNIST = os.environ.get("OCTAVO_DATA")
needs_mnist = pytest.mark.skipif(not REAL_MNIST, reason="OCTAVO_DATA is not set to a folder with MNIST's four files")
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
NAMES = (TRAIN_IMAGES, TRAIN_LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IMAGES, LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_DATA", "OCTAVO_CACHE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def idx(magic: bytes, shape: tuple[int, ...], content: bytes | None = None) -> bytes:
    body = bytes(i % 10 for i in range(int(np.prod(shape)))) if content is None else content
    return magic + b"".join(size.to_bytes(4, "big") for size in shape) + body


def tiny() -> dict[str, bytes]:
    return {
        TRAIN_IMAGES: idx(IMAGES, (5, 28, 28)),
        TRAIN_LABELS: idx(LABELS, (5,)),
        "t10k-images-idx3-ubyte": idx(IMAGES, (3, 28, 28)),
        "t10k-labels-idx1-ubyte": idx(LABELS, (3,)),
    }


def write(folder: Path, files: dict[str, bytes], *, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


@contextlib.contextmanager
def serve(answer: Answer, files: dict[str, bytes]) -> Iterator[str]:
    """A mirror on 127.0.0.1 that gives `files`, each through `answer`, and 404 for any other."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.rpartition("/")[2])
            if content is None:
                self.send_error(404)
            else:
                with contextlib.suppress(ConnectionError):
                    answer(self, content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/mnist"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(request: BaseHTTPRequestHandler, content: bytes, *, length: int | None = None, encoding: str = "") -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    if encoding:
        request.send_header("Content-Encoding", encoding)
    request.end_headers()
    request.wfile.write(content)


def corrupt(request: BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, content[:-1] + bytes([content[-1] ^ 1]))


def cut_short(request: BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, content[:-9], length=len(content))


def endless(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(1 << 12):
        request.wfile.write(bytes(1 << 16))


def dead_mirror() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


FILES = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in tiny().items()}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


# IDX files


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_read_idx_gives_the_bytes(tmp_path: Path, zipped: bool) -> None:
    write(tmp_path, tiny(), zipped=zipped)
    suffix = ".gz" if zipped else ""
    images = read_idx(tmp_path / f"{TRAIN_IMAGES}{suffix}", ndim=3)
    assert images.shape == (5, 28, 28)
    assert images.dtype == np.uint8
    assert images.flags.writeable
    assert images.tobytes() == tiny()[TRAIN_IMAGES][16:]
    assert read_idx(tmp_path / f"{TRAIN_LABELS}{suffix}", ndim=1).tolist() == [0, 1, 2, 3, 4]


BROKEN = {
    "nothing": (b"", "is truncated: its header is 16 bytes, got 0"),
    "half a magic": (b"\0\0", "is truncated: its header is 16 bytes, got 2"),
    "half a header": (IMAGES + bytes(5), "is truncated: its header is 16 bytes, got 9"),
    "one byte short": (idx(IMAGES, (5, 28, 28))[:-1], "is truncated: 3919 bytes"),
    "one byte over": (idx(IMAGES, (5, 28, 28)) + b"\0", "is oversized: more than 3920 bytes"),
    "wrong magic": (idx(b"\0\0\x0d\x03", (5, 28, 28)), r"must begin with 0x00000803 \(IDX images\), got 0x00000d03"),
    "swapped": (idx(LABELS, (5,)), "holds labels, must hold images; swap"),
    "no image": (idx(IMAGES, (0, 28, 28)), r"its header says \[0, 28, 28\]"),
    "huge header": (idx(IMAGES, (2**32 - 1, 2**32 - 1, 2**32 - 1), b""), r"must hold 1 to 1073741824 bytes"),
    "large header": (idx(IMAGES, (10**6, 28, 28), bytes(100)), "is truncated: 100 bytes"),
    "other size": (idx(IMAGES, (5, 32, 32)), r"must be uint8 images \[N, 28, 28\].*\[5, 32, 32\]"),
    "other count": (idx(IMAGES, (4, 28, 28)), r"as many images as labels.*\[4, 28, 28\] and labels uint8\[5\]"),
}


@pytest.mark.parametrize("source", [Source.AUTO, Source.MNIST])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_in_octavo_data_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, zipped: bool, source: Source
) -> None:
    content, message = BROKEN[case]
    write(tmp_path, tiny() | {TRAIN_IMAGES: content}, zipped=zipped)
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        load(source, cache=tmp_path / "cache", mirrors=())
    assert TRAIN_IMAGES in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_given_as_labels_are_named_as_such(tmp_path: Path) -> None:
    write(tmp_path, {TRAIN_LABELS: idx(IMAGES, (5, 28, 28))}, zipped=False)
    with pytest.raises(DataError, match=f"{TRAIN_LABELS} holds images, must hold labels; swap"):
        read_idx(tmp_path / TRAIN_LABELS, ndim=1)


def test_a_label_above_nine_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tiny() | {TRAIN_LABELS: idx(LABELS, (5,), bytes([0, 1, 10, 3, 4]))}, zipped=False)
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"{TRAIN_LABELS}: labels must be 0 to 9, got 10"):
        load()


ZIPPED = gzip.compress(idx(IMAGES, (5, 28, 28)))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(idx(IMAGES, (5, 28, 28)), id="not gzip"),
        pytest.param(ZIPPED[:-20], id="cut"),
        pytest.param(ZIPPED[:-8] + bytes(4) + ZIPPED[-4:], id="wrong CRC"),
        pytest.param(ZIPPED[:12] + b"\xff\xff" + ZIPPED[14:], id="bad deflate"),
        pytest.param(ZIPPED + b"more", id="trailing"),
    ],
)
def test_corrupt_gzip_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    write(tmp_path, tiny(), zipped=True)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(content)
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"{TRAIN_IMAGES}.gz (cannot be read|is truncated).*unset OCTAVO_DATA"):
        load(Source.AUTO, cache=tmp_path / "cache", mirrors=())


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    bomb = gzip.compress(bytes(1 << 26), 1)
    path.write_bytes(gzip.compress(idx(IMAGES, (5, 28, 28)), 1) + bomb * 64)
    # 4 GiB behind 3,920 promised bytes, with 1 GiB of address space to read it in.
    script = (
        "import resource, sys; from pathlib import Path; from octavo.lab.data import read_idx\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "read_idx(Path(sys.argv[1]), ndim=3)"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, env=environment)
    assert "is oversized: more than 3920 bytes" in result.stderr


@pytest.mark.parametrize("ndim", [0, 2, 4])
def test_read_idx_knows_labels_and_images_alone(tmp_path: Path, ndim: int) -> None:
    with pytest.raises(ValueError, match=f"ndim must be 1 .* or 3 .*, got {ndim}"):
        read_idx(tmp_path / "any", ndim=ndim)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere cannot be read.*No such file"):
        read_idx(tmp_path / "nowhere", ndim=1)


# OCTAVO_DATA


@pytest.mark.parametrize("source", [Source.AUTO, Source.MNIST])
@pytest.mark.parametrize("below", [".", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_octavo_data_is_used_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, below: str, source: Source
) -> None:
    write(tmp_path / below, tiny(), zipped=zipped)
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    data = load(source, cache=tmp_path / "cache", mirrors=())
    assert data.name == "mnist"
    assert data.source == f"MNIST from OCTAVO_DATA={tmp_path}"
    assert data.train_images.tobytes() == tiny()[TRAIN_IMAGES][16:]
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert data.test_images.shape == (3, 28, 28)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert not (tmp_path / "cache").exists()


def test_digits_do_not_look_at_octavo_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tiny() | {TRAIN_IMAGES: b""}, zipped=False)
    monkeypatch.setenv("OCTAVO_DATA", str(tmp_path))
    assert load(Source.DIGITS).name == "digits"


@pytest.mark.parametrize("present", [(), (TRAIN_IMAGES,), None], ids=["empty", "one of four", "no folder"])
def test_octavo_data_without_the_files_is_passed_over_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...] | None
) -> None:
    folder = tmp_path / "data"
    if present is not None:
        write(folder, {name: tiny()[name] for name in present}, zipped=False)
    monkeypatch.setenv("OCTAVO_DATA", str(folder))
    data = load(Source.AUTO, cache=tmp_path, mirrors=())
    assert data.name == "digits"
    said = data.source.partition(f"OCTAVO_DATA={folder} was passed over, it lacks ")[2]
    assert sorted(said.split(", ")) == sorted(set(NAMES) - set(present or ()))
    with pytest.raises(DataError, match=f"OCTAVO_DATA={folder} was passed over.*use --data digits"):
        load(Source.MNIST, cache=tmp_path, mirrors=())


# Downloads


@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_download_writes_the_files_as_sent_and_asks_once(tmp_path: Path, encoding: str) -> None:
    asked = []

    def answer(request: BaseHTTPRequestHandler, content: bytes) -> None:
        asked.append(request.path)
        send(request, content, encoding=encoding)

    with serve(answer, FILES) as mirror:
        download(tmp_path / "new" / "folder", mirrors=(mirror,), checksums=SUMS)
        download(tmp_path / "new" / "folder", mirrors=(mirror,), checksums=SUMS)
    assert contents(tmp_path / "new" / "folder") == FILES
    assert asked == [f"/mnist/{name}" for name in FILES]


def test_a_full_folder_needs_no_mirror_that_works(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    download(tmp_path, mirrors=(dead_mirror(),), checksums=SUMS)
    download(tmp_path, mirrors=(), checksums=SUMS)


def test_a_wrong_file_in_the_folder_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(b"wrong")
    with serve(send, FILES) as mirror:
        download(tmp_path, mirrors=(mirror,), checksums=SUMS)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize(
    ("answer", "files", "message"),
    [
        pytest.param(corrupt, FILES, "has a wrong checksum", id="corrupt"),
        pytest.param(cut_short, FILES, r"cannot be had \(ProtocolError\)", id="truncated"),
        pytest.param(endless, FILES, "has a wrong checksum", id="endless"),
        pytest.param(send, {}, r"cannot be had \(404 Client Error: Not Found\)", id="404"),
    ],
)
def test_a_bad_mirror_leaves_nothing_and_the_next_is_asked(
    tmp_path: Path, answer: Answer, files: dict[str, bytes], message: str
) -> None:
    with serve(answer, files) as bad, serve(send, FILES) as good:
        with pytest.raises(DataError, match=f"^{bad}/{next(iter(SUMS))} {message}$"):
            download(tmp_path, mirrors=(bad,), checksums=SUMS)
        assert contents(tmp_path) == {}
        download(tmp_path, mirrors=(bad, good), checksums=SUMS)
    assert contents(tmp_path) == FILES


def test_files_missing_at_one_mirror_come_from_another(tmp_path: Path) -> None:
    names = list(FILES)
    first, second = ({name: FILES[name] for name in part} for part in (names[1:], names[:1]))
    with serve(send, first) as one, serve(send, second) as other:
        download(tmp_path, mirrors=(one, other), checksums=SUMS)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("mirror", ["dead port", "http://mirror.invalid/", "no-scheme/mnist", "ftp://127.0.0.1/"])
def test_an_unreachable_mirror_is_passed_over(tmp_path: Path, mirror: str) -> None:
    url = dead_mirror() if mirror == "dead port" else mirror
    with pytest.raises(DataError, match=f"^{url.rstrip('/')}/{next(iter(SUMS))} (cannot be had|does not answer)"):
        download(tmp_path, mirrors=(url,), checksums=SUMS)
    with serve(send, FILES) as good:
        download(tmp_path, mirrors=(url, good), checksums=SUMS)
    assert contents(tmp_path) == FILES


def test_a_mirror_that_hangs_is_left_soon(tmp_path: Path) -> None:
    over = threading.Event()

    def silent(request: BaseHTTPRequestHandler, content: bytes) -> None:
        over.wait(30)

    def stalling(request: BaseHTTPRequestHandler, content: bytes) -> None:
        send(request, content[:9], length=len(content))
        request.wfile.flush()
        over.wait(30)

    def dripping(request: BaseHTTPRequestHandler, content: bytes) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not over.wait(0.2):
            request.wfile.write(b"x")

    def attempt(number: int, mirror: str) -> str:
        with pytest.raises(DataError) as caught:
            download(tmp_path / str(number), mirrors=(mirror,), checksums=SUMS)
        return str(caught.value)

    with contextlib.ExitStack() as stack:
        mirrors = [stack.enter_context(serve(answer, FILES)) for answer in (silent, stalling, dripping)]
        stack.callback(over.set)
        start = time.monotonic()
        good = stack.enter_context(serve(send, FILES))
        with ThreadPoolExecutor() as pool:
            rescued = pool.submit(download, tmp_path / "good", mirrors=(mirrors[0], good), checksums=SUMS)
            errors = list(pool.map(attempt, range(3), mirrors))
            rescued.result()
        # The servers stay silent for 30 s: to come back before that is to have given up on them.
        assert time.monotonic() - start < 15
    for mirror, error in zip(mirrors, errors, strict=True):
        assert error == f"{mirror}/{next(iter(SUMS))} does not answer in time"
    assert contents(tmp_path / "good") == FILES


def test_a_killed_download_leaves_no_file_under_its_name(tmp_path: Path) -> None:
    half_sent, over = threading.Event(), threading.Event()

    def half(request: BaseHTTPRequestHandler, content: bytes) -> None:
        send(request, content[:9], length=len(content))
        half_sent.set()
        over.wait(30)

    script = (
        "import sys; from pathlib import Path; from octavo.lab.data import download\n"
        "download(Path(sys.argv[1]), mirrors=(sys.argv[2],))"
    )
    with serve(half, FILES) as mirror:
        process = subprocess.Popen([sys.executable, "-c", script, tmp_path, mirror])
        try:
            assert half_sent.wait(30)
        finally:
            process.kill()
            process.wait()
            over.set()
    assert not CHECKSUMS.keys() & contents(tmp_path).keys()
    with serve(send, FILES) as good:
        download(tmp_path, mirrors=(good,), checksums=SUMS)
    assert FILES.items() <= contents(tmp_path).items()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with serve(send, FILES) as mirror:
        with pytest.raises(DataError, match=r"cannot download to .*file/cache/mnist: .*OCTAVO_CACHE"):
            load(Source.MNIST, cache=tmp_path / "file" / "cache", mirrors=(mirror,))
        data = load(Source.AUTO, cache=tmp_path / "file" / "cache", mirrors=(mirror,))
    assert data.name == "digits"
    assert "because MNIST is not available: cannot download to" in data.source


def test_no_network_gives_the_digits_or_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    mirrors = (dead_mirror(), "http://mirror.invalid/")
    data = load(Source.AUTO, mirrors=mirrors)
    assert data.name == "digits"
    assert all(mirror.rstrip("/") in data.source for mirror in mirrors)
    with pytest.raises(DataError, match=r"MNIST is not available.*set OCTAVO_DATA.*--data digits$") as caught:
        load(Source.MNIST, mirrors=mirrors)
    assert all(mirror.rstrip("/") in str(caught.value) for mirror in mirrors)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "mnist") == {}


def test_a_download_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(corrupt, FILES) as bad, serve(send, FILES) as good:
        download(tmp_path, mirrors=(bad, dead_mirror(), good), checksums=SUMS)
    assert capfd.readouterr() == ("", "")


def test_tiny_files_from_a_mirror_are_not_taken_for_mnist(tmp_path: Path) -> None:
    with serve(send, FILES) as mirror:
        assert "has a wrong checksum" in load(Source.AUTO, cache=tmp_path, mirrors=(mirror,)).source
    assert contents(tmp_path / "mnist") == {}


@needs_mnist
def test_real_mnist_is_served_cached_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL_MNIST is not None
    zipped = {name: Path(REAL_MNIST) / name for name in CHECKSUMS}
    absent = [name for name, path in zipped.items() if not path.is_file()]
    if absent:
        pytest.skip(f"OCTAVO_DATA={REAL_MNIST} lacks {', '.join(absent)}")
    with serve(send, {name: path.read_bytes() for name, path in zipped.items()}) as mirror:
        fetched = load(Source.MNIST, cache=tmp_path, mirrors=(mirror,))
    cached = load(Source.AUTO, cache=tmp_path, mirrors=())
    monkeypatch.setenv("OCTAVO_DATA", REAL_MNIST)
    found = load(Source.AUTO, cache=tmp_path / "other", mirrors=())
    for data in (fetched, cached, found):
        assert data.name == "mnist"
        assert data.train_images.shape == (60000, 28, 28)
        assert data.test_images.shape == (10000, 28, 28)
        assert np.bincount(data.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert round(data.train_images.mean() / 255, 4) == 0.1307
    assert cached.source == f"MNIST from the cache, {tmp_path / 'mnist'}"


# Digits


def test_digits_are_scikit_learns_scaled_by_three_and_padded() -> None:
    from sklearn.datasets import load_digits

    data, again, bunch = load(Source.DIGITS), load(Source.DIGITS), load_digits()
    assert (len(data.train_images), len(data.test_images)) == (1437, 360)
    assert "scikit-learn" in data.source
    assert np.array_equal(data.train_images, again.train_images)
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    inside = np.zeros((28, 28), bool)
    inside[2:26, 2:26] = True
    assert not images[:, ~inside].any()
    for row in range(3):
        for column in range(3):
            assert np.array_equal(images[:, 2 + row : 26 : 3, 2 + column : 26 : 3], images[:, 2:26:3, 2:26:3])
    # Every original image appears once with its label; round() is to nearest-even too.
    table = np.array([round(value * 255 / 16) for value in range(17)], np.uint8)
    wanted = table[bunch.images.astype(int)].reshape(-1, 64)
    small = images[:, 2:26:3, 2:26:3].reshape(-1, 64)
    assert sorted(zip(map(bytes, small), labels.tolist(), strict=True)) == sorted(
        zip(map(bytes, wanted), bunch.target.tolist(), strict=True)
    )
    assert np.bincount(data.train_labels, minlength=10).min() > 100


# Dataset


GOOD = {
    "train_images": np.zeros((4, 28, 28), np.uint8),
    "train_labels": np.zeros(4, np.uint8),
    "test_images": np.zeros((2, 28, 28), np.uint8),
    "test_labels": np.zeros(2, np.uint8),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_images", np.zeros((4, 784), np.uint8)),
        ("train_images", np.zeros((4, 28, 28), np.float32)),
        ("train_images", np.zeros((3, 28, 28), np.uint8)),
        ("train_labels", np.zeros(4, np.int64)),
        ("train_labels", np.zeros((4, 1), np.uint8)),
        ("test_labels", np.array([0, 10], np.uint8)),
        ("test_images", np.zeros((0, 28, 28), np.uint8)),
    ],
)
def test_dataset_refuses_what_it_does_not_promise(field: str, value: np.ndarray) -> None:
    assert Dataset(name="mnist", source="here", **GOOD).source == "here"
    with pytest.raises(DataError, match=f"^{field.partition('_')[0]}.* data: .*must be"):
        Dataset(name="mnist", source="here", **GOOD | {field: value})


def test_dataset_refuses_to_be_empty() -> None:
    empty = {"test_images": GOOD["test_images"][:0], "test_labels": GOOD["test_labels"][:0]}
    with pytest.raises(DataError, match="test data: must be as many images as labels and at least one"):
        Dataset(name="mnist", source="here", **GOOD | empty)


# Batches


def test_batches_are_a_permutation_of_seed_and_epoch() -> None:
    def order(**key: int) -> list[int]:
        return np.concatenate(list(batches(1000, 64, drop_last=False, **key))).tolist()

    first = order(epoch=0, seed=1)
    assert sorted(first) == list(range(1000))
    assert first == order(epoch=0, seed=1)
    others = [order(epoch=1, seed=1), order(epoch=0, seed=2), order(epoch=1, seed=0), first]
    assert len({tuple(other) for other in others}) == 4
    # Another batch size walks the same order.
    assert np.concatenate(list(batches(1000, 10, epoch=0, seed=1))).tolist() == first


@pytest.mark.parametrize(
    ("n", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, True, [4, 4]),
        (10, 4, False, [4, 4, 2]),
        (8, 4, True, [4, 4]),
        (8, 4, False, [4, 4]),
        (3, 4, True, [3]),
        (3, 4, False, [3]),
        (1, 1, True, [1]),
    ],
)
def test_batch_sizes(n: int, batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    found = list(batches(n, batch_size, epoch=0, seed=0, drop_last=drop_last))
    assert [len(batch) for batch in found] == sizes
    assert {batch.dtype for batch in found} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("batch_size", 0), ("batch_size", -1), ("epoch", -1), ("seed", -1), ("seed", 2**64)]
)
def test_batches_refuse_at_the_call(field: str, value: int) -> None:
    arguments = {"n": 10, "batch_size": 2, "epoch": 0, "seed": 0} | {field: value}
    with pytest.raises(ValueError, match=f"^{field} must be at least .*, got {value}"):
        batches(**arguments)


def test_importing_the_module_imports_no_framework() -> None:
    script = "import sys, octavo.lab.data; print({'torch', 'sklearn', 'pooch', 'requests', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
