"""Small random models of transformers, saved as a hub has them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


class SaveModel(Protocol):
    """The signature of `save_model`."""

    def __call__(
        self, directory: Path, kind: str = "Llama", shard: str = "1GB", **changes: Any
    ) -> Any: ...


@pytest.fixture
def save_model(tokenizer_model: Path) -> SaveModel:
    """Save a random `kind`ForCausalLM of transformers with the tests' tokenizer; the model."""

    def save(directory: Path, kind: str = "Llama", shard: str = "1GB", **changes: Any) -> Any:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
        torch.manual_seed(3)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    nn.init.normal_(weight, mean=1.0, std=0.2)
                if name.endswith("bias"):
                    nn.init.normal_(weight, std=0.3)
            model.lm_head.weight[2] = 0  # EOS, which is never the likeliest then
        model.save_pretrained(directory, max_shard_size=shard)
        shutil.copyfile(tokenizer_model, directory / "tokenizer.model")
        return model

    return save


def random_tokens(length: int, lanes: int = 2) -> Tensor:
    return torch.randint(320, (lanes, length), generator=torch.manual_seed(1))
