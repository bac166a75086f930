"""Contrastive fine-tuning of a sentence-transformers encoder on the samples of adapters.

Two samples of one adapter belong together, samples of different adapters apart. Trained on some adapters, the encoder
also tells apart adapters it has never seen, so a pool that grows later needs no retraining.

Source: LoraRetriever, arXiv:2402.09997, section 3.2; prototypical networks, arXiv:1703.05175, for the centroid loss.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

from langchain_lora_retriever.errors import InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.retrieval.encoder import (
    DEFAULT_ENCODER,
    DEFAULT_INSTRUCTION,
    SentenceTransformerEncoder,
    load_model,
    shorten,
)
from langchain_lora_retriever.support.checks import settings

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation.evaluator import BaseEvaluator

__all__ = [
    "LossName",
    "Progress",
    "TrainingConfig",
    "TrainingReport",
    "leave_one_out_ranks",
    "split_adapters",
    "train_encoder",
    "whiten",
]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of steps done and the number of steps planned."""

LossName: TypeAlias = Literal["centroid", "pairs"]

_CHECKPOINTS = "checkpoints"
_TOP_K = (1, 3, 5, 8)


@settings(slots=True, kw_only=True)
class TrainingConfig:
    """How the encoder is trained. The defaults won over random splits of a pool of 48 adapters.

    Attributes:
        loss: "centroid" compares every sample with the mean of its adapter's other samples, as retrieval does;
            "pairs" is sentence-transformers' `CachedMultipleNegativesRankingLoss` on two samples of one adapter.
        num_steps: Maximum number of optimizer steps.
        adapters_per_batch: Adapters a batch holds samples of; fewer where there are fewer.
        samples_per_adapter: Samples per adapter in a batch, at least 2; "pairs" takes 2.
        temperature: Divides the cosines before the softmax.
        learning_rate: Peak of a schedule that warms up over a tenth of the steps and then falls linearly.
        max_seq_length: Tokens of a sample that are read while training; its head and tail if it is longer.
        holdout_fraction: Share of the adapters kept out of training to stop early on; 0 trains all steps.
        eval_steps: Steps between two looks at the adapters held out.
        patience: Looks without a better top-1 accuracy after which training stops.
        whitening: Shrinkage of a last linear layer that evens out how samples of one adapter spread; larger changes
            less, None leaves the layer out.
        seed: Decides the adapters held out and the batches.

    Raises:
        InvalidRequestError: If a value is out of its range.
    """

    loss: LossName = "centroid"
    num_steps: Annotated[int, Field(ge=0, description="an integer >= 0; 0 only whitens")] = 100
    adapters_per_batch: Annotated[int, Field(ge=2, description="an integer >= 2")] = 16
    samples_per_adapter: Annotated[int, Field(ge=2, description="an integer >= 2")] = 4
    temperature: Annotated[float, Field(gt=0, description="a number > 0")] = 0.05
    learning_rate: Annotated[float, Field(gt=0, description="a number > 0")] = 5e-5
    max_seq_length: Annotated[int, Field(ge=32, description="an integer >= 32")] = 128
    holdout_fraction: Annotated[float, Field(ge=0, lt=1, description="a number in [0, 1)")] = 0.2
    eval_steps: Annotated[int, Field(ge=1, description="an integer >= 1")] = 20
    patience: Annotated[int, Field(ge=1, description="an integer >= 1")] = 3
    whitening: Annotated[float | None, Field(gt=0, description="a number > 0, or None")] = 3.0
    seed: Annotated[int, Field(description="an integer")] = 0


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What came of a training run.

    Attributes:
        output_dir: The trained encoder, ready for `encoder=`.
        trained_adapters: Names trained on.
        heldout_adapters: Names kept out of training to stop early on.
        num_steps: Optimizer steps taken; the encoder kept may be of an earlier one.
        seconds: Wall-clock time of the whole run.
        accuracy_before: Accuracy of leave-one-out retrieval at top 1, 3, 5 and 8 for the samples of the adapters held
            out, all adapters competing; of those trained on where none was held out.
        accuracy_after: The same with the trained encoder.
        config: The settings.
    """

    output_dir: Path
    trained_adapters: tuple[str, ...]
    heldout_adapters: tuple[str, ...]
    num_steps: int
    seconds: float
    accuracy_before: Mapping[int, float]
    accuracy_after: Mapping[int, float]
    config: TrainingConfig

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {**asdict(self), "output_dir": str(self.output_dir)}


def split_adapters(names: Sequence[str], fraction: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split names at random into `(chosen, rest)`, `fraction` of them chosen; both keep the given order."""
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = set(order[: round(fraction * len(names))].tolist())
    return (
        tuple(name for i, name in enumerate(names) if i in chosen),
        tuple(name for i, name in enumerate(names) if i not in chosen),
    )


