"""Models from a Hugging Face style hub: listing, choosing, resumable checked transfer, and the local cache.

huggingface_hub lists repositories and speaks HTTP; its cache layout is kept, so other programs find the same files.
Added here: transfers that go on after the process was killed, a check of every file against the hub's hash, a check of
disk space and of what moejet can run before the weights come, and a sweep of what interrupted downloads left.
"""

from moejet.hub.cache import (
    Orphan,
    RepoCache,
    Verification,
    cache_root,
    find_orphans,
    remove_orphans,
    verify_snapshot,
)
from moejet.hub.errors import HubError
from moejet.hub.listing import HubFile, quant_of, split_quant
from moejet.hub.progress import Counter, Reporter, TransferProgress
from moejet.hub.pull import PullResult, is_offline, local_snapshot, pull, pull_or_local

__all__ = [
    "Counter",
    "HubError",
    "HubFile",
    "Orphan",
    "PullResult",
    "RepoCache",
    "Reporter",
    "TransferProgress",
    "Verification",
    "cache_root",
    "find_orphans",
    "is_offline",
    "local_snapshot",
    "pull",
    "pull_or_local",
    "quant_of",
    "remove_orphans",
    "split_quant",
    "verify_snapshot",
]
