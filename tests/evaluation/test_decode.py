"""Decoding in batches: token for token what transformers' own generate says to one prompt at a time."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_factory import RECIPE, pictured_item, tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from medvlm.config import recipe_names
from medvlm.evaluation.answerer import Answerer
from medvlm.evaluation.decode import GreedyDecoder, common_prefix
from medvlm.evaluation.prompts import PromptStyle, prompt_orders, prompt_style
from medvlm.models.checkpoint import Checkpoint
from medvlm.models.packed import PackedLinears
from medvlm.records import Turn, VQAItem
from medvlm.training.collate import ConversationEncoder

ITEMS = [pictured_item(i, answer="yes" if i % 2 else "a lesion") for i in range(9)]


def generated(checkpoint: Checkpoint, style: PromptStyle, item: VQAItem) -> str:
    """The answer of transformers' generate to one prompt, its image encoded for it alone."""
    recipe = checkpoint.recipe
    positions = recipe.model.language_model.max_positions
    encoder = ConversationEncoder(recipe, checkpoint.tokenizer, recipe.stages[2].template, positions)
    ids = torch.tensor([encoder.prompt(style.prompt(item))])
    model: Any = checkpoint.model.eval()
    with torch.inference_mode():
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=checkpoint.processor(item.image.bytes)[None],
            max_new_tokens=recipe.decoding.max_new_tokens,
            do_sample=False,
        )
    return checkpoint.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("order", prompt_orders())
def test_every_batch_size_gives_exactly_what_one_prompt_alone_gets(order: str) -> None:
    checkpoint, style = tiny_checkpoint(), prompt_style("vqa-rad", order=order)
    alone = {item.item_id: generated(checkpoint, style, item) for item in ITEMS}
    # A random model says something, and not the same of everything: else the comparison would be empty.
    assert len(set(alone.values())) > 3
    for size in (1, 4, 64):
        subject = Answerer(checkpoint, "finetune", style=style, batch_size=size, likelihoods=size == 4)
        answers = {p.item_id: p.text for batch in subject.batches(ITEMS) for p in subject.answer(batch)}
        assert answers == alone


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("tiny-")])
def test_every_twin_answers_in_a_batch_as_alone(name: str) -> None:
    checkpoint = tiny_checkpoint(name)
    style = prompt_style("vqa-rad", order="image_first" if checkpoint.recipe.model.image_first else None)
    subject = Answerer(checkpoint, checkpoint.recipe.stages[2].name, style=style)
    answers = {p.item_id: p.text for batch in subject.batches(ITEMS) for p in subject.answer(batch)}
    assert answers == {item.item_id: generated(checkpoint, style, item) for item in ITEMS}
    assert len(set(answers.values())) > 3


@pytest.mark.parametrize("name", ["tiny-llava-med", "tiny-cliva-med-phi2"])
def test_laid_out_weights_of_every_size_change_no_token(name: str) -> None:
    checkpoint = tiny_checkpoint(name)
    style = prompt_style("vqa-rad", order="image_first" if checkpoint.recipe.model.image_first else None)
    subject = Answerer(checkpoint, checkpoint.recipe.stages[2].name, style=style)
    decoder: Any = subject._decoder
    decoder._linears = PackedLinears(smallest=1)
    answers = {p.item_id: p.text for batch in subject.batches(ITEMS) for p in subject.answer(batch)}
    assert answers == {item.item_id: generated(checkpoint, style, item) for item in ITEMS}
    layers: int = checkpoint.recipe.model.language_model.layers
    assert len(decoder._linears._packed) >= 5 * layers, "attention and feed-forward of each layer"


