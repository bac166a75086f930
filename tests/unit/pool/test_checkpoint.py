"""Reading PEFT checkpoints, and refusing by name what cannot be honoured."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE

Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def checkpoint(tmp_path, make_checkpoint):
    """A plain checkpoint."""
    return make_checkpoint(tmp_path / "plain")


def edit_config(folder, **changes):
    """Change the configuration of a checkpoint."""
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    """Change the tensors of a checkpoint."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(change(tensors) or tensors, folder / WEIGHTS_FILE)


def test_reads_what_peft_wrote(checkpoint):
    """Name, base model, scaling and every tensor are those of the checkpoint."""
    adapter = read_adapter(checkpoint)
    assert (adapter.name, adapter.base_model, adapter.rank) == ("plain", "org/tiny-llama", 4)
    assert sorted(adapter.weights) == sorted(f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv")
    assert adapter.weights[Q0].scaling == 2.0
    for key, tensor in load_file(checkpoint / WEIGHTS_FILE).items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        assert torch.equal(getattr(adapter.weights[module], side), tensor)


@pytest.mark.parametrize(
    ("lora", "module", "rank", "scaling"),
    [
        ({"r": 3, "lora_alpha": 6}, Q0, 3, 2.0),
        ({"r": 4, "use_rslora": True}, Q0, 4, 8 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 2}}, Q0, 2, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, V1, 4, 2.0),
        ({"rank_pattern": {r"layers\.1\..*": 1}}, V1, 1, 8.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 16}}, Q0, 4, 4.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 16}}, V1, 4, 2.0),
        ({"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 8}, "use_rslora": True}, V1, 8, 8 / math.sqrt(8)),
        ({"target_modules": r".*\.self_attn\.(q|v)_proj"}, V1, 4, 2.0),
        ({"target_modules": "all-linear"}, "model.layers.1.mlp.down_proj", 4, 2.0),
        ({"layers_to_transform": [1]}, V1, 4, 2.0),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head", 4, 2.0),
    ],
)
def test_rank_and_scaling_are_pefts(tmp_path, make_checkpoint, lora, module, rank, scaling):
    """Ranks, patterns, rsLoRA and every kind of target_modules give the rank and scaling that PEFT gives."""
    weights = read_adapter(make_checkpoint(tmp_path / "a", **lora)).weights[module]
    assert (weights.r, weights.scaling) == (rank, pytest.approx(scaling))


def test_layers_to_transform_leaves_others_out(tmp_path, make_checkpoint):
    """Only the chosen layers are adapted."""
    assert Q0 not in read_adapter(make_checkpoint(tmp_path / "a", layers_to_transform=[1])).weights


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "QALoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"from_a_later_peft": True}, "from_a_later_peft"),
        ({"from_a_later_peft": {"rate": 0.5}}, "from_a_later_peft"),
        *(({"peft_type": kind}, kind) for kind in ("IA3", "VERA", "LOHA", "LOKR", "ADALORA", "OFT", "PROMPT_TUNING")),
        ({"peft_type": None}, "peft_type"),
    ],
)
def test_refuses_what_is_not_honoured(checkpoint, changes, named):
    """A setting that changes the arithmetic is refused, and the message names the adapter and the setting."""
    edit_config(checkpoint, **changes)
    with pytest.raises(UnsupportedAdapterError, match="adapter 'plain'") as caught:
        read_adapter(checkpoint)
    assert named in str(caught.value)
    assert "merge it into the base model" in str(caught.value) or "path_initial_model" in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisation_that_is_over_does_not_matter(checkpoint, init):
    """How a finished adapter's matrices were initialised is no reason to refuse it."""
    edit_config(checkpoint, init_lora_weights=init)
    assert read_adapter(checkpoint).rank == 4


