"""What begins and ends a text: the ids of a tokenizer, in words."""

from __future__ import annotations

from data_prep.tokenizer.contract import Tokenizer

# Tokens with which chat models end a turn, and those with which texts end.
_TURNS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|eom_id|>", "<end_of_turn>", "<|end_of_turn|>"),
    *("<|end|>", "<|return|>", "<|endofturn|>", "<|turn_end|>", "<turn|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|user|>", "[/INST]"),
)
_ENDS = (
    *("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<EOS_TOKEN>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def lines(model: Tokenizer) -> list[str]:
    """BOS and EOS with their text; the setting that chooses another EOS than a chat model's."""
    ids = {"BOS": model.bos_id, "EOS": model.eos_id}
    found = [
        f"no {role}" if id is None else f"{role} is {id} {model.name(id)}"
        for role, id in ids.items()
    ]
    if model.eos_id is None or model.name(model.eos_id) not in _TURNS:
        return [", ".join(found)]
    special = (model.name(id) for id, piece in enumerate(model.pieces) if not piece)
    ends = [name for name in special if name in _ENDS]
    choice = " or ".join(f"tokenizer.eos_token='{name}'" for name in ends)
    choice = choice or "tokenizer.eos_token=TOKEN"
    return [
        ", ".join(found),
        f"this EOS is a chat model's end of turn; {choice} ends documents with another token",
    ]
