"""Exported models in transformers, against our own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_prep.dataset.settings import SettingsError
from data_prep.tokenizer import tokenizer
from pretrain import trained
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import CheckpointError, step_name
from pretrain.checkpoint.runs import TrainedError
from pretrain.config.memory import MemoryConfig
from pretrain.config.model import RopeScalingConfig
from pretrain.config.run import Weights
from pretrain.convert import export, llama
from pretrain.model.transformer import Transformer
from tests.data_prep.tokenizer.conftest import LLAMA3 as SPLIT
from tests.data_prep.tokenizer.conftest import byte_level
from tests.data_prep.tokenizer.texts import SPECIAL
from tests.pretrain import kinds

CPU = torch.device("cpu")
SEGMENT = 16
YARN = RopeScalingConfig(kind="yarn", factor=4.0, high_turns=2.0, original_length=32)
LLAMA3 = RopeScalingConfig(kind="llama3", factor=8.0, original_length=32)

MODELS: dict[str, dict[str, Any]] = {
    "linear": {"memory": MemoryConfig(kind="linear")},
    "delta": {"memory": MemoryConfig(kind="delta")},
    "the paper's delta": {"memory": MemoryConfig(kind="delta", normaliser="paper")},
    "local when empty": {"memory": MemoryConfig(kind="delta", when_empty="local")},
    "embeddings of its own": {"tied_embeddings": False},
    "a head for each query": {"n_kv_heads": 4},
    "llama3 scaling": {"rope_scaling": LLAMA3, "rope_theta": 100.0},
    "linear scaling": {"rope_scaling": RopeScalingConfig(kind="linear", factor=4.0)},
    "yarn": {"rope_scaling": YARN, "rope_theta": 100.0},
    "yarn in parts of pairs": {"rope_scaling": replace(YARN, truncate=False, attention_factor=0.7)},
    "biases and norms": {"qkv_bias": True, "qk_norm": True},
}


def exported(tmp_path: Path, dtype: str = "stored", weights: Weights = "last") -> Any:
    """The run in `tmp_path`/run as transformers load what is written of it."""
    from transformers import AutoModelForCausalLM

    export.run(tmp_path / "run", tmp_path / "hub", dtype, weights)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=True).eval()


def random_tokens(length: int, lanes: int = 2) -> Tensor:
    return torch.randint(320, (lanes, length), generator=torch.manual_seed(1))


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    output = model(tokens, starts, model.initial_state(len(tokens), CPU))
    assert output.logits is not None
    return output.logits


def assert_equal_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_are_ours_whole_and_token_by_token(
    tmp_path: Path, write_run: Any, changes: dict[str, Any]
) -> None:
    ours = write_run(tmp_path / "run", **changes)
    theirs, tokens = exported(tmp_path), random_tokens(4 * SEGMENT + 5)
    expected = logits(ours, tokens)
    assert_equal_logits(theirs(tokens).logits, expected)
    assert_equal_logits(theirs(tokens, logits_to_keep=7).logits, expected[:, -7:])
    cache, found = None, []
    for part in torch.split(tokens, [SEGMENT + 3, 20, *[1] * (tokens.shape[1] - SEGMENT - 23)], 1):
        output = theirs(part, cache=cache)
        cache = output.cache
        found.append(output.logits)
    assert_equal_logits(torch.cat(found, dim=1), expected)
    # However long the text, the cache is of one segment and a memory.
    assert cache.get_seq_length() == tokens.shape[1]
    assert all(layer.keys.shape[1] == 5 for layer in cache.layers)


def test_generate_continues_as_ours_does(tmp_path: Path, write_run: Any) -> None:
    ours = write_run(tmp_path / "run")
    theirs, prompt = exported(tmp_path), random_tokens(SEGMENT + 7)
    options = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    found = theirs.generate(prompt, do_sample=False, **options)
    expected = prompt
    while expected.shape[1] < prompt.shape[1] + 30:
        likeliest = logits(ours, expected)[:, -1].argmax(dim=1, keepdim=True)
        expected = torch.cat((expected, likeliest), dim=1)
    assert torch.equal(found, expected)
    # Beams change places, and take their memories with them.
    with_cache = theirs.generate(prompt, num_beams=3, do_sample=False, **options)
    without = theirs.generate(prompt, num_beams=3, do_sample=False, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_a_loss_and_its_gradient_reach_every_weight(tmp_path: Path, write_run: Any) -> None:
    ours = write_run(tmp_path / "run")
    theirs, tokens = exported(tmp_path), random_tokens(2 * SEGMENT + 3)
    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    log_p = logits(ours, tokens)[:, :-1].log_softmax(dim=-1)
    expected = -log_p.gather(2, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert all(bool(weight.grad.any()) for weight in theirs.parameters())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "Llama"),
        ({"rope_scaling": LLAMA3}, "Llama"),
        ({"qkv_bias": True, "rope_scaling": YARN}, "Qwen2"),
        ({"qk_norm": True}, "Qwen3"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "span"), [("none", SEGMENT), ("full", 2 * SEGMENT)])
def test_without_memory_it_is_a_plain_llama_for_texts_that_attention_spans(
    tmp_path: Path,
    write_run: Any,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    span: int,
    changes: dict[str, Any],
    name: str,
) -> None:
    ours = write_run(tmp_path / "run", memory=kinds.memory(kind), rope_theta=100.0, **changes)
    theirs, tokens = exported(tmp_path), random_tokens(span)
    assert f"texts of at most {span} tokens" in capsys.readouterr().out
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    assert theirs.config.max_position_embeddings == span
    assert not (tmp_path / "hub/modeling_infini_llama.py").exists()
    with torch.no_grad():
        assert_equal_logits(theirs(tokens).logits, logits(ours, tokens))


def test_biases_with_norms_are_of_no_plain_model(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run", memory=MemoryConfig(kind="none"), qkv_bias=True, qk_norm=True)
    with pytest.raises(SettingsError, match="no model without memory that has biases and the norm"):
        export.run(tmp_path / "run", tmp_path / "hub", "stored")


BESIDE = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": json.dumps({"eos_token_id": [5, 9], "temperature": 0.6}),
}


@pytest.mark.parametrize("memory", ["delta", "none"])
def test_what_stood_beside_imported_weights_goes_out_with_them(
    tmp_path: Path, write_run: Any, memory: str
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(memory))
    (tmp_path / "run/additional_chat_templates").mkdir()
    for name, text in BESIDE.items():
        (tmp_path / "run" / name).write_text(text)
    assert trained.load(tmp_path / "run", CPU).ends == {2, 5, 9}
    theirs = exported(tmp_path)
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "hub" / name).read_text() == BESIDE[name]
    # What ended a text before does so still, and the EOS that documents had in training too.
    assert theirs.generation_config.eos_token_id == [5, 9, 2]
    assert theirs.generation_config.temperature == 0.6
    assert theirs.config.eos_token_id == [5, 9, 2] and theirs.config.bos_token_id == 1
    assert json.loads((tmp_path / "hub/generation_config.json").read_text())["bos_token_id"] == 1


@pytest.mark.parametrize("memory", ["delta", "none"])
def test_a_padding_that_is_no_token_is_not_exported(
    tmp_path: Path, write_run: Any, memory: str
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(memory))
    (tmp_path / "run/generation_config.json").write_text('{"pad_token_id": 399}')
    theirs = exported(tmp_path)  # transformers make no embedding that pads beyond its rows
    assert theirs.config.pad_token_id is None and theirs.generation_config.pad_token_id is None


def test_of_the_memory_only_its_own_settings_are_written(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run", memory=MemoryConfig(kind="linear", kernel="torch"))
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    written = json.loads((tmp_path / "hub/config.json").read_text())
    assert written["infini"]["memory"].keys() == {
        "kind", "normaliser", "initial_gate", "when_empty"
    }  # fmt: skip


@pytest.mark.parametrize("kind", sorted(kinds.KINDS.keys() - set(kinds.EXPORTED)))
def test_a_memory_that_transformers_have_no_model_of_is_refused_at_once(
    tmp_path: Path, write_run: Any, kind: str
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(kind))
    with pytest.raises(SettingsError) as caught:
        export.run(tmp_path / "run", tmp_path / "hub", "stored")
    assert caught.value.problems == [
        f"model.memory.kind: transformers have no model with the memory {kind}; a model with "
        "linear, delta, none or full can be exported"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("changes", [{}, {"memory": MemoryConfig(kind="none")},
                                     MODELS["llama3 scaling"], MODELS["yarn in parts of pairs"],
                                     MODELS["biases and norms"],
                                     {"tied_embeddings": False}], ids=str)  # fmt: skip
def test_an_export_that_is_imported_is_the_same_to_the_bit(
    tmp_path: Path, write_run: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", **changes)
    monkeypatch.setattr(export, "_PART_BYTES", 30_000)
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 2
    words = ["memory.kind=none", "segment=16"] if "memory" in changes else []
    llama.run(tmp_path / "hub", tmp_path / "again", words, None)
    before = Checkpoint(tmp_path / "run/checkpoints" / step_name(7))
    after = Checkpoint(tmp_path / "again/checkpoints" / step_name(0))
    names = {name for name in before.names() if name.endswith("/param")}
    assert names == set(after.names())
    for name in names:
        assert before.dtype(name) == after.dtype(name)
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    model = trained.load(tmp_path / "run", CPU).config.model
    assert trained.load(tmp_path / "again", CPU).config.model == model
    tokenizers = [(tmp_path / one / "tokenizer.model").read_bytes() for one in ("run", "again")]
    assert tokenizers[0] == tokenizers[1]


def test_an_export_is_imported_with_the_other_rule_without_the_settings_of_its_own(
    tmp_path: Path, write_run: Any
) -> None:
    write_run(tmp_path / "run", memory=MemoryConfig(kind="delta", normaliser="paper"))
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    llama.run(tmp_path / "hub", tmp_path / "again", ["memory.kind=linear"], None)
    memory = trained.load(tmp_path / "again", CPU).config.model.memory
    assert (memory.kind, memory.normaliser) == ("linear", "inclusive")


@pytest.mark.parametrize("kind", ["rmt", "none"])
def test_an_export_is_imported_with_its_memory_and_the_way_to_another_is_said(
    tmp_path: Path, write_run: Any, kind: str
) -> None:
    write_run(tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    with pytest.raises(SettingsError) as caught:
        llama.run(tmp_path / "hub", tmp_path / "again", [f"memory.kind={kind}"], None)
    assert caught.value.problems == [
        f"memory.kind: {kind} has no place for the model's gates; import it with linear or delta, "
        f"and set model.memory.kind={kind} in the run that has it as train.start_from"
    ]


def test_settings_without_effect_on_an_import_are_refused(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run", memory=MemoryConfig(kind="linear", normaliser="paper"))
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    llama.run(tmp_path / "hub", tmp_path / "again", [], None)
    words = ["memory.normaliser=paper", "memory.initial_gate=-4"]
    with pytest.raises(SettingsError) as caught:
        llama.run(tmp_path / "hub", tmp_path / "new", words, None)
    assert caught.value.problems == [
        "memory.normaliser: has no effect with memory.kind=linear; remove it, or set "
        "memory.kind=delta",
        "memory.initial_gate: has no effect, since the model has gates of its own; remove it",
    ]


@torch.no_grad()
def test_the_average_of_the_weights_is_exported_where_it_is_asked_for(
    tmp_path: Path, write_run: Any
) -> None:
    write_run(tmp_path / "run", averaged=True)
    theirs, tokens = exported(tmp_path, weights="ema"), random_tokens(2 * SEGMENT + 3)
    ours = trained.load(tmp_path / "run", CPU, "ema").model
    assert_equal_logits(theirs(tokens).logits, logits(ours, tokens))


def test_bf16_rounds_all_but_the_gates(tmp_path: Path, write_run: Any) -> None:
    ours = write_run(tmp_path / "run")
    theirs = exported(tmp_path, "bf16")
    weight = theirs.model.layers[1].mlp.up_proj.weight
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(weight, ours.layers[1].feed_forward.up_proj.bfloat16())
    llama.run(tmp_path / "hub", tmp_path / "again", [], None)
    with Checkpoint(tmp_path / "again/checkpoints" / step_name(0)) as checkpoint:
        gates = checkpoint.tensor("layers.1.attention.gate/param", torch.float32)
        assert torch.equal(gates, ours.layers[1].attention.gate)


def test_the_exported_directory_needs_nothing_of_ours(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    code = (tmp_path / "hub/modeling_infini_llama.py").read_text()
    assert "import pretrain" not in code and "from pretrain" not in code
    program = f"""