def leave_one_out_ranks(embeddings: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Rank each sample's own adapter among all, its embedding being the mean of the *other* samples.

    Args:
        embeddings: `[n, d]`, rows of length 1.
        labels: `[n]`, the adapter of each row, from 0 without gaps. An adapter with a single sample has no others: it
            competes, but that sample's rank is 0.

    Returns:
        `[n]`, 1 for the nearest adapter. Ties count against the sample.
    """
    num = int(labels.max()) + 1
    sums = np.zeros((num, embeddings.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, embeddings)
    rows = np.arange(len(labels))
    scores = embeddings @ _normalize(sums).T
    own = (embeddings * _normalize(sums[labels] - embeddings)).sum(axis=1)
    scores[rows, labels] = own
    ranks = (scores >= own[:, None]).sum(axis=1)
    return np.where(np.bincount(labels, minlength=num)[labels] > 1, ranks, 0)


def train_encoder(
    samples: Mapping[str, Sequence[str]],
    encoder: str | Path = DEFAULT_ENCODER,
    *,
    output_dir: str | Path,
    config: TrainingConfig | None = None,
    instruction: str = DEFAULT_INSTRUCTION,
    resume: bool = False,
    device: str | None = None,
    show_progress: bool = False,
    progress: Progress | None = None,
) -> TrainingReport:
    """Fine-tune an encoder so that samples of one adapter lie together, and save it.

    Args:
        samples: Training inputs by adapter, at least 2 different ones each; a dozen to 20 are usual. For a pool:
            `{name: [s.input for s in pool.samples(name)] for name in pool}`.
        encoder: Name or folder of the sentence-transformers model to start from.
        output_dir: Where the trained model goes, and its checkpoints while it trains.
        config: Settings; the defaults if None.
        instruction: Text put before every sample. Retrieve with the same.
        resume: Go on from the last checkpoint in `output_dir`, if there is one.
        device: Where to train; by default a GPU if there is one.
        show_progress: Draw a progress bar on stderr.
        progress: Called after every step.

    Raises:
        InvalidRequestError: If there are fewer than two adapters with two different samples each.
        EncoderError: If the model to start from cannot be loaded.
        MissingDependencyError: If `datasets` is not installed.
    """
    config = config or TrainingConfig()
    started = time.monotonic()
    usable = {name: list(texts) for name, texts in samples.items() if len(set(texts)) >= 2}
    heldout, trained = split_adapters(tuple(usable), config.holdout_fraction, config.seed)
    if len(trained) < 2:
        raise InvalidRequestError(
            f"Training needs at least 2 adapters with 2 or more different samples each; {len(usable)} of "
            f"{len(samples)} have them, and holdout_fraction={config.holdout_fraction} keeps {len(heldout)} of these "
            "out. Add samples, adapters, or lower holdout_fraction."
        )
    if config.num_steps and importlib.util.find_spec("datasets") is None:
        raise MissingDependencyError(
            "Training needs the package datasets. Install it: pip install 'langchain-lora-retriever[train]'."
        )
    output_dir = Path(output_dir)
    model = load_model(encoder, device)
    model.float()  # a checkpoint in half precision would be loaded, and trained, as such
    probe = _Probe(usable, heldout or trained, instruction)
    before = probe.accuracy(model)
    num_steps = 0
    if config.num_steps:
        texts = [
            (name, text)
            for name in trained
            for text in shorten([instruction + text for text in usable[name]], model.tokenizer, config.max_seq_length)
        ]
        num_steps = _fit(
            model, texts, config, output_dir / _CHECKPOINTS, probe if heldout else None,
            resume=resume, show_progress=show_progress, progress=progress,
        )  # fmt: skip
    if config.whitening is not None:
        kept = {name: usable[name] for name in trained}
        whiten(model, kept, shrinkage=config.whitening, instruction=instruction)
    model.save(str(output_dir), create_model_card=False)  # the library's own card would quote samples
    shutil.rmtree(output_dir / _CHECKPOINTS, ignore_errors=True)
    report = TrainingReport(
        output_dir=output_dir,
        trained_adapters=trained,
        heldout_adapters=heldout,
        num_steps=num_steps,
        seconds=time.monotonic() - started,
        accuracy_before=before,
        accuracy_after=probe.accuracy(model),
        config=config,
    )
    (output_dir / "README.md").write_text(_model_card(report, Path(encoder).name, instruction), encoding="utf-8")
    return report


def _model_card(report: TrainingReport, encoder: str, instruction: str) -> str:
    """What the folder holds, for whoever is given it: no sample, and no adapter's name."""
    before, after = report.accuracy_before, report.accuracy_after
    rows = "\n".join(f"| {k} | {before[k]:.1%} | {after[k]:.1%} |" for k in before)
    whose = f"{len(report.heldout_adapters)} held out" if report.heldout_adapters else "trained on"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [langchain-lora-retriever]
---

# An encoder that finds LoRA adapters for prompts

Trained from {encoder} by langchain-lora-retriever: {report.num_steps} steps on samples of
{len(report.trained_adapters)} adapters. Texts are embedded behind the instruction `{instruction}`.

Leave-one-out retrieval of the adapters {whose}, the right one among the first k:

| k | before | after |
|---|---|---|
{rows}
"""


def whiten(
    model: SentenceTransformer,
    samples: Mapping[str, Sequence[str]],
    *,
    shrinkage: float = 3.0,
    instruction: str = DEFAULT_INSTRUCTION,
) -> None:
    """Append a linear layer that evens out how the samples of one adapter spread. Changes `model` in place.

    Directions in which samples of one adapter differ (their subject matter) shrink, those in which adapters differ
    (their task) remain; the mean over the adapters becomes the origin.

    Semantics:
        e <- normalize((e - mean) @ V @ diag(eigenvalues + shrinkage * mean(eigenvalues)) ** -1/2)
        with eigenvalues, V of the covariance of the samples around their adapters' means.

    Args:
        model: A model whose output is a sentence embedding.
        samples: Inputs by adapter.
        shrinkage: Added to every eigenvalue, as a share of their mean. Larger changes the embedding less.
        instruction: Text put before every sample.
    """
    import torch  # noqa: PLC0415  # the package is importable without torch
    from sentence_transformers.base.modules import Dense, Normalize  # noqa: PLC0415

    groups = [_embed(model, texts, instruction) for texts in samples.values()]
    means = np.stack([group.mean(axis=0) for group in groups])
    centre = means.mean(axis=0)
    residuals = np.concatenate([group - mean for group, mean in zip(groups, means, strict=True)])
    eigenvalues, vectors = np.linalg.eigh(residuals.T @ residuals / len(residuals))
    eigenvalues = np.maximum(eigenvalues, 0)
    weight = (vectors * (eigenvalues + shrinkage * eigenvalues.mean()) ** -0.5).T
    weight /= np.linalg.norm(weight, 2)  # the scale is free, since the result is normalized
    layer = Dense(
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        activation_function=torch.nn.Identity(),
        init_weight=torch.from_numpy(weight.astype(np.float32)),
        init_bias=torch.from_numpy((-weight @ centre).astype(np.float32)),
    )
    for module in (layer, Normalize()):
        model.append(module.to(model.device, next(model.parameters()).dtype))


def _embed(model: SentenceTransformer, texts: Sequence[str], instruction: str) -> NDArray[np.float64]:
    encoder = SentenceTransformerEncoder(model)
    return encoder.encode([instruction + text for text in texts]).astype(np.float64)


def _normalize(vectors: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    unit: NDArray[np.floating[Any]] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit


class _Probe:
    """Leave-one-out retrieval of some adapters' samples, every adapter competing.

    Args:
        samples: Inputs by adapter.
        names: The adapters whose samples are looked for.
        instruction: Text put before every sample.
    """

    def __init__(self, samples: Mapping[str, Sequence[str]], names: Sequence[str], instruction: str) -> None:
        self._texts = [text for texts in samples.values() for text in texts]
        self._labels = np.repeat(np.arange(len(samples)), [len(texts) for texts in samples.values()])
        self._is_probed = np.isin(self._labels, [i for i, name in enumerate(samples) if name in set(names)])
        self._instruction = instruction

    def accuracy(self, model: SentenceTransformer) -> dict[int, float]:
        """Return the accuracy at each of `top_k`, with what `model` is now."""
        ranks = leave_one_out_ranks(_embed(model, self._texts, self._instruction), self._labels)[self._is_probed]
        return {k: float((ranks <= k).mean()) for k in _TOP_K}

    def evaluator(self) -> BaseEvaluator:
        """Return this as sentence-transformers' trainer calls it."""
        from sentence_transformers.base.evaluation.evaluator import BaseEvaluator  # noqa: PLC0415

        probe = self

        class Evaluator(BaseEvaluator):
            primary_metric = "top1"

            def __call__(
                self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
            ) -> dict[str, float]:
                del output_path, epoch, steps
                return {f"top{k}": value for k, value in probe.accuracy(model).items()}

        return Evaluator()  # type: ignore[no-untyped-call]


def _fit(
    model: SentenceTransformer,
    texts: Sequence[tuple[str, str]],
    config: TrainingConfig,
    checkpoints: Path,
    probe: _Probe | None,
    *,
    resume: bool,
    show_progress: bool,
    progress: Progress | None,
) -> int:
    """Train `model` in place on `(adapter, text)` pairs; return the steps taken. Keeps the best step if probed."""
    from datasets import Dataset  # noqa: PLC0415
    from sentence_transformers import (  # noqa: PLC0415
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed  # noqa: PLC0415

    class Reporter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, control, kwargs
            if progress is not None:
                progress(state.global_step, state.max_steps)

    class Trainer(SentenceTransformerTrainer):
        # An override, since a sampler among the arguments would have to be pickled into every checkpoint.
        def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            return _batch_sampler(dataset, labels, per_batch, per_adapter, seed=config.seed)

    set_seed(config.seed)
    adapters = list(dict.fromkeys(name for name, _ in texts))
    labels = [adapters.index(name) for name, _ in texts]
    per_adapter = 2 if config.loss == "pairs" else config.samples_per_adapter
    per_batch = min(config.adapters_per_batch, len(adapters))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.num_steps,
        per_device_train_batch_size=per_batch * per_adapter,
        learning_rate=config.learning_rate,
        weight_decay=0.01,
        warmup_steps=math.ceil(config.num_steps / 10),
        eval_strategy="steps" if probe else "no",
        save_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
        save_total_limit=1,
        load_best_model_at_end=probe is not None,
        metric_for_best_model="top1" if probe else None,
        greater_is_better=True if probe else None,
        seed=config.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=not show_progress,
    )
    callbacks: list[TrainerCallback] = [Reporter()]
    if probe:
        callbacks.append(EarlyStoppingCallback(config.patience))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [text for _, text in texts], "label": labels}),
        loss=_make_loss(model, config, per_adapter),
        evaluator=probe.evaluator() if probe else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=bool(resume and any(checkpoints.glob("checkpoint-*"))))
    model.eval()
    return int(trainer.state.global_step)