def test_reads_dora(tmp_path, make_checkpoint):
    """Magnitudes as PEFT writes them, also under the names of a state dict; they are part of what it is."""
    folder = make_checkpoint(tmp_path / "a", use_dora=True)
    adapter = read_adapter(folder)
    assert adapter.is_dora
    assert (adapter.rank, adapter.num_rows) == (4, 5)
    magnitude = load_file(folder / WEIGHTS_FILE)[f"base_model.model.{Q0}.lora_magnitude_vector"]
    assert torch.equal(adapter.weights[Q0].magnitude, magnitude)
    assert adapter.shapes[Q0].magnitude.shape == magnitude.shape
    plain = read_adapter(make_checkpoint(tmp_path / "b"))
    assert adapter.num_parameters > plain.num_parameters
    assert (plain.is_dora, plain.num_rows) == (False, 4)
    edit_weights(folder, rename_key("magnitude_vector", "magnitude_vector.default.weight"))
    assert read_adapter(folder).fingerprint == adapter.fingerprint
    edit_weights(folder, lambda t: {k: v * 2 if "magnitude" in k else v for k, v in t.items()})
    assert read_adapter(folder).fingerprint != adapter.fingerprint


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {k: v for k, v in t.items() if "magnitude" not in k}, "needs a lora_magnitude_vector [64], but has"),
        (lambda t: {k: v[:-1] if "magnitude" in k else v for k, v in t.items()}, "[64], but has [63]"),
        (lambda t: {k: v * math.nan if "magnitude" in k else v for k, v in t.items()}, "lora_magnitude_vector of"),
        (lambda t: {k: v * 1e30 if "magnitude" in k else v for k, v in t.items()}, "overflows"),
    ],
)
def test_refuses_dora_with_other_magnitudes(tmp_path, make_checkpoint, change, named):
    """None, of another size, or no numbers."""
    folder = make_checkpoint(tmp_path / "a", use_dora=True)
    edit_weights(folder, change)
    with pytest.raises(InvalidAdapterError, match="adapter 'a'") as caught:
        read_adapter(folder)
    assert named in str(caught.value)


def test_refuses_magnitudes_that_the_configuration_does_not_know(tmp_path, make_checkpoint):
    """PEFT would leave them out without a word."""
    folder = make_checkpoint(tmp_path / "a", use_dora=True)
    edit_config(folder, use_dora=False)
    with pytest.raises(InvalidAdapterError, match="does not say use_dora"):
        read_adapter(folder)


def test_reads_adapted_embeddings(tmp_path, make_checkpoint):
    """Their factors are a linear module's over one-hot inputs; what the base model has itself is kept apart."""
    lora = {"target_modules": ["embed_tokens", "lm_head"]}
    folder = make_checkpoint(tmp_path / "a", saves_base="auto", **lora)
    adapter = read_adapter(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    prefix = "base_model.model.model.embed_tokens"
    assert torch.equal(adapter.weights["model.embed_tokens"].lora_A, tensors[f"{prefix}.lora_embedding_A"])
    assert torch.equal(adapter.weights["model.embed_tokens"].lora_B, tensors[f"{prefix}.lora_embedding_B"])
    assert tuple(adapter.weights["lm_head"].lora_B.shape) == (320, 4)
    assert set(adapter.base_weights) == {"model.embed_tokens", "lm_head"}
    assert torch.equal(adapter.base_weights["model.embed_tokens"], tensors[f"{prefix}.base_layer.weight"])
    assert read_adapter(make_checkpoint(tmp_path / "b", **lora)).base_weights == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {k: v for k, v in t.items() if "embedding_B" not in k}, "lora_embedding_A but no lora_embedding_B"),
        (lambda t: {k: v for k, v in t.items() if "embedding_A" not in k}, "lora_embedding_B but no lora_A"),
        (
            lambda t: {k.replace("embedding_B", "B.weight"): v for k, v in t.items()},
            "has a lora_B but no lora_embedding_B",
        ),
        (lambda t: {k: v for k, v in t.items() if "lora_" not in k}, "has a base_layer but no lora_A"),
    ],
)
def test_refuses_halves_of_embeddings(tmp_path, make_checkpoint, change, named):
    """A factor without the other, or with one of another kind."""
    folder = make_checkpoint(tmp_path / "a", saves_base="auto", target_modules=["embed_tokens"])
    edit_weights(folder, change)
    with pytest.raises(InvalidAdapterError, match="adapter 'a'") as caught:
        read_adapter(folder)
    assert named in str(caught.value)


