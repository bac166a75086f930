"""Contrastive training, on an encoder of one tiny layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_lora_retriever.errors import EncoderError, InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.retrieval.encoder import SentenceTransformerEncoder
from langchain_lora_retriever.retrieval.training import (
    TrainingConfig,
    leave_one_out_ranks,
    split_adapters,
    train_encoder,
    whiten,
)

if TYPE_CHECKING:
    from pathlib import Path

TASKS = ("translate", "sum", "sql", "word", "a word is")
SAMPLES = {task: [f"{task} {x} {y}" for x in "abcd" for y in "efg"] for task in TASKS}
QUICK = TrainingConfig(
    num_steps=8,
    adapters_per_batch=3,
    samples_per_adapter=3,
    learning_rate=1e-2,
    max_seq_length=32,
    eval_steps=4,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random sentence-transformers model of 16 dimensions."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = "[PAD] [UNK] [CLS] [SEP] [MASK]"
    words = f"{special} represent the sentence for similar task retrieval : a b c d e f g is {' '.join(TASKS[:4])}"
    (folder / "vocab.txt").write_text("\n".join(words.split()))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words.split()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(16)], device="cpu").save(str(folder / "st"))
    return folder / "st"


@pytest.mark.parametrize("loss", ["centroid", "pairs"])
def test_training_helps_retrieval(encoder: Path, tmp_path: Path, loss: str) -> None:
    """Either loss raises leave-one-out accuracy, and the result is an encoder like any other."""
    calls: list[tuple[int, int]] = []
    config = TrainingConfig(**{**_values(QUICK), "loss": loss, "holdout_fraction": 0.0})
    report = train_encoder(
        SAMPLES, encoder, output_dir=tmp_path, config=config, device="cpu", progress=lambda *at: calls.append(at)
    )
    assert report.accuracy_after[1] > report.accuracy_before[1]
    assert calls[-1] == (8, 8)
    assert report.num_steps == 8
    vectors = SentenceTransformerEncoder(tmp_path).encode(["sum a e"])
    assert vectors.shape == (1, 16)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)
    json.dumps(report.to_dict())
    written = [path.read_text() for path in tmp_path.rglob("*") if path.suffix in {".md", ".json", ".txt"}]
    card = (tmp_path / "README.md").read_text()
    assert f"Trained from {encoder.name} by langchain-lora-retriever: 8 steps" in card
    assert card in written
    assert not [text for text in written for samples in SAMPLES.values() for sample in samples if sample in text]


def test_heldout_adapters_are_not_trained_on(encoder: Path, tmp_path: Path, monkeypatch) -> None:
    """A share of the adapters is kept for early stopping: no step sees a sample of theirs; the report names them."""
    import torch
    from sentence_transformers import SentenceTransformer

    seen: set[str] = set()
    forward = SentenceTransformer.forward

    def noted(self: Any, features: Any, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            seen.update(self.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True))
        return forward(self, features, *arguments, **named)

    monkeypatch.setattr(SentenceTransformer, "forward", noted)
    report = train_encoder(SAMPLES, encoder, output_dir=tmp_path, config=QUICK, device="cpu")
    trained = {name for name in TASKS if any(text.endswith(tuple(SAMPLES[name])) for text in seen)}
    assert trained == set(report.trained_adapters)
    assert len(report.heldout_adapters) == 1
    assert set(report.heldout_adapters) | set(report.trained_adapters) == set(TASKS)
    assert not set(report.heldout_adapters) & set(report.trained_adapters)
    assert not (tmp_path / "checkpoints").exists()


def test_training_is_repeatable(encoder: Path, tmp_path: Path) -> None:
    """The same seed gives the same encoder."""
    vectors = []
    for name in ("one", "two"):
        train_encoder(SAMPLES, encoder, output_dir=tmp_path / name, config=QUICK, device="cpu")
        vectors.append(SentenceTransformerEncoder(tmp_path / name).encode(["sum a e", "sql b f"]))
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_interrupted_training_resumes(encoder: Path, tmp_path: Path) -> None:
    """A run stopped halfway goes on from its checkpoint and does not repeat the steps done."""

    def stop(step: int, _: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_encoder(SAMPLES, encoder, output_dir=tmp_path, config=QUICK, device="cpu", progress=stop)
    steps: list[int] = []
    train_encoder(
        SAMPLES,
        encoder,
        output_dir=tmp_path,
        config=QUICK,
        device="cpu",
        resume=True,
        progress=lambda step, _: steps.append(step),
    )
    assert steps == [5, 6, 7, 8]


def test_zero_steps_whiten_only(encoder: Path, tmp_path: Path) -> None:
    """Without a step of training the whitening layer alone is added."""
    config = TrainingConfig(num_steps=0, holdout_fraction=0.0)
    report = train_encoder(SAMPLES, encoder, output_dir=tmp_path, config=config, device="cpu")
    assert report.num_steps == 0
    assert report.accuracy_after[1] >= report.accuracy_before[1]


def test_whitening_evens_out_the_spread_within_adapters(encoder: Path) -> None:
    """Whitening with little shrinkage brings samples of one adapter together, against the distance of two adapters."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder), device="cpu")
    num_modules, before = len(model), _separation(model)
    whiten(model, SAMPLES, shrinkage=0.1, instruction="")
    assert len(model) == num_modules + 2
    assert _separation(model) > 1.2 * before


