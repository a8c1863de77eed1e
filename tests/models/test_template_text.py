"""The text that a template makes, letter for letter as the original's ``Conversation.get_prompt`` makes it."""

from __future__ import annotations

from medvlm.models.template import TEMPLATES, render
from medvlm.records import Turn

TURNS = [
    Turn("user", "<image>\nWhich organ?"),
    Turn("assistant", "The lung."),
    Turn("user", "Is it normal?"),
    Turn("assistant", "No."),
]


def text(name: str, turns: list[Turn]) -> str:
    segments = render(TEMPLATES[name], turns, image="<image>", bos="<s>", eos="</s>", reserved=[])
    return "".join(segment.text for segment in segments)


def test_mistral_instruct_is_written_as_llava_med_v15_writes_it() -> None:
    # SeparatorStyle.LLAMA_2 with system "", sep "", sep2 "</s>": wrap_inst(message), then " " + message + " " + sep2.
    assert text("mistral_instruct", TURNS) == (
        "[INST] <image>\nWhich organ? [/INST] The lung. </s>[INST] Is it normal? [/INST] No. </s>"
    )
    assert text("mistral_instruct", TURNS[:1]) == "[INST] <image>\nWhich organ? [/INST]"
