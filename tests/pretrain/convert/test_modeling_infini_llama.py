"""The exported model as transformers' own causal models are used."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.convert import export
from pretrain.convert.modeling_infini_llama import InfiniLlamaConfig, InfiniLlamaForCausalLM

SEGMENT = 5
LENGTHS = (13, 4, 11, 7)
MEMORIES: dict[str, dict[str, str]] = {
    "delta": {},
    "the paper's delta": {"normaliser": "paper"},
    "local when empty": {"when_empty": "local"},
    "linear": {"kind": "linear"},
}
of_every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
on_each_side = pytest.mark.parametrize("side", ["left", "right"])


def random_model(
    memory: Mapping[str, str] | None = None, segment: int = SEGMENT, std: float = 0.3
) -> InfiniLlamaForCausalLM:
    """Two layers, and gates that are not all 0."""
    settings = {"kind": "delta", "normaliser": "inclusive", "when_empty": "zero", **(memory or {})}
    torch.manual_seed(0)
    config = InfiniLlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=std,
        infini={"segment": segment, "memory": settings},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: InfiniLlamaForCausalLM = InfiniLlamaForCausalLM(config).eval()
    with torch.no_grad():
        layers: Any = model.model.layers
        for layer in layers:
            layer.self_attn.gate.normal_()
            layer.self_attn.q_proj.weight *= 2
    return model


def random_texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 99, (length,), generator=generator) for length in LENGTHS]


def padded(texts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [texts, the longest]."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, True, 0, side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], True, 0, side)
    return ids, mask


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, write_run: Any) -> Path:
    """An exported run with segments of 16 tokens; no test writes into it."""
    directory = tmp_path_factory.mktemp("exported")
    write_run(directory / "run")
    export.run(directory / "run", directory / "hub", "stored")
    return directory / "hub"


def loaded(hub: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hub, trust_remote_code=True, **options).eval()


def tokenizer_of(hub: Path) -> Any:
    from transformers import AutoTokenizer

    # Without an answer about the model's code transformers would ask for one.
    return AutoTokenizer.from_pretrained(hub, trust_remote_code=False)


@of_every_memory
@on_each_side
@torch.no_grad()
def test_a_text_in_a_batch_is_computed_as_alone(memory: dict[str, str], side: str) -> None:
    model, texts = random_model(memory), random_texts()
    ids, mask = padded(texts, side)
    cache: Any = None
    parts = []
    for first, end in ((0, 3), (3, 9), (9, 10), (10, 13)):
        output = model(ids[:, first:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    whole = model(ids, attention_mask=mask)
    for row, text in enumerate(texts):
        alone = model(text[None])
        for found in (whole.logits, torch.cat(parts, dim=1)):
            torch.testing.assert_close(
                found[row][mask[row] == 1], alone.logits[0], rtol=0, atol=5e-5
            )
        for layers in (whole.cache.layers, cache.layers):
            for layer, own in zip(layers, alone.cache.layers, strict=True):
                kept = len(text) % SEGMENT
                torch.testing.assert_close(
                    layer.keys[row, :kept], own.keys[0], rtol=1e-4, atol=1e-4
                )
                if own.matrix is None:
                    assert not layer.matrix[row].any()
                else:
                    torch.testing.assert_close(
                        layer.matrix[row], own.matrix[0], rtol=1e-4, atol=1e-4
                    )
        assert whole.cache.seen[row] == cache.seen[row] == len(text)
    assert cache.get_seq_length() == 13


@on_each_side
def test_padded_texts_go_on_as_alone(side: str) -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, side)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(without[:, ids.shape[1] :], found)
    beams = {"num_beams": 3, "num_return_sequences": 2, **options}
    by_beams = model.generate(ids, attention_mask=mask, **beams)[:, ids.shape[1] :]
    for row, text in enumerate(texts):
        assert torch.equal(found[row], model.generate(text[None], **options)[0, len(text) :])
        alone = model.generate(text[None], **beams)[:, len(text) :]
        assert torch.equal(by_beams[2 * row : 2 * row + 2], alone)


@on_each_side
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_text_that_is_to_be_read_in_chunks_goes_on_the_same(side: str, size: int) -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, side)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    chunked = {"prefill_chunk_size": size, **options}
    assert torch.equal(model.generate(ids, attention_mask=mask, **chunked), expected)
    beams = {"num_beams": 3, **options}
    expected = model.generate(ids, attention_mask=mask, **beams)
    found = model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **beams)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("side", [None, "left"])
def test_a_text_goes_on_from_a_cache_that_holds_only_its_beginning(side: str | None) -> None:
    """transformers would read a text again of which a cache holds all, and of new tokens alone
    only those behind as many as the cache holds."""
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts if side else texts[:1], side or "left")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)

    def begun(length: int) -> Any:
        return model(ids[:, :length], attention_mask=mask[:, :length], use_cache=True).cache

    for kept in (1, 5, 12):
        whole = model.generate(ids, attention_mask=mask, cache=begun(kept), **options)
        assert torch.equal(whole, expected)
        rest = model.generate(ids[:, kept:], attention_mask=mask, cache=begun(kept), **options)
        assert torch.equal(rest, expected[:, kept:])
    for held, first in ((13, 0), (13, 8), (7, 7), (7, 9)):
        given = {"attention_mask": mask[:, first:], "cache": begun(held)}
        with pytest.raises(ValueError, match=f"cache: holds {held} tokens, and {13 - first} are"):
            model.generate(ids[:, first:], **given, **options)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="cache: holds 13 tokens, and 13 are given of a text of 1"):
        model.generate(inputs_embeds=embeddings, attention_mask=mask, cache=begun(13), **options)


@torch.no_grad()
def test_positions_that_begin_again_begin_another_text() -> None:
    model, texts = random_model(), random_texts()
    row = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    found = model(row, position_ids=positions)
    expected = torch.cat([model(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(found.logits[0], expected, rtol=0, atol=5e-5)
    assert found.cache is None
    # Where a text's positions begin makes no difference.
    moved = model(texts[0][None], position_ids=torch.arange(len(texts[0]))[None] + 70)
    torch.testing.assert_close(moved.logits[0], expected[: len(texts[0])], rtol=0, atol=5e-5)
    cache = model(row[:, :3]).cache
    for wrong, kept in (positions, cache), (positions * 2, None):
        with pytest.raises(ValueError, match="position_ids: expected positions that count on by"):
            model(row, position_ids=wrong, cache=kept)


@torch.no_grad()
def test_embeddings_stand_for_their_tokens() -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, "left")
    vectors = model.get_input_embeddings()(ids)
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(inputs_embeds=vectors, attention_mask=mask).logits, expected)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(inputs_embeds=vectors, **options)
    assert torch.equal(found, model.generate(ids, **options)[:, ids.shape[1] :])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds, one of the two"):
        model(ids, inputs_embeds=vectors)


@torch.no_grad()
def test_hidden_states_are_those_between_the_layers() -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, "left")
    output = model(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1)
    embedded, between, last = output.hidden_states
    assert torch.equal(embedded[mask == 1], model.get_input_embeddings()(ids)[mask == 1])
    assert torch.equal(model.lm_head(last[:, -1:]), output.logits)
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_hook(lambda *given: seen.append(given[2][0]))
    model(texts[1][None])
    hook.remove()
    torch.testing.assert_close(between[1, -len(texts[1]) :], seen[0][0])
    chosen = model(ids, attention_mask=mask, output_hidden_states=[-2]).hidden_states
    assert chosen[0] is chosen[2] is None
    assert torch.equal(chosen[1], between)


@torch.no_grad()
def test_attentions_are_the_local_ones_at_the_tokens_that_they_are_of() -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, "left")
    output = model(ids, attention_mask=mask, output_attentions=True)
    assert [tuple(one.shape) for one in output.attentions] == [(4, 4, 13, 13)] * 2
    for row, text in enumerate(texts):
        pad = 13 - len(text)
        own = output.attentions[1][row, :, pad:]
        torch.testing.assert_close(own.sum(-1), torch.ones_like(own[..., 0]))
        places = torch.arange(13) - pad
        number = torch.arange(len(text))[:, None]
        reached = (places <= number) & (places >= number // SEGMENT * SEGMENT)
        assert torch.equal(own > 0, reached.expand_as(own))
    cache = model(ids[:, :12], attention_mask=mask[:, :12]).cache
    step = model(ids[:, 12:], attention_mask=mask, cache=cache, output_attentions=True)
    torch.testing.assert_close(step.attentions[1], output.attentions[1][:, :, 12:])
    model.set_attn_implementation("eager")
    eager = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(eager, output.logits, rtol=0, atol=5e-5)


@torch.no_grad()
@of_every_memory
def test_the_memory_under_autocast_is_that_without_within_a_thousandth(
    memory: dict[str, str],
) -> None:
    # 60 segments: sums in bfloat16 stand still at 256.
    model, text = random_model(memory, std=0.02), torch.randint(3, 99, (1, 300))
    plain = model(text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(text)
    for layer, expected in zip(found.cache.layers, plain.cache.layers, strict=True):
        assert layer.matrix.dtype == layer.normaliser.dtype == torch.float32
        assert layer.keys.dtype == torch.bfloat16
        scale = float(expected.normaliser.max())
        torch.testing.assert_close(layer.normaliser, expected.normaliser, rtol=0, atol=1e-3 * scale)


@torch.no_grad()
def test_autocast_rounds_what_the_memory_is_given_and_nothing_else() -> None:
    model, text = random_model(MEMORIES["linear"]), torch.randint(3, 99, (1, 300))
    attention: Any = model.model.layers[1].self_attn
    given: list[list[Tensor]] = [[], []]
    for projection, parts in zip((attention.k_proj, attention.v_proj), given, strict=True):
        projection.register_forward_hook(
            lambda module, args, output, parts=parts: parts.append(output)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = model(text).cache.layers[1]
    keys, values = (torch.cat(parts, dim=1).double().unflatten(2, (2, 8)) for parts in given)
    features = torch.where(keys > 0, keys + 1, keys.exp())
    matrix = torch.einsum("bnkd,bnke->bkde", features, values)
    torch.testing.assert_close(layer.matrix.double(), matrix, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.normaliser.double(), features.sum(1), rtol=1e-5, atol=1e-4)


def test_losses_of_parts_of_a_batch_add_up_to_that_of_the_whole() -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, "right")
    labels = ids.masked_fill(mask == 0, -100)
    count = sum(LENGTHS) - len(LENGTHS)
    whole = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
    parts = [
        model(text[None], labels=text[None], num_items_in_batch=count).loss for text in texts
    ]  # fmt: skip
    torch.testing.assert_close(whole, torch.stack(parts).sum())
    torch.testing.assert_close(whole, model(ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients_also_through_the_memory(reentrant: bool) -> None:
    model, texts = random_model(), random_texts()
    ids, mask = padded(texts, "left")
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        assert checkpointed == (output.cache is None)
        found.append(
            [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        )
    assert len(found[0]) == len(list(model.parameters()))
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_what_has_no_meaning_is_refused() -> None:
    from transformers import DynamicCache

    dynamic = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_parameters: rope_type 'dynamic', expected one of"):
        InfiniLlamaForCausalLM(InfiniLlamaConfig(rope_parameters=dynamic))
    model, text = random_model(), random_texts()[0][None]
    with pytest.raises(ValueError, match="cache: is a DynamicCache, expected what an earlier call"):
        model(text, cache=DynamicCache())
    with pytest.raises(ValueError, match="cache: holds 1 texts, expected 2"):
        model(text.repeat(2, 1), cache=model(text).cache)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[1, 13 or more\]"):
        model(text, attention_mask=torch.ones(1, 1, 13, 13))
    with pytest.raises(ValueError, match="attention_mask: has numbers besides 1"):
        model(text, attention_mask=torch.tensor([[1] * 6 + [2] * 7]))
    with pytest.raises(ValueError, match="input_ids: hold no token"):
        model(text[:, :0])


@pytest.mark.parametrize("said", ["cu_seq_lens_q", "seq_idx"])
@torch.no_grad()
def test_texts_in_a_row_that_only_other_kernels_would_divide_are_refused(said: str) -> None:
    """As of collators for flash attention, of which a memory would mix the texts."""
    model, texts = random_model(), random_texts()[:2]
    row = torch.cat(texts)[None]
    first, second = len(texts[0]), len(texts[1])
    told = {
        "cu_seq_lens_q": torch.tensor([0, first, first + second]),
        "seq_idx": torch.tensor([[0] * first + [1] * second]),
    }[said]
    with pytest.raises(ValueError, match=f"{said}: .* expected position_ids that begin again at 0"):
        model(row, **{said: told})
    places = torch.cat([torch.arange(first), torch.arange(second)])[None]
    found = model(row, position_ids=places, **{said: told}).logits[0, first:]
    torch.testing.assert_close(found, model(texts[1][None]).logits[0], rtol=0, atol=5e-5)


def test_gates_stay_precise_and_a_saved_model_is_the_same(hub: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    half = loaded(hub, dtype=torch.bfloat16)
    assert {layer.self_attn.gate.dtype for layer in half.model.layers} == {torch.float32}
    assert half.dtype == half.lm_head.weight.dtype == torch.bfloat16
    model, ids = loaded(hub), torch.arange(3, 40)[None]
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    assert torch.equal(loaded(tmp_path)(ids).logits, expected)
    base = AutoModel.from_pretrained(hub, trust_remote_code=True).eval()
    assert torch.equal(model.lm_head(base(ids).last_hidden_state), expected)


def test_the_tokenizer_lays_bos_where_training_did(hub: Path, capsys: Any) -> None:
    from pretrain import trained

    ours = trained.load(hub.parent / "run", torch.device("cpu")).tokenizer
    tokenizer = tokenizer_of(hub)
    assert "Do you wish to run" not in capsys.readouterr().out
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in ("abc", " two  spaces ", "naïve “quotes”\n\nlines\t", "中文"):
        assert tokenizer(text).input_ids == [ours.bos_id, *ours.encode(text).tolist()]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_generate_stops_at_strings_and_pipelines_take_batches(hub: Path) -> None:
    from transformers import pipeline

    model, tokenizer = loaded(hub), tokenizer_of(hub)
    prompts = ["It is", "a truth universally acknowledged, that a single man", "in", "of a good"]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    inputs = tokenizer(prompts[0], return_tensors="pt")
    whole = model.generate(**inputs, **options)
    pieces = [tokenizer.decode(one) for one in whole[0, inputs.input_ids.shape[1] + 5 :]]
    stop = next(piece for piece in pieces if piece.strip() and "\ufffd" not in piece)
    options["min_new_tokens"] = 1
    short = model.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert stop in tokenizer.decode(short[0, -1:])
    assert torch.equal(short[0], whole[0, : short.shape[1]])
    options["min_new_tokens"] = 24
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    found = [one[0]["generated_text"] for one in generator(prompts, batch_size=4, **options)]
    assert found == alone


def test_the_harness_scores_texts_of_a_batch_as_alone(hub: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's models of transformers need accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("It is", " a truth universally acknowledged"), ("a good fortune must be", " in"),
             ("want of a wife", " however little known the feelings"), ("a", " b")]  # fmt: skip
    found = []
    for batch in (1, 4):
        tested = HFLM(loaded(hub), tokenizer=tokenizer_of(hub), batch_size=batch, device="cpu")
        asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        scores = [score for score, _ in tested.loglikelihood(asked, disable_tqdm=True)]
        options = {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False}
        until = [
            Instance("generate_until", {}, (context, dict(options)), index)
            for index, (context, _) in enumerate(pairs)
        ]
        found.append((scores, tested.generate_until(until, disable_tqdm=True)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-4)
    assert found[1][1] == found[0][1]


def trained_losses(model: Any, directory: Path, batch: int) -> list[float]:
    """Losses of two steps of Trainer over texts with 250, 10, 120 and 4 labels."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(3)
    rows = []
    for labels in (250, 10, 120, 4) * 2:
        ids = torch.randint(3, 99, (260,), generator=generator)
        wanted = ids.masked_fill(torch.arange(260) >= labels, -100)
        rows.append({"input_ids": ids, "labels": wanted})
    arguments = TrainingArguments(
        str(directory), max_steps=2, per_device_train_batch_size=batch, logging_steps=1,
        gradient_accumulation_steps=4 // batch, report_to="none", use_cpu=True,
        save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer._get_train_sampler = lambda *_: None  # in order
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_gives_one_loss_however_a_batch_is_divided(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = random_model(segment=65)
    whole = trained_losses(copy.deepcopy(model), tmp_path, 4)
    parts = trained_losses(copy.deepcopy(model), tmp_path, 1)
    assert len(whole) == 2
    assert whole == pytest.approx(parts, abs=1e-4)


def test_adapters_train_as_on_a_llama(hub: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model, ids = loaded(hub), torch.arange(3, 43)[None]
    expected = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, config)
    output = adapted(input_ids=ids, labels=ids)
    assert torch.equal(output.logits.detach(), expected)
    output.loss.backward()
    trained = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert len(trained) == 2 * 2 * 2 and all("lora" in name for name in trained)


def test_sft_trainer_takes_it_as_a_llama(hub: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="supervised fine-tuning needs trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "It is a truth " * (3 + n)} for n in range(4)])
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        loaded(hub), args=arguments, train_dataset=rows, processing_class=tokenizer_of(hub)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] == losses[1]


def test_the_configuration_names_the_code_of_each_class(hub: Path) -> None:
    config = json.loads((hub / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