import sys
sys.modules["pretrain"] = sys.modules["data_prep"] = None
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hub")!r}, trust_remote_code=True)
print(model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=3, do_sample=False).shape)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "torch.Size([1, 23])" in done.stdout, done.stderr


def test_a_tokenizer_json_gives_autotokenizer_its_special_tokens(
    tmp_path: Path, write_run: Any
) -> None:
    import tokenizers
    from transformers import AutoTokenizer

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    model.train_from_iterator(["It is a truth universally acknowledged, that a man" * 9] * 3,
                              trainer)  # fmt: skip
    write_run(tmp_path / "run")
    (tmp_path / "run/tokenizer.model").unlink()
    model.save(str(tmp_path / "run/tokenizer.json"))
    with Checkpoint(tmp_path / "run/checkpoints" / step_name(7)) as checkpoint:
        rows = checkpoint.trainer["vocab_size"]
    if model.get_vocab_size() < rows:
        model.add_tokens([f"<more-{index}>" for index in range(rows - model.get_vocab_size())])
        model.save(str(tmp_path / "run/tokenizer.json"))
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub")
    ours = trained.load(tmp_path / "run", CPU).tokenizer
    assert theirs.eos_token_id == ours.eos_id is not None
    text = "It is a truth, “naïve” or not.\n"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()


