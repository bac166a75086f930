"""What is loaded as a base model, what is refused before any weight is read, and what is told of it beforehand."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_families import FAMILIES
from typer.testing import CliRunner

from four_bits import save_four_bits
from langchain_lora_retriever.cli import commands
from langchain_lora_retriever.engine import EngineWorker, load_base_model
from langchain_lora_retriever.engine.config import EngineConfig
from langchain_lora_retriever.engine.model import outlook as outlook_module
from langchain_lora_retriever.engine.model import quantisation
from langchain_lora_retriever.engine.model.load import read_config, tell_if_too_small
from langchain_lora_retriever.engine.model.outlook import look_ahead
from langchain_lora_retriever.errors import EngineError, MissingDependencyError
from langchain_lora_retriever.types import SamplingParams
from makers import make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

FAMILY = {family.title: family for family in FAMILIES}
REMOTE = {"model_type": "another", "auto_map": {"AutoConfig": "code.AnotherConfig", "AutoModelForCausalLM": "code.A"}}
SMALL = EngineConfig(max_num_seqs=2, kv_cache_bytes=1 << 20, lora_cache_bytes=1 << 20)


def save(folder: Path, title: str) -> Path:
    """A tiny model of a family, with the byte tokenizer."""
    family = FAMILY[title]
    make_tiny_model(family.model_type, **family.settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with a configuration and nothing else."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "encoder-decoder model"),
        ({"model_type": "bart"}, "encoder-decoder model"),
        ({"model_type": "vit"}, "no model that generates text"),
        (REMOTE, "Python code of its own.*trust_remote_code"),
        ({"model_type": "nobody_knows"}, "cannot be loaded"),
    ],
    ids=["t5", "bart", "vision alone", "remote code", "unknown"],
)
def test_what_is_no_base_model_is_refused_before_it_is_loaded(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """By its configuration: there are no weights in the folder, and no code is run."""
    (tmp_path / "code.py").write_text("raise SystemExit('this was run')")
    write_config(tmp_path, config)
    with pytest.raises(EngineError, match=words):
        load_base_model(tmp_path)
    if "bart" not in config["model_type"] and "t5" not in config["model_type"] and "vit" not in config["model_type"]:
        with pytest.raises(EngineError, match=words):
            look_ahead(tmp_path)


@pytest.mark.parametrize("title", ["Gemma 3 (4B and larger), text only", "Qwen3-VL, text only"])
def test_the_text_decoder_of_a_model_of_images_is_served_from_its_folder(title: str, tmp_path: Path) -> None:
    """It is found though transformers has it among the models that answer images."""
    base = load_base_model(save(tmp_path, title))
    with EngineWorker(base, SMALL) as worker:
        assert not [name for name in worker.module_shapes if "visual" in name or "vision" in name]
        answer = worker.submit([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True)).result(60)
        assert len(answer.token_ids) == 4


def test_a_tokenizer_of_another_vocabulary_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where it knows tokens that the model lacks."""
    load_base_model((make_tiny_model("llama", vocab_size=128), make_tokenizer()))
    assert "knows 259 tokens and the model 128" in caplog.text


def test_a_context_shorter_than_an_answer_may_be_ends_the_answer(tmp_path: Path) -> None:
    """256 tokens are asked for; prompt and answer together get what there is."""
    base = load_base_model((make_tiny_model("llama", max_position_embeddings=32), make_tokenizer()))
    with EngineWorker(base, SMALL) as worker:
        answer = worker.submit(list(range(5, 25)), SamplingParams(max_tokens=256, ignore_eos=True)).result(60)
        assert (len(answer.token_ids), answer.finish_reason) == (12, "length")


def test_what_fits_is_reckoned_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests and adapters beside the weights; none where the weights alone are too large."""
    make_tiny_model("llama").config.save_pretrained(tmp_path)
    told = look_ahead(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = type("Memory", (), {"total": 1 << 30, "available": 1 << 30})
    monkeypatch.setattr(outlook_module.psutil, "virtual_memory", lambda: memory)
    config = EngineConfig(lora_cache_bytes=1 << 20)
    fit = told.fit(config)
    assert fit.num_adapters == (1 << 20) // (16 * told.rank_bytes)
    assert fit.num_requests == ((1 << 30) - told.weight_bytes - (1 << 20)) // (2048 * told.token_bytes)
    memory.available = told.weight_bytes - 1
    assert told.fit(config)[2:] == (-1, 0, 0)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packages_that_read_quantised_weights_are_asked_for(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are missing, at once, before anything is read; what the weights take is told without them."""
    nothing_found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr(quantisation, "importlib", nothing_found)
    save_four_bits(make_tiny_model("llama"), tmp_path, method)
    make_tokenizer().save_pretrained(tmp_path)
    wanted = {"gptq": "gptqmodel optimum", "awq": "gptqmodel"}[method]
    with pytest.raises(MissingDependencyError, match=rf"pip install {wanted}\. .*C compiler"):
        load_base_model(tmp_path)
    told = look_ahead(tmp_path)
    assert (told.quantisation, told.missing_packages) == (method, tuple(wanted.split()))
    done = CliRunner().invoke(commands, ["check-model", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert f"{wanted.replace(' ', ', ')}, by which these weights are read" in " ".join(done.output.split())


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(4, 128, 4.15625), (8, 32, 8.75), (4, -1, 4.0)])
def test_weights_in_groups_take_what_their_configuration_says(bits: int, group_size: int, expected: float) -> None:
    """A scale and a zero point for each group of them; one for a whole row is next to nothing."""
    config = make_tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
    assert quantisation.bits_per_weight(config, quantisation.quantisation_of(config, {})) == expected
    assert quantisation.bits_per_weight(config, "bitsandbytes") == 4.5
    assert quantisation.bits_per_weight(config, None) is None


def test_the_command_tells_it_and_tries_it(tmp_path: Path) -> None:
    """As a table, as JSON, and with an answer of the model itself."""
    folder = save(tmp_path / "model", "Qwen 3")
    done = CliRunner().invoke(commands, ["check-model", str(folder)])
    assert done.exit_code == 0, done.output
    assert "Qwen3ForCausalLM (qwen3)" in done.output
    done = CliRunner().invoke(commands, ["check-model", str(folder), "--json", "--run"])
    found = json.loads(done.stdout)
    assert found["targets"]["q_proj"] == 2
    assert found["run"]["backend"] == "torch"
    done = CliRunner().invoke(commands, ["check-model", str(write_config(tmp_path, {"model_type": "t5"}))])
    assert done.exit_code == 1
    assert "encoder-decoder" in " ".join(done.output.split())


def test_a_gpu_that_is_too_small_is_told_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what would fit; then it is loaded all the same, as accelerate can."""
    folder = save(tmp_path, "Llama 2")
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (100_000, 200_000))
    load_base_model(folder, device_map="cpu", dtype=torch.float32)
    assert "GPU" not in caplog.text, "it was not asked to go there"
    config = read_config(str(folder))
    tell_if_too_small(config, str(folder), dtype=torch.float32)
    assert "does not fit" in caplog.text
    assert "4 bits" in caplog.text
    tell_if_too_small(config, str(folder), dtype="float33")
    assert "cannot be told before it is loaded" in caplog.text
