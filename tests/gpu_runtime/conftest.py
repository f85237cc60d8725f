import pytest
import torch

from moejet.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """get(family, **overrides of config.json): a tiny checkpoint with weights rounded to bf16."""
    made = {}

    def get(family: str, **overrides):
        key = (family, *sorted(overrides.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            made[key] = tiny_checkpoint(path, family, dtype=torch.bfloat16, **overrides)
        return made[key]

    return get