def test_reads_what_invokes_an_activated_lora(tmp_path, make_checkpoint):
    """The tokens are part of what it is; an empty list is plain LoRA, as in PEFT."""
    folder = make_checkpoint(tmp_path / "a", alora_invocation_tokens=[7, 8])
    adapter = read_adapter(folder)
    assert adapter.invocation_tokens == (7, 8)
    edit_config(folder, alora_invocation_tokens=[7, 9])
    assert read_adapter(folder).fingerprint != adapter.fingerprint
    edit_config(folder, alora_invocation_tokens=[])
    plain = read_adapter(folder)
    assert plain.invocation_tokens == ()
    edit_config(folder, alora_invocation_tokens=None)
    assert read_adapter(folder).fingerprint == plain.fingerprint


@pytest.mark.parametrize("tokens", ["x", [7.5], [-1], [True], [1 << 40], [5] * 2000, {"a": 1}, 5])
def test_refuses_invocations_that_are_none(checkpoint, tokens):
    """What invokes an activated LoRA is a list of token ids."""
    edit_config(checkpoint, alora_invocation_tokens=tokens)
    with pytest.raises(InvalidAdapterError, match="list of up to 1024 token ids"):
        read_adapter(checkpoint)


def test_a_configuration_of_a_later_peft_is_taken(checkpoint):
    """Fields that are not known here are taken while they are off, whatever object they are kept in."""
    later = {"use_next": False, "next_config": None, "next_modules": [], "next": {"use_it": False, "modules": None}}
    edit_config(checkpoint, peft_version="9.0.0", qalora_group_size=16, **later)
    assert read_adapter(checkpoint).rank == 4


def test_refuses_pickle(checkpoint):
    """Weights in a pickle are refused without being opened."""
    (checkpoint / WEIGHTS_FILE).rename(checkpoint / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="pickle"):
        read_adapter(checkpoint)


def rename_key(old, new):
    """A change that renames part of every key."""
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def drop_first(tensors):
    """A change that loses a tensor."""
    del tensors[min(tensors)]


def poison(value):
    """A change that puts a value into one tensor."""

    def change(tensors):
        tensors[f"base_model.model.{V1}.lora_B.weight"][3, 1] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (poison(math.nan), InvalidAdapterError, f"lora_B of '{V1}' holds NaN"),
        (poison(math.inf), InvalidAdapterError, "infinite"),
        (lambda t: {k: v * 1e12 for k, v in t.items()}, InvalidAdapterError, "overflows"),
        (drop_first, InvalidAdapterError, "has a lora_B but no lora_A"),
        (rename_key("base_model.model.", ""), InvalidAdapterError, "allowed are base_model.model."),
        (rename_key(".lora_A.", ".lora_A.other."), InvalidAdapterError, "lora_A.other"),
        (
            lambda t: t | {k.replace("A.w", "A.default.w"): v + 1 for k, v in t.items()},
            InvalidAdapterError,
            "two lora_",
        ),
        (rename_key("q_proj.lora_A.weight", "q_proj.weight"), UnsupportedAdapterError, "whole weights"),
        (rename_key("lora_A.weight", "lora_embedding_A"), InvalidAdapterError, "lora_B but no lora_embedding_B"),
        (rename_key("q_proj.lora_A.weight", "q_proj.lora_E"), InvalidAdapterError, "q_proj.lora_E"),
        (rename_key("q_proj", "o_proj"), InvalidAdapterError, "target_modules"),
        (lambda t: {k: v[:3] if "lora_A" in k else v for k, v in t.items()}, InvalidAdapterError, "rank 4"),
        (lambda t: {k: v.half() if "lora_A" in k else v for k, v in t.items()}, InvalidAdapterError, "lora_A in F16"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, UnsupportedAdapterError, "I8"),
        (lambda t: {k: v[..., None, None] for k, v in t.items()}, UnsupportedAdapterError, "convolution"),
        (lambda _: {"__nothing__": torch.zeros(1)}, InvalidAdapterError, "__nothing__"),
    ],
)
def test_refuses_bad_tensors(checkpoint, change, error, named):
    """Tensors that are unpaired, misnamed, misshapen, mistyped or not finite are refused by name."""
    edit_weights(checkpoint, change)
    with pytest.raises(error, match="adapter 'plain'") as caught:
        read_adapter(checkpoint)
    assert named in str(caught.value)