def copied(directory: Path, split: str | None, **config: Any) -> Path:
    """A data set's copy of a byte-level tokenizer.json with a tokenizer_config.json beside it."""
    directory.mkdir()
    byte_level(directory / "tokenizer.json", split)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    _, data = tokenizer.standalone(directory / "tokenizer.json")
    (directory / "copy.json").write_bytes(data)
    return directory / "copy.json"


BOS, EOS, _ = SPECIAL
BEGUN: dict[str, tuple[str | None, dict[str, Any], list[int], bool]] = {
    "laid by the file": (SPLIT, {}, [400], True),
    "named beside the file": (None, {"bos_token": BOS, "eos_token": EOS}, [400], True),
    "none, though laid by the file": (SPLIT, {"bos_token": None}, [], False),
    "another one than the file lays": (SPLIT, {"bos_token": EOS}, [401], False),
    "none": (None, {"bos_token": None}, [], True),
}
"""How texts begin in training, and whether an export's tokenizer is the run's on import."""


@pytest.mark.parametrize(("split", "config", "first", "again"), BEGUN.values(), ids=BEGUN)
@pytest.mark.parametrize("memory", ["delta", "none"])
def test_an_exported_tokenizer_json_begins_a_text_as_training_did(
    tmp_path: Path, write_run: Any, memory: str, split: str | None, config: dict[str, Any],
    first: list[int], again: bool,
) -> None:  # fmt: skip
    from transformers import AutoTokenizer

    file = copied(tmp_path / "from", split, **config)
    write_run(tmp_path / "run", tokenizer=file, memory=kinds.memory(memory))
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub", trust_remote_code=False)
    ours = trained.load(tmp_path / "run", CPU).tokenizer
    assert [ours.bos_id] == (first or [None])
    # What looks like a special token is one to transformers, unless it is asked for as text.
    marked = f"x {EOS} y"
    assert 401 in theirs(marked).input_ids[len(first) :]
    split = theirs(marked, split_special_tokens=True).input_ids
    assert split == [*first, *ours.encode(marked).tolist()]
    for text in ("It is a truth, “naïve” or not.\n", "def x: it's 12", ""):
        assert theirs(text).input_ids == [*first, *ours.encode(text).tolist()]
    both = theirs("self", ".value")
    own = [[*first, *ours.encode(text).tolist()] for text in ("self", ".value")]
    assert both.input_ids == own[0] + own[1]
    # The import has the run's tokenizer, as data sets have it: runs on them may start from it.
    words = ["memory.kind=none", "segment=16"] if memory == "none" else []
    llama.run(tmp_path / "hub", tmp_path / "again", words, None)
    one, other = (tmp_path / name / "tokenizer.json" for name in ("run", "again"))
    assert tokenizer.load(other).bos_id == ours.bos_id
    assert (one.read_bytes() == other.read_bytes()) is again


