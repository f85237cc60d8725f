"""From what a user calls a model (alias, directory, hub id) to a directory with its files."""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import re
from pathlib import Path

from moejet.config import ModelConfig
from moejet.presets import PRESETS
from moejet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TINY_REASONER = "tiny-reasoner"
# Top-level files only: repositories keep other formats in subdirectories.
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]
_WANTED = [*_SMALL, "*.safetensors"]
_UNWANTED = ["*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(
    model: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Directory that holds the files of `model`, downloaded if it is a hub id ("org/name").

    "tiny-reasoner" is the embedded model. An existing directory wins over a hub id of the same spelling. `revision` and
    `cache_dir` (None: the Hugging Face cache) apply to downloads only. Before the weights are downloaded, config.json
    is, and a model that moejet cannot run is refused.
    Raises ValueError, in one line with a remedy, if there is no such model or it cannot be fetched.
    """
    if not isinstance(model, str) or not model.strip():
        raise ValueError(f"model={model!r} must be an alias, a directory or a hub id (org/name)")
    if model == TINY_REASONER:
        return _embedded()
    path = Path(model).expanduser()
    if path.exists():
        return _local(path)
    if _looks_like_path(model):
        raise ValueError(f"model={model!r}: no such directory; check the path")
    if not _HUB_ID.fullmatch(model):
        near = difflib.get_close_matches(model, [TINY_REASONER], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model={model!r} is neither an alias ({TINY_REASONER}), nor an existing directory, nor "
            f"a hub id of the form org/name{hint}"
        )
    return _download(model, revision, None if cache_dir is None else Path(cache_dir))


def resolve_config(model: str, revision: str | None = None) -> ModelConfig:
    """The configuration of a preset by name, or of anything that `resolve_model` takes.

    Of hub models only config.json is downloaded.
    """
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model]
    if _HUB_ID.fullmatch(model) and not Path(model).expanduser().exists():
        return ModelConfig.from_hf(_download(model, revision, None, only_config=True))
    return ModelConfig.from_hf(resolve_model(model, revision))


def _embedded() -> Path:
    root = importlib.resources.files("moejet") / "assets" / "tiny_reasoner"
    if not isinstance(root, Path) or not (root / "config.json").is_file():
        raise ValueError(
            f"model={TINY_REASONER!r} is not part of this installation ({root}): install moejet again"
        )
    return root


def _local(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".gguf":
            raise ValueError(
                f"model={str(path)!r} is a GGUF file, which this version does not read yet; "
                "supported: a directory with config.json and *.safetensors"
            )
        raise ValueError(
            f"model={str(path)!r} is a file; give the directory that holds config.json, "
            f"probably {str(path.parent)!r}"
        )
    if not (path / "config.json").is_file():
        hint = ""
        if any(path.glob("*.gguf")):
            hint = " (it holds GGUF files, which this version does not read yet)"
        raise ValueError(
            f"model={str(path)!r}: the directory holds no config.json{hint}; supported: a Hugging "
            "Face checkpoint with config.json, *.safetensors and tokenizer.json"
        )
    return path.resolve()


def _looks_like_path(model: str) -> bool:
    starts = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    return starts or "\\" in model or model.count("/") > 1 or model.endswith((".gguf", "/"))


def _download(
    repo_id: str, revision: str | None, cache_dir: Path | None, *, only_config: bool = False
) -> Path:
    # Imported here: it costs a noticeable part of a second and local models do not need it.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    # Its retries are logged line by line; what matters of them ends up in our one-line error.
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)
    try:
        config = hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=cache_dir)
        ModelConfig.from_hf(config)
        if only_config:
            return Path(config)
        for wanted in (_SMALL, _WANTED):
            root = snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=wanted,
                ignore_patterns=_UNWANTED,
            )
            Tokenizer.from_path(root)  # refused before hundreds of gigabytes arrive, not after
    except GatedRepoError as error:
        raise ValueError(
            f"model={repo_id!r} is gated: accept its terms on the hub, then set HF_TOKEN or run "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model={repo_id!r} is neither a directory here nor a public hub repository; check the "
            "spelling, or set HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"model={repo_id!r} has no revision {revision!r}; give a branch, a tag or a commit of it"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model={repo_id!r}{at} is not in the local cache and the hub cannot be reached; check "
            "the network (HF_ENDPOINT, HF_HUB_OFFLINE), or give a local directory"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"model={repo_id!r}{at} holds no config.json: it is not a transformers checkpoint"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"model={repo_id!r} is not a valid hub id: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"model={repo_id!r}{at} could not be downloaded ({reason[0]}); run the command again to "
            "resume, or give a local directory"
        ) from error
    finally:
        hub_logger.setLevel(level)
    return Path(root)
