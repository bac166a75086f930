"""Train one adapter after the other on a base model that is loaded once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.pool.checkpoint_files import WEIGHTS_FILE
from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.support.checks import settings
from langchain_lora_retriever.support.quiet_loading import quiet_loading
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from langchain_lora_retriever.adapter_training.tasks import Row, Task

__all__ = ["AdapterReport", "AdapterTrainer", "AdapterTrainingConfig", "num_steps_of"]

_logger = logging.getLogger(__name__)

_IGNORE = -100
_SAVE_SECONDS = 20.0
"""Between two checkpoints of a training that runs."""
_WORK_FOLDER = ".training"  # in the pool's folder: pools pass hidden ones by

OnStep: TypeAlias = Callable[[int, int, float], object]
"""Called with the steps taken, the steps to take, and the last loss."""

_Count: TypeAlias = Annotated[int, Field(ge=1, description="an integer >= 1")]


@settings(slots=True, kw_only=True)
class AdapterTrainingConfig:
    """How adapters are trained.

    Attributes:
        num_epochs: Passes over the rows.
        max_steps: Stop after this many steps; None does not.
        batch_size: Rows of a step.
        learning_rate: Largest; small ranks want a high one. It warms up over a twentieth of the steps, then falls as a
            cosine does.
        num_samples: Rows that go into `samples.jsonl`, by which the adapter is found.
        max_new_tokens: Maximum number of tokens of an answer to a row that was held out.
        seed: Of weights and of the rows' order.

    Raises:
        InvalidRequestError: If a value cannot train anything.
    """

    num_epochs: _Count = 3
    max_steps: Annotated[int | None, Field(ge=1, description="an integer >= 1, or None")] = None
    batch_size: _Count = 32
    learning_rate: Annotated[float, Field(gt=0, lt=1, description="a number between 0 and 1")] = 1e-3
    num_samples: _Count = 20
    max_new_tokens: _Count = 96
    seed: Annotated[int, Field(description="an integer")] = 0


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """How the training of an adapter ended.

    Attributes:
        name: The adapter.
        num_steps: Steps taken in all.
        loss: Mean of the last 20 losses.
        skipped_steps: Steps whose gradient was not finite; more than a few ask for a lower learning rate.
        seconds: Wall-clock time of this run; less than the whole where it was resumed.
        adapter: Share of the rows held out that it answers exactly, letter case and a trailing full stop aside; None if
            that was not asked for.
        base: The same of the base model alone.
    """

    name: str
    num_steps: int
    loss: float
    skipped_steps: int
    seconds: float
    adapter: float | None = None
    base: float | None = None


def num_steps_of(task: Task, config: AdapterTrainingConfig) -> int:
    """Steps that a task's training takes."""
    steps = config.num_epochs * max(1, len(task.train) // config.batch_size)
    return min(steps, config.max_steps or steps)


class AdapterTrainer:
    """A base model, and the pool that adapters for it are trained into. For one thread.

    What is half trained lies in `.training` in the pool's folder, which readers pass by.

    Args:
        base_model: Name, folder, or `.gguf` file.
        pool: Folder of the pool; made if it is not there.
        config: How to train.
        base_model_name: What the adapters' configurations name as their base; `base_model` by default.
        device: Where to train; a GPU if there is one.

    Raises:
        InvalidRequestError: If there is no such device, or the model has no chat template, which rows are put into.
    """

    def __init__(
        self,
        base_model: str,
        pool: Path,
        config: AdapterTrainingConfig,
        *,
        base_model_name: str | None = None,
        device: str | None = None,
    ) -> None:
        self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._config = config
        self._pool = pool
        self._base_model, self.tokenizer = _load(base_model, self.device)
        if not self.tokenizer.chat_template:
            raise InvalidRequestError(
                f"the base model {base_model!r} has no chat template, which rows are put into. Pass one that was "
                "trained for chats, or set tokenizer.chat_template and save the tokenizer with it."
            )
        self._base_model.name_or_path = self._name = base_model_name or base_model

    def train(
        self, task: Task, *, resume: bool = False, evaluate: bool = False, on_step: OnStep = lambda *_: None
    ) -> AdapterReport:
        """Train an adapter and put it into the pool, in place of one of that name; then, if asked to, try it.

        Args:
            task: What to train on.
            resume: Go on where an interrupted training of the same task, with the same settings, was saved last; leave
                one alone that was finished.
            evaluate: Answer the rows held out, with the adapter and without. It is in the pool by then.
            on_step: Called after every step.

        Raises:
            InvalidRequestError: If PEFT does not know a field of the LoRA configuration.
            PoolError: If the pool cannot be written to.
        """
        start = time.perf_counter()
        work = self._pool / _WORK_FOLDER / task.name
        key = self._key(task)
        done = _read_report(work, key) if resume else None
        if done is not None and (done.adapter is not None or not evaluate):
            return done
        model, lora = self._adapted(task)
        try:
            if done is None:
                progress = self._fit(model, task, work, key, resume=resume, on_step=on_step)
                self._save(model, lora, task, work)
                last = progress.losses[-20:]
                done = AdapterReport(
                    task.name, len(progress.losses), round(sum(last) / len(last), 4), progress.skipped,
                    round(time.perf_counter() - start, 1),
                )  # fmt: skip
                _write_report(work, key, done)
            else:
                self._restore(model, task)
            if evaluate and task.test:
                done = replace(done, **self._exact_matches(model, task))
                _write_report(work, key, done)
            return done
        finally:
            model.unload()

    def _key(self, task: Task) -> str:
        """What a training that is gone on with must have in common with the one before."""
        said = (self._name, asdict(self._config), task.train, dict(task.lora))
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    def _adapted(self, task: Task) -> tuple[PeftModel, LoraConfig]:
        torch.manual_seed(self._config.seed)
        try:
            lora = LoraConfig(**{"task_type": "CAUSAL_LM", **task.lora})
            model = get_peft_model(self._base_model, lora)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"task {task.name!r} has the LoRA configuration {dict(task.lora)}: {error}"
            ) from error
        assert isinstance(model, PeftModel)
        return model, lora

    def _fit(self, model: PeftModel, task: Task, work: Path, key: str, *, resume: bool, on_step: OnStep) -> _Progress:
        config, tokenizer = self._config, self.tokenizer
        data = [
            (
                _prompt_ids(tokenizer, row),
                tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"],
            )
            for row in task.train
        ]
        num_steps, per_epoch = num_steps_of(task, config), max(1, len(data) // config.batch_size)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, num_steps // 20), num_steps)
        progress = _Progress([], 0)
        if resume and (state := _read_state(work, key)) is not None:
            set_peft_model_state_dict(model, state["adapter"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            progress = _Progress(state["losses"], state["skipped"])
            _logger.info("%s: going on after step %d of %d", task.name, len(progress.losses), num_steps)

        def save() -> None:
            _write_state(work, key, model, optimizer, scheduler, progress)

        saved = time.monotonic()
        model.train()
        try:
            while (step := len(progress.losses)) < num_steps:
                epoch, place = divmod(step, per_epoch)
                order = list(range(len(data)))
                random.Random(f"{config.seed}/{epoch}").shuffle(order)  # noqa: S311 - row order
                rows = order[place * config.batch_size : (place + 1) * config.batch_size]
                loss, is_finite = self._step([data[row] for row in rows], parameters, optimizer)
                scheduler.step()
                progress.skipped += not is_finite
                progress.losses.append(loss)
                on_step(step + 1, num_steps, loss)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        except BaseException:
            save()
            raise
        return progress

    def _step(
        self,
        batch: Sequence[tuple[list[int], list[int]]],
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> tuple[float, bool]:
        """Take one step; returns its loss, and whether the gradient was finite."""
        input_ids, labels = (each.to(self.device) for each in _collate(batch, self.tokenizer.pad_token_id))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type != "cpu"):
            loss = _answer_loss(self._base_model, input_ids, labels)
        loss.backward()
        is_finite = bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
        return loss.item(), is_finite

    def _save(self, model: PeftModel, lora: LoraConfig, task: Task, work: Path) -> None:
        """Put the adapter into the pool as PEFT saves it, in bf16, with the samples it is found by."""
        folder = work / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        lora.inference_mode = True
        if isinstance(lora.target_modules, set):
            lora.target_modules = sorted(lora.target_modules)
        lora.save_pretrained(str(folder))
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        samples = [{"input": row["input"], "output": row["output"]} for row in task.train[: self._config.num_samples]]
        pool = AdapterPool(self._pool, create=True)
        put = pool.update if task.name in pool else pool.add
        put(task.name, folder, samples=samples)
        shutil.rmtree(folder)
        (work / _STATE).unlink(missing_ok=True)

    def _restore(self, model: PeftModel, task: Task) -> None:
        """Give the model an adapter that was trained already."""
        folder = AdapterPool(self._pool)[task.name].path
        assert folder is not None, "the pool lies on disk"
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE))

    def _exact_matches(self, model: PeftModel, task: Task) -> dict[str, Any]:
        model.eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # as they are served
                parameter.data = parameter.data.bfloat16().float()
        adapter = self._exact_match(model, task.test)
        with model.disable_adapter():
            return {"adapter": adapter, "base": self._exact_match(model, task.test)}

    @torch.inference_mode()
    def _exact_match(self, model: PeftModel, rows: Sequence[Row]) -> float:
        tokenizer, size, right = self.tokenizer, self._config.batch_size, 0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            prompts = [_prompt_ids(tokenizer, row) for row in part]
            inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=self._config.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(_normal(text) == _normal(row["output"]) for text, row in zip(texts, part, strict=True))
        return right / len(rows)


@dataclass(slots=True)
class _Progress:
    """How far a training is."""

    losses: list[float]
    skipped: int


def _device(name: str) -> torch.device:
    """The device of a name, if something can be put there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter is torch's word on what it was built without
        reason = str(error).partition("\n")[0]
        raise InvalidRequestError(f"device={shown(name)} is not allowed: {reason}. Pass 'cpu' or 'cuda'.") from error
    return device


def _load(base_model: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model in float32, and its tokenizer."""
    path = Path(base_model)
    kwargs = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if kwargs else base_model
    with quiet_loading:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device), tokenizer


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """The conversation's tokens up to where the model answers."""
    messages = row.get("messages") or [{"role": "user", "content": row["input"]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _collate(batch: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right, where causal attention needs no mask.

    Returns:
        Token ids and labels, both `[batch, longest]`; a label is -100 where there is no answer token.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids, labels = [], []
    for prompt, answer in batch:
        num_padded = longest - len(prompt) - len(answer)
        ids.append(prompt + answer + [pad_id] * num_padded)
        labels.append([_IGNORE] * len(prompt) + answer + [_IGNORE] * num_padded)
    return torch.tensor(ids), torch.tensor(labels)


def _answer_loss(base: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss over the answers' tokens; no logits are made for the prompts' tokens."""
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    is_answer = labels[:, 1:] != _IGNORE
    logits = base.get_output_embeddings()(hidden[:, :-1][is_answer])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][is_answer])


def _normal(text: str) -> str:
    return text.strip().lower().removesuffix(".")


_STATE, _REPORT = "state.pt", "report.json"


def _write_state(
    work: Path,
    key: str,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: _Progress,
) -> None:
    state = {
        "key": key,
        "adapter": get_peft_model_state_dict(model, save_embedding_layers=False),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "losses": progress.losses,
        "skipped": progress.skipped,
    }
    work.mkdir(parents=True, exist_ok=True)
    aside = work / f"{_STATE}.{os.getpid()}"
    torch.save(state, aside)
    aside.replace(work / _STATE)


def _read_state(work: Path, key: str) -> dict[str, Any] | None:
    """What an interrupted training saved; None if there was none, or it was another."""
    try:
        state: dict[str, Any] = torch.load(work / _STATE, weights_only=True)
    except FileNotFoundError:
        return None
    return state if state["key"] == key else None


def _write_report(work: Path, key: str, report: AdapterReport) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / _REPORT).write_text(json.dumps({"key": key, **asdict(report)}), encoding="utf-8")


def _read_report(work: Path, key: str) -> AdapterReport | None:
    try:
        values = json.loads((work / _REPORT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return AdapterReport(**values) if values.pop("key", None) == key else None