def test_a_copy_without_line_ends_comes_back_from_an_export_too(
    tmp_path: Path, write_run: Any
) -> None:
    file = copied(tmp_path / "from", None, bos_token=BOS)
    file.write_text(json.dumps(json.loads(file.read_bytes()), ensure_ascii=False))
    write_run(tmp_path / "run", tokenizer=file)
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    assert (tmp_path / "hub/tokenizer.json").read_bytes() != file.read_bytes()
    llama.run(tmp_path / "hub", tmp_path / "again", [], None)
    assert (tmp_path / "again/tokenizer.json").read_bytes() == file.read_bytes()


def test_an_exported_tokenizer_json_lays_no_eos(tmp_path: Path, write_run: Any) -> None:
    import tokenizers
    from transformers import AutoTokenizer

    model = tokenizers.Tokenizer.from_file(str(copied(tmp_path / "from", None, bos_token=BOS)))
    ends = tokenizers.processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 401)])
    model.post_processor = tokenizers.processors.Sequence([ends])
    model.save(str(tmp_path / "ends.json"))
    write_run(tmp_path / "run", tokenizer=tmp_path / "ends.json")
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub", trust_remote_code=False)
    ours = trained.load(tmp_path / "run", CPU).tokenizer
    assert ours.bos_id == 400 and ours.eos_id == 401
    assert theirs("self").input_ids == [400, *ours.encode("self").tolist()]


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with pytest.raises(TrainedError, match="neither a run directory"):
        export.run(tmp_path / "hub", tmp_path / "other", "stored")


