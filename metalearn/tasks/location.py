"""Where a data set lies: a file or folder of this machine, or the Hugging Face hub and whether that can be reached."""

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

# Known from memory, not checked online.
HUB_IDS = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}
FILE_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".tokens": "text",
}

_PROBE_SECONDS = 1.0


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """The file or folder that ``path`` means, or None where it can only be a hub id."""
    text, given = os.fspath(path), Path(path).expanduser()
    root = os.environ.get("METALEARN_DATA")
    if root and not text.startswith(("/", ".", "~")) and (Path(root) / text).exists():
        return (Path(root) / text).resolve()
    looks_local = isinstance(path, os.PathLike) or given.is_absolute() or text.startswith(("./", "../"))
    if not looks_local and given.suffix not in {*FILE_BUILDERS, ".npz"} and not ("/" in text and given.exists()):
        return None
    if not given.exists():
        raise ValueError(
            f"path is {text!r}, which does not exist; accepted: a file or folder, or one in $METALEARN_DATA"
        )
    return given.resolve()


def offline_reason() -> str | None:
    """Why the hub cannot be asked, or None. `datasets` itself finds that out after 23 s of retries."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{variable} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    scheme = urlsplit(endpoint).scheme
    url = urlsplit(getproxies().get(scheme, endpoint))
    address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
    return None if _answers(address) else f"{address[0]} did not answer within {_PROBE_SECONDS:g} s"


def _answers(address: tuple[str, int]) -> bool:
    """Whether a connection can be opened. In a thread: the timeout of a socket does not cover the name lookup."""
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError), socket.create_connection(address, timeout=_PROBE_SECONDS):
            answered.set()

    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return answered.is_set()
