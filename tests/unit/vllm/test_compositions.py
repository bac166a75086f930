"""Compositions as vLLM is asked for them, and which vLLM and set-up are refused; nothing here needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from langchain_lora_retriever.errors import EngineError, InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.vllm import limits
from langchain_lora_retriever.vllm.compositions import composed_name, folder_of, parse_name, with_contents
from langchain_lora_retriever.vllm.patches import _check
from langchain_lora_retriever.vllm.plugin import register


def test_a_name_is_read_as_it_is_written() -> None:
    """Sorted, weights to the last bit, reserved characters encoded."""
    weights = {"user/sql": 0.1 + 0.2, "a,b=c%": -1e-9, "é": 2.0}
    name = composed_name(weights)
    assert parse_name(name) == weights
    assert composed_name(dict(reversed(weights.items()))) == name
    assert parse_name("mix:sql=0.7, json=.3") == {"sql": 0.7, "json": 0.3}


@pytest.mark.parametrize("name", ["mix:", "mix:sql", "mix:=1", "mix:sql=inf", "mix:a=1,a=2", "mix:a=1,,b=2"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    """With the form that is allowed."""
    with pytest.raises(InvalidRequestError, match="mix:NAME=WEIGHT"):
        parse_name(name)


def test_a_folder_is_known_by_its_contents(tmp_path: Any) -> None:
    """The same wherever it lies, another once a file changes; what is no folder stays as it is."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
    one, two = (with_contents(str(tmp_path / name)) for name in ("one", "two"))
    assert one.rpartition("#")[2] == two.rpartition("#")[2]
    assert folder_of(one) == str(tmp_path / "one")
    assert with_contents(one) == one
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"others")
    assert with_contents(str(tmp_path / "two")) != two
    assert with_contents("user/repo") == "user/repo" == folder_of("user/repo")


def test_another_vllm_is_refused(monkeypatch: Any) -> None:
    """By version, saying which is tested; none at all says what to install."""
    for version in ("0.26.0", "0.32.1.dev3"):
        monkeypatch.setattr(limits, "installed_version", lambda version=version: version)
        limits.check_version()
    for version in ("0.2.6", "0.25.1", "0.27.1", "0.31.9", "0.33.0", "1.0", "dev"):
        monkeypatch.setattr(limits, "installed_version", lambda version=version: version)
        with pytest.raises(EngineError, match=r"works inside vLLM 0\.26 and 0\.32, .*" + version):
            limits.check_version()
    monkeypatch.setattr(limits, "installed_version", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"langchain-lora-retriever\[vllm\]"):
        limits.check_version()


def test_a_vllm_that_is_not_known_is_left_as_it_is(monkeypatch: Any, caplog: Any) -> None:
    """By the plug-in, which says so: whoever has both packages did not ask for it."""
    monkeypatch.setattr(limits, "installed_version", lambda: "0.33.0")
    register()
    assert "0.33.0 is installed, and left as it is" in caplog.text


def test_what_is_replaced_is_looked_at_first() -> None:
    """A method of other parameters, and one that is missing, are told of by name."""

    class Theirs:
        def known(self, one: int, *, two: int) -> None: ...

    _check(Theirs, "known", "one two")
    with pytest.raises(EngineError, match=r"Theirs\.known takes \(one, two\), where \(one\) was expected"):
        _check(Theirs, "known", "one")
    with pytest.raises(EngineError, match=r"Theirs\.gone is missing"):
        _check(Theirs, "gone", "one")


def _config(**changes: Any) -> Any:
    model = {"is_multimodal_model": False, "is_moe": False, "is_encoder_decoder": False, "runner_type": "generate"}
    model |= {"dtype": "bf16"} | {name: changes.pop(name) for name in list(changes) if name in model}
    lora = {"fully_sharded_loras": False, "max_lora_rank": 16, "lora_dtype": "bf16"} | changes.pop("lora", {})
    return SimpleNamespace(
        lora_config=SimpleNamespace(**lora),
        model_config=SimpleNamespace(**model),
        device_config=SimpleNamespace(device_type=changes.pop("device", "cuda")),
        additional_config=changes.pop("additional", {}),
    )


def test_set_ups_that_our_kernels_do_not_run_are_named() -> None:
    """Each by its reason; the usual one is none."""
    assert limits.why_not(_config()) is None
    for changes, words in (
        ({"is_moe": True}, "mixture of experts"),
        ({"is_multimodal_model": True}, "more than one modality"),
        ({"device": "tpu"}, "the device is tpu"),
        ({"lora": {"fully_sharded_loras": True}}, "fully_sharded_loras"),
        ({"lora": {"max_lora_rank": 512}}, "max_lora_rank=512 is above 256"),
        ({"lora": {"lora_dtype": "fp16"}}, "lora_dtype=fp16 is not the model's bf16"),
    ):
        assert words in limits.why_not(_config(**changes))


def test_the_longest_composition_is_set_by_additional_config() -> None:
    """From 1 to 8; what is unknown is refused."""
    assert limits.PluginConfig.of(_config()).max_adapters_per_request == 4
    given = {"lora_retriever": {"max_adapters_per_request": 8}, "others": 1}
    assert limits.PluginConfig.of(_config(additional=given)).max_adapters_per_request == 8
    for wrong in ({"max_adapters_per_request": 9}, {"max_adapters_per_request": "2"}, {"k": 3}):
        with pytest.raises(InvalidRequestError, match="integer from 1 to 8"):
            limits.PluginConfig.of(_config(additional={"lora_retriever": wrong}))
