"""The whole model on a device, by the kernels that a GPU would run: launchers get what the layers give them.

Tensors stay on the CPU and say that they are on a GPU, so that operations go to Triton.
"""

import torch

from moejet import LLM, SamplingParams
from moejet.batch import Batch
from moejet.testing.checkpoints import tiny_checkpoint

OPTIONS = {
    "device": "simulated",
    "gpu_experts": 9,
    "expert_format": "int4_g32",
    "dense_format": "int8",
    "cache_dtype": "fp32",
    "max_context": 64,
    "isa": "avx2",
    "stream_prefill_tokens": 10,
}


def _logits(path) -> list[torch.Tensor]:
    """Of a prompt beside a single token, whose experts stream, and of a decode batch that is padded."""
    made = []
    with LLM(path, **OPTIONS) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        with (
            llm.engine.scratch_request(list(range(20, 32))) as a,
            llm.engine.scratch_request([7, 9]) as b,
            llm.engine.scratch_request([3]) as c,
        ):
            for lens in ([9, 1], [1, 1, 1]):
                requests = [a, b, c][: len(lens)]
                batch = Batch.build(requests, lens, block_size=size)
                batch.logits_indices = torch.arange(sum(lens))
                made.append(runner.execute(batch))
                assert runner.transfers().chunks == 1
                for request, num in zip(requests, lens, strict=True):
                    request.num_computed_tokens += num
        greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        made.append(torch.tensor(llm.generate([[5, 6]], greedy)[0].outputs[0].token_ids))
    return made


def test_kernels_agree_with_references(tmp_path, monkeypatch):
    # Tiles of attention are no smaller; each pair of a token and an expert costs the interpreter 0.1 s.
    shape = {"qk_rope_head_dim": 16, "num_hidden_layers": 2}
    shape |= {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
    path = tiny_checkpoint(tmp_path, "deepseek_v3", dtype=torch.bfloat16, **shape)
    expected = _logits(path)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    got = _logits(path)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