def _make_loss(model: SentenceTransformer, config: TrainingConfig, per_adapter: int) -> torch.nn.Module:
    """Build the loss; samples of one adapter are neighbours in the batch, `per_adapter` of them."""
    import torch  # noqa: PLC0415
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: PLC0415
    from torch.nn import functional as F  # noqa: N812, PLC0415

    class CentroidLoss(torch.nn.Module):
        """Cross-entropy of each sample over the adapters, its own one's centroid being without it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Sequence[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
            del labels
            embeddings = F.normalize(self.model(features[0])["sentence_embedding"], dim=-1)
            groups = embeddings.unflatten(0, (-1, per_adapter))
            sums = groups.sum(dim=1)
            others = F.normalize(sums[:, None] - groups, dim=-1).flatten(0, 1)
            logits = embeddings @ F.normalize(sums, dim=-1).T
            targets = torch.arange(len(sums), device=logits.device).repeat_interleave(per_adapter)
            own = (embeddings * others).sum(dim=-1, keepdim=True)
            logits = logits.scatter(1, targets[:, None], own)
            return F.cross_entropy(logits / config.temperature, targets)

    class PairsLoss(MultipleNegativesRankingLoss):
        """sentence-transformers' loss on a batch whose even rows are anchors and odd rows their positives."""

        def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
            (features,) = sentence_features
            columns = [
                {key: value[start::2] if torch.is_tensor(value) else value for key, value in features.items()}
                for start in (0, 1)
            ]
            return super().forward(columns, labels)

    return CentroidLoss() if config.loss == "centroid" else PairsLoss(model, scale=1 / config.temperature)


def _batch_sampler(dataset: Any, labels: Sequence[int], num_adapters: int, per_adapter: int, *, seed: int) -> Any:
    """Batches of `num_adapters` adapters, `per_adapter` neighbouring samples each; every sample as often as any other.

    Deterministic in the seed and the epoch, so a resumed run meets the batches it would have met.
    """
    from torch.utils.data import BatchSampler  # noqa: PLC0415

    by_adapter = [np.flatnonzero(np.asarray(labels) == label) for label in sorted(set(labels))]
    num_batches = max(1, len(labels) // (num_adapters * per_adapter))

    class AdapterBatchSampler(BatchSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return num_batches

        def __iter__(self) -> Iterator[list[int]]:
            generator = np.random.default_rng((seed, self.epoch))
            left: list[list[int]] = [[] for _ in by_adapter]
            for _ in range(num_batches):
                batch: list[int] = []
                for adapter in generator.permutation(len(by_adapter))[:num_adapters]:
                    while len(left[adapter]) < per_adapter:
                        left[adapter] += generator.permutation(by_adapter[adapter]).tolist()
                    batch += [left[adapter].pop(0) for _ in range(per_adapter)]
                yield batch

    return AdapterBatchSampler(dataset, num_adapters * per_adapter, drop_last=True)