def test_leave_one_out_leaves_the_sample_out() -> None:
    """A sample that is unlike the others of its adapter is not found through itself."""
    embeddings = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert leave_one_out_ranks(embeddings, np.array([0, 0, 1, 1])).tolist() == [2, 2, 1, 1]


def test_single_samples_compete_but_are_not_ranked() -> None:
    """An adapter with one sample has no others to be found by."""
    embeddings = np.eye(3)[[0, 1, 1]]
    assert leave_one_out_ranks(embeddings, np.array([0, 1, 1])).tolist() == [0, 1, 1]


def test_split_keeps_order_and_size() -> None:
    """A split is a seeded partition of the names in their own order."""
    names = tuple("abcdefghij")
    chosen, rest = split_adapters(names, 0.4, seed=3)
    assert len(chosen) == 4
    assert sorted(chosen + rest) == list(names)
    assert list(chosen) == sorted(chosen)
    assert split_adapters(names, 0.4, seed=3) == (chosen, rest)
    assert split_adapters(names, 0.4, seed=4) != (chosen, rest)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("loss", "triplet"), ("num_steps", -1), ("samples_per_adapter", 1), ("temperature", 0), ("holdout_fraction", 1),
     ("whitening", 0), ("patience", 0), ("max_seq_length", 8), ("adapters_per_batch", 1), ("eval_steps", 0),
     ("learning_rate", 0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: str, value: object) -> None:
    """The error names the setting and the value met."""
    with pytest.raises(InvalidRequestError, match=f"{setting}={value!r}"):
        TrainingConfig(**{setting: value})


def test_too_few_adapters_are_refused(encoder: Path, tmp_path: Path) -> None:
    """One adapter, or adapters of one sample, give nothing to contrast."""
    with pytest.raises(InvalidRequestError, match="at least 2 adapters"):
        train_encoder({"sql": ["a", "b"], "other": ["c"]}, encoder, output_dir=tmp_path, device="cpu")


def test_missing_datasets_is_named(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the error prints the pip install that brings it."""
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'langchain-lora-retriever\[train\]'"):
        train_encoder(SAMPLES, encoder, output_dir=tmp_path, config=QUICK, device="cpu")


def _values(config: TrainingConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in TrainingConfig.__dataclass_fields__}


def _separation(model: object) -> float:
    """Mean distance of the adapters' means from one another, over that of their samples from their mean."""
    vectors = np.stack([SentenceTransformerEncoder(model).encode(texts) for texts in SAMPLES.values()])
    means = vectors.mean(axis=1)
    between = np.linalg.norm(means[:, None] - means[None], axis=2).mean()
    return float(between / np.linalg.norm(vectors - means[:, None], axis=2).mean())


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    """As retrieval names it."""
    with pytest.raises(EncoderError, match=r"encoder '.*nowhere' cannot be loaded"):
        train_encoder(SAMPLES, tmp_path / "nowhere", output_dir=tmp_path / "out")


def test_copies_of_one_sample_are_one(encoder: Path, tmp_path: Path) -> None:
    """There is nothing to whiten in an adapter whose samples are all the same."""
    samples = {task: [f"{task} a b"] * 4 for task in TASKS}
    with pytest.raises(InvalidRequestError, match="2 or more different samples each; 0 of 5 have them"):
        train_encoder(samples, encoder, output_dir=tmp_path / "out")