@pytest.mark.parametrize("alpha", [1e308, -1e308, 1e20])
def test_refuses_a_scaling_under_which_everything_overflows(checkpoint, alpha):
    """Even if B is zero: zero times what overflows is no number."""
    edit_config(checkpoint, lora_alpha=alpha)
    edit_weights(checkpoint, lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    with pytest.raises(InvalidAdapterError, match=r"'plain'.*overflows.*the scaling is"):
        read_adapter(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, -7])
def test_refuses_truncated_weights(checkpoint, keep):
    """A weights file cut anywhere is refused as corrupt."""
    file = checkpoint / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidAdapterError, match="corrupt or truncated"):
        read_adapter(checkpoint)


def test_refuses_overwritten_header(checkpoint):
    """A weights file of random bytes is refused as corrupt."""
    (checkpoint / WEIGHTS_FILE).write_bytes(os.urandom(5000))
    with pytest.raises(InvalidAdapterError, match="corrupt or truncated"):
        read_adapter(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff"])
def test_refuses_bad_config(checkpoint, text):
    """A configuration that is no JSON object is refused."""
    (checkpoint / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidAdapterError, match=CONFIG_FILE):
        read_adapter(checkpoint)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_refuses_missing_files(checkpoint, missing):
    """A folder without one of the two files is refused, and the message names the file."""
    (checkpoint / missing).unlink()
    with pytest.raises(InvalidAdapterError, match=missing):
        read_adapter(checkpoint)


@pytest.mark.parametrize("changes", [{"r": 0}, {"r": "four"}, {"lora_alpha": "x"}, {"rank_pattern": {"q_proj": -1}}])
def test_refuses_impossible_numbers(checkpoint, changes):
    """A rank or alpha that is no sensible number is refused."""
    edit_config(checkpoint, **changes)
    with pytest.raises(InvalidAdapterError, match="adapter 'plain'"):
        read_adapter(checkpoint)


@pytest.mark.parametrize("base_model", ["org/tiny-llama", "/models/Tiny-Llama/", "tiny-llama", None, ""])
def test_same_base_model(checkpoint, base_model):
    """The base model is recognised by the last component of its name or path."""
    assert read_adapter(checkpoint, base_model=base_model).base_model == "org/tiny-llama"


def test_refuses_other_base_model(checkpoint):
    """An adapter made for another base model is refused; the message names both."""
    with pytest.raises(InvalidAdapterError, match=r"org/tiny-llama.*org/tiny-gemma"):
        read_adapter(checkpoint, base_model="org/tiny-gemma")


def test_config_without_base_model_is_taken(checkpoint):
    """An adapter that names no base model cannot disagree with one."""
    edit_config(checkpoint, base_model_name_or_path=None)
    assert read_adapter(checkpoint, base_model="org/anything").base_model is None


def test_fingerprint_is_of_content(tmp_path, checkpoint):
    """A copy under another name has the same fingerprint; another scaling or weight another one."""
    original = read_adapter(checkpoint)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert read_adapter(copy).fingerprint == original.fingerprint
    assert read_adapter(copy) == original
    edit_config(copy, lora_alpha=9)
    rescaled = read_adapter(copy).fingerprint
    edit_config(copy, lora_alpha=8)
    edit_weights(copy, poison(0.5))
    assert len({original.fingerprint, rescaled, read_adapter(copy).fingerprint}) == 3


@pytest.mark.parametrize("num_bytes", [8, 64, 1000])
def test_a_file_is_read_in_pieces(checkpoint, num_bytes, monkeypatch):
    """Of any size, of several dtypes, of parts of a tensor: the fingerprint is the same, and what is wrong is found."""

    def mix(tensors):
        modules = dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors)
        dtype_of = dict(zip(modules, itertools.cycle((torch.float32, torch.bfloat16, torch.float64)), strict=False))
        return {key: tensor.to(dtype_of[key.rpartition(".lora_")[0]]) for key, tensor in tensors.items()}

    edit_weights(checkpoint, mix)
    whole = read_adapter(checkpoint)
    assert len({weights.lora_A.dtype for weights in whole.weights.values()}) == 3
    monkeypatch.setattr("langchain_lora_retriever.pool.checkpoint.CHUNK_BYTES", num_bytes)
    assert read_adapter(checkpoint).fingerprint == whole.fingerprint
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        edit_weights(checkpoint, poison(value))
        with pytest.raises(InvalidAdapterError, match=f"lora_B of '{V1}' holds NaN"):
            read_adapter(checkpoint)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.", "base_model.model._orig_mod.model."),
        ("base_model.model.model.", "_orig_mod.base_model.model.model."),
        ("layers.", "layers._orig_mod."),
        (".weight", ".default.weight"),
    ],
)
def test_names_of_compiled_models_and_state_dicts_are_repaired(checkpoint, old, new):
    """What torch.compile or a state dict adds to the tensors' names does not make another adapter."""
    fingerprint = read_adapter(checkpoint).fingerprint
    edit_weights(checkpoint, rename_key(old, new))
    assert read_adapter(checkpoint).fingerprint == fingerprint


