"""The files of a hub repository, with sizes and hashes, and the choice among them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from moejet.hub.errors import HubError
from moejet.progress import gib

INDEX = "model.safetensors.index.json"
# Top-level files only: repositories keep other formats in subdirectories.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
_TEMPLATES = "additional_chat_templates"
_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
# Such as Q4_K_M, IQ2_XXS, UD-Q2_K_XL, BF16, MXFP4_MOE.
_QUANT = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*))(?=[-./]|$)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository: path within it, bytes, and the hashes that its content must have."""

    path: str
    size: int
    git_sha1: str
    sha256: str | None

    @property
    def blob(self) -> str:
        """Name of its content in the cache: the stronger hash that the hub publishes."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]

    def find(self, path: str) -> HubFile | None:
        return next((file for file in self.files if file.path == path), None)


def split_quant(model: str) -> tuple[str, str | None]:
    """("org/name", "Q4_K_M") of "org/name:Q4_K_M"; (model, None) if no quantisation is named."""
    repo_id, colon, quant = model.rpartition(":")
    return (repo_id, quant) if colon else (model, None)


def fetch_listing(repo_id: str, revision: str | None) -> Listing:
    """Ask the hub; raises what huggingface_hub raises, and HubError for an answer without hashes."""
    from huggingface_hub import HfApi

    info = HfApi(library_name="moejet").model_info(
        repo_id, revision=revision, files_metadata=True, timeout=10
    )
    files = []
    for entry in info.siblings or ():
        sha256 = None if entry.lfs is None else entry.lfs["sha256"]
        size = entry.size if entry.lfs is None else entry.lfs["size"]
        if size is None or entry.blob_id is None:
            raise HubError(
                f"model={repo_id!r}: the hub names no size or hash of {entry.rfilename!r}; "
                "use an HF_ENDPOINT that does"
            )
        files.append(HubFile(entry.rfilename, size, entry.blob_id, sha256))
        _check_names(repo_id, files[-1])
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise HubError(f"model={repo_id!r}: the hub names no commit; use an HF_ENDPOINT that does")
    return Listing(repo_id, info.sha, tuple(files))


def _check_names(repo_id: str, file: HubFile) -> None:
    """Names become paths of files here: none may leave the repository's folder."""
    path = PurePosixPath(file.path)
    is_bad = path.is_absolute() or ".." in path.parts or "\\" in file.path or "\0" in file.path
    if is_bad or not path.parts or file.size < 0 or not _HEX.fullmatch(file.blob):
        raise HubError(f"model={repo_id!r}: refused the file name or hash of {file.path!r}")


def small_files(listing: Listing) -> list[HubFile]:
    """Configuration, tokenizer and chat templates."""
    return [
        file
        for file in listing.files
        if ("/" not in file.path and any(fnmatchcase(file.path, p) for p in _SMALL))
        or fnmatchcase(file.path, f"{_TEMPLATES}/*.jinja")
    ]


def is_gguf(listing: Listing) -> bool:
    """Whether the repository's weights are GGUF files and nothing else."""
    names = [file.path for file in listing.files]
    has_safetensors = any("/" not in name and name.endswith(".safetensors") for name in names)
    return not has_safetensors and any(name.endswith(".gguf") for name in names)


def weight_files(
    listing: Listing, snapshot: Path, include: Sequence[str] = (), quant: str | None = None
) -> list[HubFile]:
    """The weights to fetch: what `include` matches, one GGUF quantisation, or the shards in the index.

    snapshot: directory that holds the small files, the index among them. Raises ValueError if nothing fits or, naming
    the choices, if several quantisations are there and none is chosen.
    """
    if quant is not None and (include or not is_gguf(listing)):
        raise ValueError(
            f"quant={quant!r} goes with a repository of GGUF files and without include patterns; "
            f"model={listing.repo_id!r}"
        )
    if include:
        return _included(listing, include)
    if is_gguf(listing):
        return _quantisation(listing, quant)
    files = [f for f in listing.files if "/" not in f.path and f.path.endswith(".safetensors")]
    if listing.find(INDEX) is not None:
        shards = set(shards_of(snapshot / INDEX))
        absent = sorted(shards - {file.path for file in files})
        if absent:
            raise ValueError(
                f"model={listing.repo_id!r}: {INDEX} names {_some(absent)}, which the repository "
                "does not hold; its upload is incomplete"
            )
        return [file for file in files if file.path in shards]
    if not files:
        raise ValueError(
            f"model={listing.repo_id!r} holds no *.safetensors and no *.gguf: there are no weights "
            "that moejet could read"
        )
    return files


def shards_of(index: Path) -> list[str]:
    """Names of the files in a safetensors index."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted(set(names))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} cannot be read ({error}): pull the model again") from error


def quantisations(files: Iterable[HubFile]) -> dict[str, list[HubFile]]:
    """GGUF files by quantisation, in order of size; the parts of a split model stay together."""
    groups: dict[str, list[HubFile]] = {}
    for file in files:
        name = quant_of(file.path)
        if name:
            groups.setdefault(name, []).append(file)
    return dict(sorted(groups.items(), key=lambda group: sum(f.size for f in group[1])))


def quant_of(path: str) -> str:
    """The quantisation that a GGUF file's name tells, or its name without number; empty if it is no model."""
    stem = path.removesuffix(".gguf")
    if stem == path or PurePosixPath(stem).name.lower().startswith("mmproj"):
        return ""
    stem = _SPLIT.sub("", stem)
    tags: list[str] = _QUANT.findall(PurePosixPath(stem).name) or _QUANT.findall(stem)
    return tags[-1].upper() if tags else stem


def _quantisation(listing: Listing, quant: str | None) -> list[HubFile]:
    groups = quantisations(listing.files)
    choices = ", ".join(f"{n} ({gib(sum(f.size for f in g))})" for n, g in groups.items())
    if quant is None and len(groups) == 1:
        return next(iter(groups.values()))
    if quant is None:
        raise ValueError(
            f"model={listing.repo_id!r} holds several quantisations: {choices}; choose one, as in "
            f"{listing.repo_id}:{next(iter(groups))}"
        )
    if quant.upper() not in groups:
        raise ValueError(f"model={listing.repo_id!r} has no quant={quant!r}; it has {choices}")
    return groups[quant.upper()]


def _included(listing: Listing, include: Sequence[str]) -> list[HubFile]:
    small = {file.path for file in small_files(listing)}
    for pattern in include:
        if not any(fnmatchcase(file.path, pattern) for file in listing.files):
            names = _some([file.path for file in listing.files])
            raise ValueError(
                f"include={pattern!r} matches no file of model={listing.repo_id!r}; it has {names}"
            )
    return [
        file
        for file in listing.files
        if file.path not in small and any(fnmatchcase(file.path, p) for p in include)
    ]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
