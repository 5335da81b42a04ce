"""Random small models of other architectures, which look like Llama, and what is said of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.dataset.settings import SettingsError
from pretrain.convert import families, llama
from tests.pretrain.convert.conftest import SHAPE

ROOT = Path(__file__).parents[3]
SMALL = {**SHAPE, "num_hidden_layers": 1, "pad_token_id": 0}

LOOK_ALIKES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", {}),
    "arcee": ("Arcee", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {}),
    "diffllama": ("DiffLlama", {}),
    "exaone4": ("Exaone4", {}),
    "gemma": ("Gemma", {"head_dim": 12}),
    "gemma2": ("Gemma2", {"head_dim": 12}),
    "glm": ("Glm", {"head_dim": 12}),
    "granite": ("Granite", {"residual_multiplier": 0.2, "logits_scaling": 3.0}),
    "helium": ("Helium", {"head_dim": 12}),
    "nemotron": ("Nemotron", {}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "seed_oss": ("SeedOss", {"head_dim": 12}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [0]}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
}
"""By model type: the name of its class, and settings with which the difference is one."""

CALLED_LLAMA = sorted(LOOK_ALIKES.keys() - {"helium"})
"""Those of which something is left if their configuration calls itself a Llama's."""


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A directory of directories, one for each model, as a hub has it."""
    import transformers

    root = tmp_path_factory.mktemp("hubs")
    for kind, (name, changes) in LOOK_ALIKES.items():
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
        torch.manual_seed(1)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(root / kind)
        shutil.copyfile(tokenizer_model, root / kind / "tokenizer.model")
    return root


def refused(hub: Path, out: Path) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        llama.run(hub, out, ["segment=64"], None)
    assert not out.exists()
    return caught.value.problems


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_what_only_looks_like_llama_is_refused_with_its_difference(
    tmp_path: Path, hubs: Path, kind: str
) -> None:
    problems = refused(hubs / kind, tmp_path / "out")
    about = families.OTHERS[kind]
    assert problems[0].startswith(f"config.json: model_type: {kind!r} is another architecture")
    assert f"({about})" in problems[0]


@pytest.mark.parametrize("kind", CALLED_LLAMA)
def test_what_calls_itself_a_llama_is_refused_by_what_else_it_says(
    tmp_path: Path, hubs: Path, kind: str
) -> None:
    hub = shutil.copytree(hubs / kind, tmp_path / "hub")
    plain = json.loads((hub / "config.json").read_text())
    called = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (hub / "config.json").write_text(json.dumps({**plain, **called}))
    assert refused(hub, tmp_path / "out")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"model_type": "qwen2", "layer_types": 5}, "layer_types: expected a list or null"),
    "no name": ({"model_type": "qwen2", "layer_types": [{}]}, "layer_types: [{}]; our layers all"),
    "several positions": ({"model_type": "qwen2", "use_mrope": True}, "use_mrope: True; our rota"),
    "no heads": ({"num_key_value_heads": -1}, "num_key_value_heads: expected at least 1, found -1"),
    "heads that do not fit": (
        {"num_key_value_heads": 3},
        "num_attention_heads: 4 query heads cannot share 3 key/value heads; choose a multiple of "
        "num_key_value_heads",
    ),
    "an odd head": ({"head_dim": 7}, "head_dim: rotary embedding needs an even number, found 7"),
    "an epsilon": ({"rms_norm_eps": "x"}, "rms_norm_eps: expected a number, found 'x'"),
    "layers without tensors": (
        {"num_hidden_layers": 10**12},
        "num_hidden_layers: 1000000000000 layers, and there are 21 tensors in all",
    ),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_by_the_name_that_config_json_has_for_it(
    tmp_path: Path, save_model: Any, changes: dict[str, Any], said: str
) -> None:
    save_model(tmp_path / "hub")
    path = tmp_path / "hub/config.json"
    plain = json.loads(path.read_text())
    plain.pop("architectures")
    path.write_text(json.dumps({**plain, **changes}))
    problems = refused(tmp_path / "hub", tmp_path / "out")
    assert any(text.removeprefix("config.json: ").startswith(said) for text in problems), problems


def test_the_table_of_families_in_the_docs_is_that_of_the_code() -> None:
    page = (ROOT / "docs/models.md").read_text()
    for kind, about in families.OTHERS.items():
        assert f"| `{kind}` | {about} |" in page, kind
    for kind in families.FAMILIES:
        assert f"`{kind}`" in page