@pytest.fixture
def no_held_files(monkeypatch):
    """No adapter may keep its file open."""
    monkeypatch.setattr("langchain_lora_retriever.pool.file_weights._max_held", lambda: 0)


def test_a_file_that_is_gone_is_said(checkpoint, no_held_files):
    """Weights of a file that somebody deleted are an error that names the adapter and what to do."""
    adapter = read_adapter(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(InvalidAdapterError, match=r"adapter 'plain'.*No such file.*pool\.update\('plain'\)"):
        adapter.weights[Q0]


def test_weights_outlive_their_file_while_it_is_held(checkpoint):
    """An adapter among the first hundred is still whole for whoever has it after its folder was deleted."""
    gc.collect()  # adapters of tests before may be among the first hundred until then
    before = load_file(checkpoint / WEIGHTS_FILE)[f"base_model.model.{Q0}.lora_A.weight"].clone()
    adapter = read_adapter(checkpoint)
    shutil.rmtree(checkpoint)
    assert torch.equal(adapter.weights[Q0].lora_A, before)


@pytest.mark.parametrize("seconds_ago", [0, 100], ids=["new", "old"])
@pytest.mark.parametrize("change", ["truncate", "shorten", "overwrite", "replace"])
def test_a_file_that_was_changed_is_said(checkpoint, no_held_files, change, seconds_ago):
    """A file that is written to after it was read gives an error: no crash, no other weights under the old name."""
    file = checkpoint / WEIGHTS_FILE
    moment = time.time() - seconds_ago
    os.utime(file, (moment, moment))
    adapter = read_adapter(checkpoint)
    data = bytearray(file.read_bytes())
    if change == "truncate":
        os.truncate(file, 0)
    elif change == "shorten":
        os.truncate(file, len(data) - 1)
    else:
        data[-4:] = b"\1\2\3\4"
        target = file if change == "overwrite" else checkpoint / "aside"
        target.write_bytes(data)
        target.replace(file)
    with pytest.raises(InvalidAdapterError, match=r"adapter 'plain'.*pool\.update"):
        adapter.weights[Q0]


def test_a_file_that_was_only_touched_is_recognised(checkpoint):
    """Another time, another link or more bytes after its own do not make other weights."""
    adapter = read_adapter(checkpoint)
    before = adapter.weights[Q0].lora_A.clone()
    os.utime(checkpoint / WEIGHTS_FILE, (1, 1))
    os.link(checkpoint / WEIGHTS_FILE, checkpoint / "link")
    with (checkpoint / WEIGHTS_FILE).open("ab") as stream:
        stream.write(b"more")
    assert torch.equal(adapter.weights[Q0].lora_A, before)


def test_weights_are_read_once_while_they_are_held(checkpoint):
    """All modules of a `dict` share one read; afterwards nothing of it is kept."""
    weights = read_adapter(checkpoint).weights
    held = dict(weights)
    storages = {w.lora_A.untyped_storage().data_ptr() for w in held.values()}
    assert storages == {weights[Q0].lora_A.untyped_storage().data_ptr()}
    kept = weakref.ref(weights._data())
    del held
    assert kept() is None


def test_held_files_are_closed_quietly_at_exit(checkpoint):
    """An interpreter that ends with adapters in its hands says nothing of them."""
    code = "from langchain_lora_retriever.pool.checkpoint import read_adapter as r; "
    code += f"a = [r({str(checkpoint)!r}) for _ in 'ab']"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True)
    assert run.stderr == b""


