"""Conversation templates as data: what stands around each turn, and which text carries the loss."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from medvlm.recipe_schema import TemplateName
from medvlm.records import Turn

__all__ = ["IMAGE_MARK", "TEMPLATES", "Segment", "Template", "fixed_phrases", "render"]

IMAGE_MARK = "<image>"
"""Stands for an image in the text of a turn."""

_ASSISTANT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# SQ-LLaVA's words, kept as published: its weights were trained with them.
_SELF_QUESTIONING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex questions "
    "that are relevant to the content in the image, for example, asking about background knowledge of the objects in "
    "the image, asking to discuss about events happening in the image, etc. Again, do not ask about uncertain details."
)
_USER_ASSISTANT = _ASSISTANT.replace("human", "user")
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, slots=True)
class Template:
    """The text around turns. ``{text}`` is a turn's, ``{eos}`` and ``{bos}`` the tokenizer's marks."""

    first: str
    """Around the first user turn: the system prompt is part of it."""
    user: str
    """Around every later user turn."""
    assistant: str
    """Around an assistant turn. All of it carries loss: the answer, and that it ends."""
    asks: str = ""
    """The role under which the model asks a question itself; empty where it never does."""
    asked: str = ""
    """Around a question that the model asks. All of it carries loss."""
    then: str = ""
    """What follows such a question, up to the answer."""


TEMPLATES: dict[TemplateName, Template] = {
    # LLaVA's stage 1: no question at all, the caption follows the image.
    "plain": Template(first=IMAGE_MARK, user="", assistant="{text}\n"),
    # LLaVA conv_vicuna_v1: separators " " and "</s>".
    "vicuna_v1": Template(
        first=f"{_ASSISTANT} USER: {{text}} ASSISTANT:", user="USER: {text} ASSISTANT:", assistant=" {text}{eos}"
    ),
    # SQ-LLaVA conv_vicuna_v1_sq: a third role asks. The answer to its question is the assistant's.
    "vicuna_v1_sq": Template(
        first=f"{_SELF_QUESTIONING} USER: {{text}} ASSISTANT:",
        user="USER: {text} ASSISTANT:",
        assistant=" {text}{eos}",
        asks="VUSER:",
        asked=" {text}{eos}",
        then=" ASSISTANT:",
    ),
    # conv_mistral_instruct of LLaVA-Med v1.5: written by Llama 2's code (a blank on each side of the answer), with
    # neither system prompt nor a begin mark between turns. Mistral's own chat template has no blank before the end.
    "mistral_instruct": Template(
        first="[INST] {text} [/INST]", user="[INST] {text} [/INST]", assistant=" {text} {eos}"
    ),
    # LLaVA conv_llava_llama_2.
    "llama_2": Template(
        first=f"[INST] <<SYS>>\n{_LLAMA_2}\n<</SYS>>\n\n{{text}} [/INST]",
        user="{bos}[INST] {text} [/INST]",
        assistant=" {text} {eos}",
    ),
    # FlagAlpha's Llama2-Chinese chat models: each turn begins and ends with the tokenizer's marks.
    "llama2_chinese": Template(
        first="Human: {text}\n{eos}{bos}Assistant:",
        user="{bos}Human: {text}\n{eos}{bos}Assistant:",
        assistant=" {text}\n{eos}",
    ),
    # Med-MoE's conv_phi and conv_stablelm, which are one: separators " " and "<|endoftext|>", the tokenizer's end mark.
    "phi": Template(
        first=f"{_USER_ASSISTANT} USER: {{text}} ASSISTANT:", user="USER: {text} ASSISTANT:", assistant=" {text}{eos}"
    ),
    # SmolLM2-Instruct and others, without a system prompt.
    "chatml": Template(
        first="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        user="\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{text}{eos}",
    ),
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text."""

    text: str
    learned: bool
    """Whether its tokens carry loss."""


def render(
    template: Template,
    turns: Sequence[Turn],
    *,
    image: str,
    bos: str,
    eos: str,
    reserved: Sequence[str],
    asked: Collection[int] = (),
) -> list[Segment]:
    """Turns as text with the template around them.

    Args:
        template: Gives what stands around each turn.
        turns: User and assistant in turn, user first. A last user turn without answer makes a prompt.
        image: What ``<image>`` becomes, such as ``<im_start><image><im_end>``.
        bos: The tokenizer's begin mark, or empty.
        eos: The tokenizer's end mark.
        reserved: Marks that a turn's own text cannot use: they are taken apart by a blank, so that
            a foreign text can neither end a turn nor bring in an image.
        asked: Indices of user turns, never the first, that the model asks itself.
    """
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            text = _defused(turn.text, reserved)
            segments.append(Segment(_filled(template.assistant, text, bos, eos), learned=True))
            continue
        if index in asked:
            text = _defused(turn.text, reserved)
            segments.append(Segment(template.asks, learned=False))
            segments.append(Segment(_filled(template.asked, text, bos, eos), learned=True))
            segments.append(Segment(template.then, learned=False))
            continue
        around = template.user if index else template.first
        parts = [_defused(part, reserved) for part in turn.text.split(IMAGE_MARK)]
        filled = _filled(around.replace(IMAGE_MARK, image), image.join(parts), bos, eos)
        segments.append(Segment(filled, learned=False))
    return segments


def _filled(around: str, text: str, bos: str, eos: str) -> str:
    return around.replace("{bos}", bos).replace("{eos}", eos).replace("{text}", text)


def _defused(text: str, reserved: Sequence[str]) -> str:
    for mark in reserved:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def fixed_phrases(template: Template) -> list[str]:
    """The texts that a template repeats in every sample, longest first, without the blank before a turn's text."""
    phrases = {
        part.removesuffix(" ")
        for around in (template.first, template.user, template.asks, template.then)
        for part in re.split(r"\{text\}|\{bos\}|\{eos\}", around)
    }
    return sorted((p for p in phrases if p.strip() and p != IMAGE_MARK), key=lambda p: (-len(p), p))
