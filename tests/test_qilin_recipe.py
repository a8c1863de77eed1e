"""Qilin-Med-VL as published, and the Chinese chat format that is there beside it."""

from __future__ import annotations

from medvlm.config import load_recipe
from medvlm.models.template import TEMPLATES, fixed_phrases, render
from medvlm.records import Turn


def test_published_hyper_parameters_of_qilin_med_vl() -> None:
    recipe = load_recipe("qilin-med-vl")
    model = recipe.model
    assert (model.vision_tower.weights, model.vision_tower.image_px) == ("openai/clip-vit-large-patch14-336", 336)
    assert (model.vision_tower.patches, model.vision_tower.feature_layer, model.vision_tower.image_fit) == (
        576,
        -2,
        "pad",
    )
    assert (model.projector.kind, model.mm_use_im_start_end) == ("mlp2x_gelu", False)
    assert model.language_model.weights == "FlagAlpha/Llama2-Chinese-13b-Chat"
    align, instruct, finetune = recipe.stages
    assert (align.template, align.learning_rate, align.micro_batch, align.zero_stage) == ("plain", 1e-3, 32, 2)
    assert (instruct.template, instruct.learning_rate, instruct.micro_batch) == ("vicuna_v1", 2e-5, 16)
    assert {stage.warmup_ratio for stage in recipe.stages} == {0.03}
    assert (align.epochs, instruct.epochs, instruct.zero_stage) == (1, 1, 3)
    assert (recipe.language, recipe.benchmarks, finetune.targets) == ("zh", ("slake-zh",), "each")


def test_the_chinese_chat_format_of_the_base_model() -> None:
    turns = (
        Turn("user", "<image>\n图中有病变吗?"),
        Turn("assistant", "有"),
        Turn("user", "在哪一侧?"),
        Turn("assistant", "左侧"),
    )
    template = TEMPLATES["llama2_chinese"]
    segments = render(template, turns, image="<image>", bos="<s>", eos="</s>", reserved=["<s>", "</s>"])
    assert "<s>" + "".join(segment.text for segment in segments) == (
        "<s>Human: <image>\n图中有病变吗?\n</s><s>Assistant: 有\n</s><s>Human: 在哪一侧?\n</s><s>Assistant: 左侧\n</s>"
    )
    assert [segment.text for segment in segments if segment.learned] == [" 有\n</s>", " 左侧\n</s>"]
    assert fixed_phrases(template) == ["Assistant:", "Human:"]


def test_the_published_frame_stands_around_chinese_turns() -> None:
    recipe = load_recipe("tiny-qilin-med-vl")
    assert recipe.stages[1].template == recipe.stages[2].template == "vicuna_v1"
    assert recipe.stages[0].template == "plain"
    anew = load_recipe(recipe.name, ["stages.instruct.template=llama2_chinese"])
    assert anew.stages[1].template == "llama2_chinese"