def test_what_was_not_written_as_meant_is_reported(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    export.run(tmp_path / "run", tmp_path / "hub", "stored")
    with Checkpoint(tmp_path / "run/checkpoints" / step_name(7)) as checkpoint:
        config = trained.configuration_of(checkpoint)
        source = export.Exported(checkpoint, config, 320, None, "param")
        export._verify(tmp_path / "hub", source)
        shutil.copyfile(tmp_path / "hub/model.safetensors", tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="differs from what should have been written"):
            export._verify(
                tmp_path / "hub", export.Exported(checkpoint, config, 320, "BF16", "param")
            )
    assert json.loads((tmp_path / "hub/config.json").read_text())["dtype"] == "float32"


def test_an_export_whose_checkpoint_training_deletes_says_so_and_leaves_nothing_behind(
    tmp_path: Path, write_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    old, write = tmp_path / "run/checkpoints" / step_name(7), export.stream_tensors

    def write_while_training_goes_on(path: Path, tensors: Any, read: Any, *more: Any) -> Any:
        def read_and_prune(name: str) -> Tensor:
            tensor = read(name)
            old.exists() and old.rename(old.with_name("step-00000007.000001.trash"))
            return tensor

        return write(path, tensors, read_and_prune, *more)

    monkeypatch.setattr(export, "stream_tensors", write_while_training_goes_on)
    with pytest.raises(CheckpointError, match="step-00000007: was deleted while it was read"):
        export.run(tmp_path / "run", tmp_path / "hub", "stored")
    assert not list(tmp_path.glob("hub*"))


def planted(model: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[type(model).__module__]
    if fault == "rotary embedding in the memory":
        written = module.InfiniAttention._written

        def turned(self: Any, keys: Tensor, *others: Any) -> Any:
            table = module._rotary(self.config, torch.arange(keys.shape[1])[None], keys)
            return written(self, module._turned(keys, *table), *others)

        monkeypatch.setattr(module.InfiniAttention, "_written", turned)
    elif fault == "interleaved rotary embedding":
        monkeypatch.setattr(
            module, "_turned",
            lambda x, c, s: torch.stack(
                (x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s), -1
            ).flatten(-2),
        )  # fmt: skip
    else:
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight
            layer.self_attn.k_proj.weight = nn.Parameter(
                weight.view(2, 8, -1).flip(0).flatten(0, 1)
            )


@pytest.mark.parametrize(
    "fault",
    ["rotary embedding in the memory", "interleaved rotary embedding", "key heads changed places"],
)
@torch.no_grad()
def test_parity_sees_a_planted_fault(
    tmp_path: Path, write_run: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    ours = write_run(tmp_path / "run")
    theirs, tokens = exported(tmp_path), random_tokens(3 * SEGMENT)
    expected = logits(ours, tokens)
    assert_equal_logits(theirs(tokens).logits, expected)
    planted(theirs, fault, monkeypatch)
    assert float((theirs(tokens).logits - expected).abs().max()) > 1e-3