def test_a_deep_copy_shares_the_weights(checkpoint):
    """An adapter can be copied; nobody changes its weights, so they are the same."""
    adapter = read_adapter(checkpoint)
    assert copy.deepcopy(adapter).weights is adapter.weights


def test_shapes_need_no_file(checkpoint):
    """Rank, size and shapes of an adapter are known without its file."""
    adapter = read_adapter(checkpoint)
    met = {module: (w.lora_A.shape, w.lora_B.shape, w.scaling) for module, w in adapter.weights.items()}
    shutil.rmtree(checkpoint)
    assert {module: (w.lora_A.shape, w.lora_B.shape, w.scaling) for module, w in adapter.shapes.items()} == met
    assert adapter.rank == 4
    assert adapter.num_parameters > 0


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_few_open_files(checkpoint):
    """Of many adapters a bounded number keep their file open, and none once they are gone."""

    def num_open():
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = num_open()
    adapters = [read_adapter(checkpoint) for _ in range(300)]
    assert all(adapter.weights[Q0].r == 4 for adapter in adapters)
    assert before < num_open() <= before + 128
    del adapters
    assert num_open() <= before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(checkpoint, dtype):
    """Tensors come in the file's own floating type."""
    edit_weights(checkpoint, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    assert read_adapter(checkpoint).weights[Q0].lora_A.dtype == dtype


def test_knows_what_the_configuration_targets(checkpoint):
    """Also modules that the file lacks; a configuration that leaves it to the base model names none."""
    adapter = read_adapter(checkpoint)
    assert adapter.is_target("model.layers.7.self_attn.q_proj")
    assert not adapter.is_target("model.layers.0.mlp.up_proj")
    edit_config(checkpoint, target_modules="all-linear")
    assert not read_adapter(checkpoint).is_target("model.layers.0.self_attn.q_proj")


def edit_header(folder, change, *, pad=0):
    """Change the header of a checkpoint's weights; `pad` blanks move the numbers."""
    data = (folder / WEIGHTS_FILE).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    text = json.dumps(change(header) or header).encode() + b" " * pad
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


@pytest.mark.parametrize("pad", range(4))
def test_numbers_may_lie_anywhere(checkpoint, pad):
    """A header of any length, and tensors that are not aligned, give the same weights."""
    before = read_adapter(checkpoint).weights[Q0].lora_A.clone()
    edit_header(checkpoint, lambda header: None, pad=pad)
    assert torch.equal(read_adapter(checkpoint).weights[Q0].lora_A, before)


def first(header):
    """The name of the first tensor."""
    return min(key for key in header if key.startswith("base_model"))


def first_entry(**changes):
    """A change of the first tensor's entry."""

    def change(header):
        header[first(header)] |= changes

    return change


@pytest.mark.parametrize(
    "change",
    [
        first_entry(shape=[4, 63]),
        first_entry(shape=[4, 1 << 60]),
        first_entry(shape=[4, -64]),
        first_entry(shape=[4, 64.0]),
        first_entry(shape=[True, 256]),
        first_entry(shape="4,64"),
        first_entry(dtype="F16"),
        first_entry(dtype="F4"),
        first_entry(dtype=None),
        first_entry(dtype=[]),
        first_entry(data_offsets=[0]),
        first_entry(data_offsets=[8, 1032]),
        first_entry(data_offsets=[-8, 1016]),
        first_entry(data_offsets=[1 << 70, (1 << 70) + 1024]),
        lambda header: header.pop(first(header)) and None,
        lambda header: header.update(x={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        lambda header: [header],
        lambda header: {"x": 5},
    ],
    ids=range(18),
)
def test_refuses_headers_that_do_not_fit_the_file(checkpoint, change):
    """Tensors that overlap, leave holes, or reach beyond the file are refused; so does safetensors itself."""
    edit_header(checkpoint, change)
    with pytest.raises(InvalidAdapterError, match="corrupt or truncated"):
        read_adapter(checkpoint)
    with pytest.raises(SafetensorError):
        load_file(checkpoint / WEIGHTS_FILE)


def test_refuses_tensors_without_numbers(checkpoint):
    """A dimension of 0 is none."""
    edit_header(checkpoint, lambda header: header.update(x={"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}))
    with pytest.raises(InvalidAdapterError, match="adapter 'plain'"):
        read_adapter(checkpoint)
