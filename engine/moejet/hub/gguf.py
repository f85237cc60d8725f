"""What a GGUF model of a hub is, from the first megabytes of its files, before the rest comes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from moejet.hub.listing import HubFile
from moejet.hub.progress import Counter
from moejet.hub.transfer import Fetcher

if TYPE_CHECKING:
    from moejet.config import ModelConfig

# The first file holds the vocabulary; the others only the list of their tensors.
_FIRST_BYTES, _OTHER_BYTES = 8 << 20, 1 << 20


def fetch_config(fetcher: Fetcher, files: Sequence[HubFile], counter: Counter) -> ModelConfig:
    """The configuration of a model in one file or shards; what comes of them stays for the download.

    Everything is checked that can be without the weights: architecture, tensors and their types, tokenizer.
    Raises ValueError, naming the file.
    """
    # Imported here: they need torch, which is not there for a command that only lists its options.
    from moejet.weights.gguf_model import GgufCheckpoint
    from moejet.weights.gguf_tokenizer import gguf_tokenizer

    with tempfile.TemporaryDirectory(prefix="moejet-") as name:
        # As long as the files will be, and empty behind the headers: to be read as they will be.
        starts = []
        for i, file in enumerate(sorted(files, key=lambda f: f.path)):
            start = _fetch_header(fetcher, file, _OTHER_BYTES if i else _FIRST_BYTES, counter)
            starts.append(Path(name) / PurePosixPath(file.path).name)
            with start.open("rb") as source, starts[-1].open("wb") as target:
                shutil.copyfileobj(source, target)
                target.truncate(file.size)
        try:
            checkpoint = GgufCheckpoint.open(starts[0])
            gguf_tokenizer(checkpoint.metadata)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{name}/", "")) from error
        return checkpoint.config


def _fetch_header(fetcher: Fetcher, file: HubFile, num_bytes: int, counter: Counter) -> Path:
    """A file that begins with all of the header of `file`."""
    from moejet.weights.gguf import HeaderBeyond, read_gguf_header

    while True:
        start = fetcher.fetch_start(file, num_bytes, counter)
        try:
            read_gguf_header(start, file.size)
        except HeaderBeyond:
            num_bytes *= 2
        except ValueError as error:
            raise ValueError(str(error).replace(start.name, file.path)) from error
        else:
            return start
