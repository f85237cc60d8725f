import pytest
import torch
import torch.nn.functional as F

from moejet.ops.latent_rows import encode_latents
from moejet.ops.mla_decode import mla_decode
from moejet.prefix_groups import PrefixGroups
from moejet.testing.tolerances import assert_close

H, C, R, S = 3, 32, 16, 4


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_is_attention_over_latents_as_keys_and_values(query_len, cache_dtype):
    contexts = [7, 0, 3]
    latents, ropes = torch.randn(6, S, C), torch.randn(6, S, R)
    cache = encode_latents(latents, ropes, cache_dtype)
    tables = torch.tensor([[4, 1], [-1, -1], [2, -1]], dtype=torch.int32)
    q_latent, q_pe = torch.randn(3 * query_len, H, C), torch.randn(3 * query_len, H, R)
    out = torch.full((3 * query_len, H, C), torch.nan)
    returned = mla_decode(
        q_latent,
        q_pe,
        cache,
        tables,
        torch.tensor(contexts, dtype=torch.int32),
        query_len=query_len,
        scale=0.3,
        max_context=8,
        out=out,
    )
    assert returned is out
    for i, context in enumerate(contexts):
        tokens = slice(i * query_len, (i + 1) * query_len)
        if context == 0:
            assert not out[tokens].any()
            continue
        blocks = tables[i, : -(-context // S)].long()
        values = latents[blocks].flatten(0, 1)[:context]
        keys = torch.cat((values, ropes[blocks].flatten(0, 1)[:context]), dim=-1)
        queries = torch.cat((q_latent, q_pe), dim=-1)[tokens].transpose(0, 1)
        mask = torch.ones(query_len, context, dtype=torch.bool).tril(context - query_len)
        expected = F.scaled_dot_product_attention(
            queries, keys.expand(H, -1, -1), values.expand(H, -1, -1), attn_mask=mask, scale=0.3
        )
        limit = {torch.float32: "fp32", torch.bfloat16: "int8", torch.uint8: "int4_g32"}
        assert_close(out[tokens], expected.transpose(0, 1), limit[cache_dtype])


def test_a_new_result_has_the_dtype_asked_for():
    q_latent = torch.randn(1, H, C).bfloat16()
    cache, tables = torch.randn(1, S, C + R), torch.zeros(1, 1, dtype=torch.int32)
    lens = torch.tensor([2], dtype=torch.int32)

    def dtype(**options):
        q_pe = torch.randn(1, H, R).bfloat16()
        options |= {"query_len": 1, "scale": 1.0, "max_context": 4}
        return mla_decode(q_latent, q_pe, cache, tables, lens, **options).dtype

    assert dtype() == torch.bfloat16
    assert dtype(out_dtype=torch.float32) == torch.float32


def test_groups_from_lists():
    groups = PrefixGroups.of([([2, 0], 8), ([], 0), ([3], 4)], batch=5)
    assert groups.starts.tolist() == [0, 2, 2, 3]
    assert groups.members.tolist() == [2, 0, 3]
    assert groups.shared_lens.tolist() == [8, 0, 4]
    assert groups.group_of.tolist() == [0, -1, 0, 2, -1]
    assert (groups.max_members, groups.max_shared) == (2, 8)
