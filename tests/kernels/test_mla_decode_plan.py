"""How an MLA decode is cut up: tiles that cards can hold, splits that fill them."""

import pytest
import torch

from moejet.kernels.card import CARDS
from moejet.kernels.mla_decode_plan import LEAST_TILES, choose_splits, choose_tiles


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
@pytest.mark.parametrize("rows", [16, 20, 48, 128, 1024])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.uint8])
def test_tiles_fit(card, rows, cache_dtype):
    tiles = choose_tiles(card, rows, cache_dtype)
    # Queries, and tiles of keys, of 1152 bytes a row; a tile of bytes takes part once, decoded.
    copies = 1 if cache_dtype == torch.uint8 else tiles.num_stages - 1
    assert tiles.resident * (tiles.block_m + copies * tiles.block_n) * 1152 <= card.shared_memory
    # Triton gives the warps to the keys, eight at least for each, or uses wgmma.
    if tiles.block_m < 64:
        assert tiles.block_m < tiles.block_n
        assert tiles.num_warps * 8 <= tiles.block_n


@pytest.mark.parametrize(
    ("programs", "tokens", "at_once", "expected"),
    [
        (1, 100, 82, 1),  # too short to cut
        (1, 1, 82, 1),
        (1, 131072, 82, 82),  # one wave
        (8, 131072, 132, 33),  # two full waves rather than one of 128
        (82, 32768, 82, 1),
        (4, 262144, 264, 66),
    ],
)
def test_choice_of_splits(programs, tokens, at_once, expected):
    assert choose_splits(programs, tokens, 32, at_once) == expected


@pytest.mark.parametrize("programs", [1, 3, 8, 64, 500])
@pytest.mark.parametrize("tokens", [1, 127, 4096, 131072])
def test_splits_are_worth_their_programs(programs, tokens):
    splits = choose_splits(programs, tokens, 32, 132)
    assert 1 <= splits <= 256
    assert splits == 1 or tokens >= splits * LEAST_TILES * 32
    # With much to share no half of a card is idle.
    if tokens == 131072:
        assert programs * splits > 66