def test_a_sequence_that_has_ended_leaves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end mark is a token that some answers hold early: they stop there, the others go on as they did."""
    subject = Answerer(tiny_checkpoint(), "finetune")
    decoder: Any = subject._decoder
    decode, forward = decoder.decode, decoder._forward
    said: list[list[list[int]]] = []
    batch: list[int] = []

    def remember(*arguments: Any, **options: Any) -> Any:
        decoded = decode(*arguments, **options)
        said.append([one.ids for one in decoded])
        return decoded

    def watch(embeddings: Any, *rest: Any, **options: Any) -> Any:
        batch.append(len(embeddings))
        return forward(embeddings, *rest, **options)

    monkeypatch.setattr(decoder, "decode", remember)
    monkeypatch.setattr(decoder, "_forward", watch)
    subject.answer(ITEMS)
    ends = {ids[3] for ids in said[0][:7]}
    decoder._ends = torch.tensor(sorted(ends))
    batch.clear()
    subject.answer(ITEMS)
    expected = [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in said[0]]
    assert said[1] == expected and expected != said[0]
    assert batch[0] == len(ITEMS) and batch[-1] <= len(ITEMS) // 2


@pytest.mark.parametrize("order", prompt_orders())
def test_the_likelihood_of_an_option_is_that_of_the_whole_answer(order: str) -> None:
    checkpoint, style = tiny_checkpoint(), prompt_style("vqa-rad", order=order)
    subject = Answerer(checkpoint, "finetune", style=style, likelihoods=True)
    answers = {p.item_id: p for p in subject.answer(ITEMS)}
    assert all(bool(p.options) == (int(name[1:]) % 2 == 1) for name, p in answers.items())
    encoder = ConversationEncoder(RECIPE, checkpoint.tokenizer, RECIPE.stages[2].template, 512)
    item, model = ITEMS[4 + 1], checkpoint.model
    expected: list[float] = []
    for option in ("yes", "no"):
        total = torch.tensor(0.0)
        for spelling in (option, option.capitalize()):
            prompt = encoder.prompt(style.prompt(item))
            ids = encoder.encode([Turn("user", style.prompt(item)), Turn("assistant", spelling)], "x").ids
            with torch.inference_mode():
                pixels = checkpoint.processor(item.image.bytes)[None]
                forward: Any = model
                logits = forward(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].log_softmax(-1)
            places = range(len(prompt), len(ids))
            total = total + sum(logits[place - 1, ids[place]] for place in places).exp()  # type: ignore[union-attr]
        expected.append(float(total.log()))
    assert answers[item.item_id].option_logprobs == pytest.approx(expected, abs=0.02)


IMAGE = 9


@given(
    start=st.lists(st.integers(0, 3), max_size=3),
    questions=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4),
    image_first=st.booleans(),
)
def test_what_is_read_once_is_shared_and_cuts_no_image(
    start: list[int], questions: list[list[int]], image_first: bool
) -> None:
    image = [IMAGE] * 3
    prompts = [[*start, *(image + q if image_first else q + image), 7] for q in questions]
    length = common_prefix(prompts, IMAGE)
    assert all(prompt[:length] == prompts[0][:length] and length < len(prompt) for prompt in prompts)
    assert prompts[0][:length].count(IMAGE) in (0, 3)
    if image_first:
        assert length == len(start) + 3


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi", "stablelm"])
def test_left_padding_changes_no_token_of_any_decoder(architecture: str) -> None:
    """Prompts of unequal length in one batch, against transformers' generate with each alone."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    make_config: Any = CONFIG_MAPPING[architecture]
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if architecture != "phi" else 4}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    config = make_config(**sizes, **heads, **marks, max_position_embeddings=128)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        decoder: Any = AutoModelForCausalLM.from_config(config).eval()
    draws = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 97, (length,), generator=draws).tolist() for length in (3, 17, 9, 4, 12)]
    model: Any = SimpleNamespace(
        model=SimpleNamespace(language_model=decoder.model),
        lm_head=decoder.lm_head,
        get_input_embeddings=decoder.get_input_embeddings,
        config=SimpleNamespace(image_token_id=-1, get_text_config=lambda: config),
        device=torch.device("cpu"),
    )
    subject = GreedyDecoder(model, pad_id=0, end_ids=[2], max_new_tokens=12, prefixes_kept=4)
    alone: list[list[int]] = []
    for ids in prompts:
        given = torch.tensor([ids])
        with torch.inference_mode():
            answer = decoder.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False)
        alone.append([token for token in answer[0, len(ids) :].tolist() if token != 2])
    monkey: Any = subject
    monkey._embed = lambda ids_BL, features: decoder.get_input_embeddings()(ids_BL)
    together = subject.decode(prompts, [""] * len(prompts), lambda names: torch.zeros(len(names), 1, 64))
    assert [one.ids for one in together] == alone
    assert len({tuple(ids) for ids in alone}) > 3
