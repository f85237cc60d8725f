"""From what a user calls a model (alias, directory, GGUF file, hub id) to a path with its files."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from moejet.config import ModelConfig
from moejet.presets import PRESETS
from moejet.validation import near_miss, short
from moejet.weights.gguf import list_shards
from moejet.weights.gguf_model import GgufCheckpoint

TINY_REASONER = "tiny-reasoner"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def resolve_model(
    model: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Directory or .gguf file that holds `model`, downloaded if it is a hub id ("org/name").

    Of a repository with several GGUF quantisations, "org/name:Q4_K_M" is one.

    "tiny-reasoner" is the embedded model. A .gguf file is a model of its own, and so is a directory whose only model is
    one, in any number of shards: the first one is returned. Existing paths win over a hub id of the same spelling.
    `revision` and `cache_dir` (None: the Hugging Face cache) apply to downloads only; `moejet.hub` makes them.
    Raises ValueError, in one line with a remedy, if there is no such model or it cannot be fetched.
    """
    if not isinstance(model, str) or not model.strip():
        raise ValueError(
            f"model={short(model)} must be an alias, a directory or a hub id (org/name)"
        )
    if model == TINY_REASONER:
        return _embedded()
    path = Path(model).expanduser()
    if os.path.exists(path):  # false for what can be no path, too
        return _local(path)
    if _looks_like_path(model):
        raise ValueError(f"model={short(model)}: no such file or directory; check the path")
    if not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"model={short(model)} is neither an alias ({TINY_REASONER}), nor an existing directory, nor "
            f"a hub id of the form org/name{near_miss(model, [TINY_REASONER])}"
        )
    return _download(model, revision, None if cache_dir is None else Path(cache_dir))


def resolve_config(model: str, revision: str | None = None) -> ModelConfig:
    """The configuration of a preset by name, or of anything that `resolve_model` takes.

    Of hub models only config.json is downloaded, or the beginnings of the GGUF files.
    """
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model]
    if _HUB_ID.fullmatch(model) and not Path(model).expanduser().exists():
        from moejet.hub import is_offline, pull

        config = None if is_offline() else pull(model, revision, weights=False).config
        if config is not None:
            return config
    path = resolve_model(model, revision)
    return GgufCheckpoint.open(path).config if path.is_file() else ModelConfig.from_hf(path)


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
            # Not resolved: in a cache a link carries the name and thereby the number of the shard.
            return list_shards(path.absolute())[0]
        raise ValueError(
            f"model={str(path)!r} is a file; give a .gguf file or the directory that holds "
            f"config.json, probably {str(path.parent)!r}"
        )
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path.resolve()
    models = _gguf_models(path.absolute())
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(file.name for file in models)
        raise ValueError(
            f"model={str(path)!r}: the directory holds {len(models)} GGUF models; give one of {names}"
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model={str(path)!r}: the directory holds no config.json; supported: a Hugging "
            "Face checkpoint with config.json, *.safetensors and tokenizer.json, or a GGUF file"
        )
    return path.resolve()


def _gguf_models(root: Path) -> list[Path]:
    """The GGUF files of a directory, of split ones the first shard; no vision projectors."""
    found = sorted(root.glob("*.gguf")) or sorted(root.glob("*/*.gguf"))
    files = [f for f in found if not f.name.startswith("mmproj")]
    return list(dict.fromkeys(list_shards(file)[0] for file in files))


def _looks_like_path(model: str) -> bool:
    starts = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    return starts or "\\" in model or model.count("/") > 1 or model.endswith((".gguf", "/"))


def _download(model: str, revision: str | None, cache_dir: Path | None) -> Path:
    # Imported here: it costs a noticeable part of a second and local models do not need it.
    from moejet.hub import pull_or_local, quant_of, split_quant
    from moejet.hub.progress import LineReporter

    root = pull_or_local(model, revision, cache_dir, LineReporter())
    repo_id, quant = split_quant(model)
    if (root / "config.json").is_file() and any(root.glob("*.safetensors")):
        return _local(root)
    names = [str(f.relative_to(root)) for f in sorted(root.rglob("*.gguf"))]
    quants = {quant_of(name): root / name for name in reversed(names) if quant_of(name)}
    if quant is None and len(quants) > 1:
        raise ValueError(
            f"model={model!r}: several quantisations are here; choose one of "
            + ", ".join(f"{repo_id}:{name}" for name in sorted(quants))
        )
    file = next(iter(quants.values()), None) if quant is None else quants[quant.upper()]
    return _local(root) if file is None else list_shards(file)[0]
