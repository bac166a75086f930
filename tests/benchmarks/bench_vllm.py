"""vLLM with its own kernels and with ours: are the answers the same, and how many tokens per second?

    python tests/benchmarks/bench_vllm.py [--only gate ours theirs base] [--shape 8b] [--adapters 8 32] [--logs DIR]

Steps, each in processes of its own, in the order given:

- gate: a small model with random weights, in bfloat16 on a GPU: the base model, plain adapters of true ranks 2 to 16,
  and with ours mixtures and the rank-concatenated adapters that they are, in one batch. The log-probabilities of the
  tokens found are compared with the model itself, in float32 and with the adapters added to its weights. Ours fail if
  they are further from it than vLLM's kernels are, or mixtures further than their concatenations.
- ours, theirs: adapters on, our kernels or vLLM's: requests of the base model, of n adapters (one each), and with ours
  mixtures of three over them; then one request alone. theirs_two_streams: vLLM's own with VLLM_LORA_ENABLE_DUAL_STREAM.
- base: vLLM without adapters.
- gate_two, theirs_two, ours_two: the same over two GPUs, tensor-parallel; gate_two is judged by one GPU, and so is
  gate_theirs_two, without which a gate_two that fails would not tell whose fault it is.

The timed model has the shape of Llama-3-8B and vLLM's dummy weights; adapters have rank 16 on all seven projections.
Each case is run once to warm up, and then three times; the median counts. Results are printed as JSON, line by line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FURTHER = 1.25  # what one may be off by, of what the other is: on average ...
WORST = 2.0  # ... and in the request that is off most
NOTHING = 1e-3  # an error that is none
RANK = 16
CAPTURED = (1, 2, 4, 8, 16, 32)
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "initializer_range": 0.1,
    },
}
STEPS = (
    "gate",
    "theirs",
    "ours",
    "base",
    "theirs_two_streams",
    "gate_two",
    "gate_theirs_two",
    "theirs_two",
    "ours_two",
)
GATES = {
    "gate": ["gate_theirs", "gate_ours"],
    "gate_two": ["gate_ours", "gate_two"],
    "gate_theirs_two": ["gate_theirs", "gate_theirs_two"],
}
GATE_RANKS = {"a": 16, "b": 16, "c": 8, "d": 4, "e": 2}
GATE_PROMPTS = (5, 33, 130, 300)  # their lengths
GATE_MIXTURES: list[dict[str, float]] = [{"a": 0.7, "c": 0.3}, {"b": 0.5, "a": 0.3, "d": 0.2}, {"e": 1.5, "b": -0.5}]


# In the process of a step


def start(options: Any, model: str, max_num_seqs: int, **more: Any) -> Any:
    """VLLM's `LLM` without a tokenizer; fewer sizes are captured than by default, so that it starts sooner."""
    from vllm import LLM

    is_on_gpu = torch.cuda.is_available()
    arguments = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16" if is_on_gpu else "float32",
        "enable_prefix_caching": False,  # runs repeat their prompts
        "disable_log_stats": True,
        "enforce_eager": not is_on_gpu,
        "max_num_seqs": max_num_seqs,
        "compilation_config": {"cudagraph_capture_sizes": [n for n in CAPTURED if n < max_num_seqs] + [max_num_seqs]},
        "tensor_parallel_size": 2 if options.child.endswith("_two") else 1,
        **more,
        **options.vllm,
    }
    began = time.perf_counter()
    llm = LLM(model, **arguments)
    print(json.dumps({"step": options.child, "start_seconds": round(time.perf_counter() - began, 1)}), flush=True)
    return llm


class Adapters:
    """Folders as vLLM's `LoRARequest`s, and compositions of them."""

    def __init__(self, root: Path) -> None:
        from langchain_lora_retriever.vllm.compositions import Compositions

        self._root = root
        self._ids: dict[str, int] = {}
        self._compositions = Compositions()

    def request(self, weights: dict[str, float]) -> Any:
        """None for the base model."""
        from vllm.lora.request import LoRARequest

        from langchain_lora_retriever.vllm.compositions import Member

        members = [
            Member(self._ids.setdefault(name, len(self._ids) + 1), name, str(self._root / name), weight)
            for name, weight in weights.items()
        ]
        if len(members) == 1 and members[0].weight == 1:
            return LoRARequest(members[0].name, members[0].lora_int_id, members[0].path)
        return self._compositions.request("mixture", members) if members else None


def sampling(num_tokens: int, logprobs: int | None = None) -> Any:
    """Greedy, without an end."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs, detokenize=False)


def gate_prompt(i: int) -> list[int]:
    """The tokens of the gate's prompt `i`."""
    return [(31 * i + 7 * j * j) % 500 + 5 for j in range(GATE_PROMPTS[i])]


def answer_gate(options: Any, root: Path) -> None:
    """Write the answers and their likeliest two tokens to the step's file."""
    llm = start(
        options,
        str(root / "small"),
        max_num_seqs=28,
        enable_lora=True,
        max_loras=8,
        max_lora_rank=64,
        max_model_len=512,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        gpu_memory_utilization=0.05,
    )
    adapters = Adapters(root / "gate")
    asked: list[dict[str, float]] = [{}, *({name: 1.0} for name in GATE_RANKS)]
    if not options.child.startswith("gate_theirs"):
        asked += [*GATE_MIXTURES, *({f"concatenated{i}": 1.0} for i in range(len(GATE_MIXTURES)))]
    answers: dict[str, Any] = {}
    # A prompt of each length alone, then all at once: decode steps of 1 to 48 requests, prompts in steps of their own.
    for num_prompts in (1, len(GATE_PROMPTS)):
        prompts = [gate_prompt(i) for i in range(num_prompts)]
        keys = [(weights, i) for weights in asked for i in range(num_prompts)]
        outputs = llm.generate(
            [{"prompt_token_ids": prompts[i]} for _, i in keys],
            sampling(24, logprobs=2),
            lora_request=[adapters.request(weights) for weights, _ in keys],
            use_tqdm=False,
        )
        for (weights, i), output in zip(keys, outputs, strict=True):
            (done,) = output.outputs
            tops = [{str(token): entry.logprob for token, entry in place.items()} for place in done.logprobs]
            answers[f"{num_prompts} {i} {json.dumps(weights)}"] = {"token_ids": list(done.token_ids), "tops": tops}
    (root / f"{options.child}.json").write_text(json.dumps(answers))


def time_cases(options: Any, root: Path) -> None:
    """Tokens per second of each case."""
    has_adapters = options.child != "base"
    more: dict[str, Any] = {}
    if has_adapters:
        most = max(options.adapters)
        more = {"enable_lora": True, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": RANK}
    llm = start(
        options,
        str(root / options.shape),
        max_num_seqs=options.requests,
        load_format="dummy",
        max_model_len=options.prompt + options.answer,
        max_num_batched_tokens=max(8192, options.prompt),
        **({"gpu_memory_utilization": 0.9} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 64 << 20}),
        **more,
    )
    adapters = Adapters(root / options.shape / "adapters")
    ours = options.child.startswith("ours")
    cases = [(0, 0)]
    for count in sorted(options.adapters, reverse=True) if has_adapters else ():
        cases += [(count, 1), (count, 3)] if ours else [(count, 1)]
    for num_requests in (options.requests, 1):
        for count, k in cases:
            weights = [
                {f"{(i + 7 * j) % count}": weight for j, weight in enumerate((0.5, 0.3, 0.2)[:k] if k > 1 else (1.0,))}
                if k
                else {}
                for i in range(num_requests)
            ]
            prompts = [
                {"prompt_token_ids": [(31 * i + 7 * j) % 500 + 5 for j in range(options.prompt)]}
                for i in range(num_requests)
            ]
            seconds = []
            for _ in range(4):
                began = time.perf_counter()
                llm.generate(
                    prompts,
                    sampling(options.answer),
                    lora_request=[adapters.request(entry) for entry in weights],
                    use_tqdm=False,
                )
                seconds.append(time.perf_counter() - began)
            rates = [num_requests * options.answer / s for s in seconds]
            told = {
                "step": options.child,
                "requests": num_requests,
                "adapters": count,
                "k": k,
                "tokens_per_second": round(statistics.median(rates[1:]), 1),
                "runs": [round(rate, 1) for rate in rates[1:]],
                "first_run_seconds": round(seconds[0], 2),
            }
            print(json.dumps(told), flush=True)


# In the first process


def shapes_of(shape: str) -> dict[str, tuple[int, int]]:
    """`(in_features, out_features)` by projection."""
    size = SHAPES[shape]
    hidden, wide = int(size["hidden_size"]), int(size["intermediate_size"])
    kv = hidden // int(size["num_attention_heads"]) * int(size["num_key_value_heads"])
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, wide),
        "mlp.up_proj": (hidden, wide),
        "mlp.down_proj": (wide, hidden),
    }


def random_weights(shape: str, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """An adapter's tensors, as PEFT names them; outputs about half of the base's in the small model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(int(SHAPES[shape]["num_hidden_layers"])):
        for name, (width_in, width_out) in shapes_of(shape).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            lora_a = torch.randn(rank, width_in, generator=generator) * width_in**-0.5
            lora_b = torch.randn(width_out, rank, generator=generator) * rank**-0.5
            tensors[f"{prefix}.lora_A.weight"] = lora_a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = lora_b.bfloat16()
    return tensors


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor] | Path, rank: int) -> None:
    """A PEFT checkpoint; tensors that lie in a file already are linked to."""
    folder.mkdir(parents=True)
    names = sorted(name.rpartition(".")[2] for name in shapes_of("small"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    if isinstance(tensors, Path):
        file.symlink_to(tensors)
    else:
        save_file(tensors, file)


def concatenated(mixture: dict[str, float], adapters: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a mixture is as one adapter: weights folded into B."""
    tensors = {}
    for key in next(iter(adapters.values())):
        parts = [adapters[name][key] for name in mixture]
        if ".lora_B." in key:
            weighted = [part.float() * weight for part, weight in zip(parts, mixture.values(), strict=True)]
            tensors[key] = torch.cat(weighted, dim=1)
        else:
            tensors[key] = torch.cat(parts)
    return tensors


def write_model(root: Path, shape: str, *, has_weights: bool) -> None:
    """A Llama's configuration, with weights or without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    if has_weights:
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(root / shape)
    else:
        config.save_pretrained(root / shape)


def prepare(options: Any, root: Path) -> None:
    """Write what the steps read."""
    write_model(root, "small", has_weights=True)
    gate = {name: random_weights("small", rank, seed) for seed, (name, rank) in enumerate(GATE_RANKS.items())}
    for name, rank in GATE_RANKS.items():
        write_adapter(root / "gate" / name, gate[name], rank)
    for i, mixture in enumerate(GATE_MIXTURES):
        rank = sum(GATE_RANKS[name] for name in mixture)
        write_adapter(root / "gate" / f"concatenated{i}", concatenated(mixture, gate), rank)
    if any(not step.startswith("gate") for step in options.only):
        if options.shape != "small":
            write_model(root, options.shape, has_weights=False)
        folder = root / options.shape / "adapters"
        for i in range(max(options.adapters)):  # four different ones on the disk: each has its own place on the device
            if i < 4:
                write_adapter(folder / str(i), random_weights(options.shape, RANK, i), RANK)
            else:
                write_adapter(folder / str(i), folder / str(i % 4) / "adapter_model.safetensors", RANK)


class Step:
    """A step's process, its results and its log."""

    def __init__(self, name: str, arguments: list[str], logs: Path) -> None:
        self.name = name
        self.results: list[dict[str, Any]] = []
        self._log, self._out = logs / f"{name}.log", logs / f"{name}.jsonl"
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "HF_HUB_OFFLINE": "1",
            "VLLM_PLUGINS": "lora_retriever" if "ours" in name or name == "gate_two" else "none",
            "VLLM_LORA_ENABLE_DUAL_STREAM": "1" if name.endswith("two_streams") else "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        with self._log.open("w") as log, self._out.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *arguments, "--child", name],
                env={**os.environ, **environment},
                stdout=out,
                stderr=log,
            )

    def wait(self, seconds: float) -> bool:
        """Print its results as they come; False if it failed, or had to be ended."""
        deadline = time.monotonic() + seconds
        code, rest = None, ""
        with self._out.open() as out:
            while code is None and time.monotonic() < deadline:
                time.sleep(0.1)
                code = self._process.poll()
                *lines, rest = (rest + out.read()).split("\n")
                for line in lines:
                    if line.startswith('{"step"'):
                        print(line, flush=True)
                        self.results.append(json.loads(line))
        if code is None:
            self._process.kill()
        if code != 0:
            print(json.dumps({"step": self.name, "failed": code, "after_seconds": round(seconds)}), flush=True)
            print("\n".join(self._log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr, flush=True)
        return code == 0


def errors(root: Path, answers: dict[str, Any]) -> dict[str, float]:
    """By request: how far the tokens' log-probabilities are from the model's in float32, on average."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(root / "small", dtype=torch.float32)
    weights = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters()}
    found = {}
    for composition in {key.split(" ", 2)[2] for key in answers}:
        before = {}
        for name, factor in json.loads(composition).items():
            tensors = load_file(root / "gate" / name / "adapter_model.safetensors")
            for key in (key for key in tensors if ".lora_A." in key):
                target = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
                before.setdefault(target, weights[target].data.clone())
                lora_a, lora_b = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
                weights[target].data += factor * lora_b @ lora_a
        for key in answers:
            _, i, of = key.split(" ", 2)
            if of != composition:
                continue
            prompt, answer = gate_prompt(int(i)), answers[key]["token_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found[key] = statistics.fmean(
                abs(truth[int(token)] - logprob)
                for truth, top in zip(logits.log_softmax(-1).tolist(), answers[key]["tops"], strict=True)
                for token, logprob in top.items()
            )
        for target, weight in before.items():
            weights[target].data = weight
    return found


def _kind(key: str) -> str:
    """What a request runs: nothing, an adapter, a mixture, or one that is concatenated."""
    composition = json.loads(key.split(" ", 2)[2])
    if len(composition) > 1:
        return "mixture"
    return "base" if not composition else "concatenated" if "concatenated" in next(iter(composition)) else "adapter"


def judge_gate(root: Path, names: list[str]) -> None:
    """Print how far the answers of the gate's processes are from the model's, and whether the second's may be."""
    answers = {name: json.loads((root / f"{name}.json").read_text()) for name in names}
    for name, found in answers.items():
        print(json.dumps({"step": name, "different": len({tuple(answer["token_ids"]) for answer in found.values()})}))
    first, second = (errors(root, found) for found in answers.values())
    kinds: dict[str, dict[str, float]] = {}
    for key, error in second.items():
        kinds.setdefault(_kind(key), {})[key] = error
    means_of = {kind: round(statistics.fmean(found.values()), 5) for kind, found in kinds.items()}
    print(json.dumps({"step": names[1], "mean_errors": means_of}))
    judged = [(f"{names[1]} and {names[0]}", {key: second[key] for key in first if key in second}, first)]
    if "mixture" in kinds:
        judged.append((f"mixtures and concatenations, {names[1]}", kinds["mixture"], kinds["concatenated"]))
    for what, ours, theirs in judged:
        means = [round(statistics.fmean(each.values()), 5) for each in (ours, theirs)]
        worst = [round(max(each.values()), 5) for each in (ours, theirs)]
        passed = all(one <= max(NOTHING, most * other) for (one, other), most in ((means, FURTHER), (worst, WORST)))
        told = {"requests": len(ours), "mean_errors": means, "worst_errors": worst, "passed": passed}
        print(json.dumps({"step": names[1], "compared": what, **told}), flush=True)


def main() -> None:
    """Run the steps, and print the table of those that timed something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=["gate", "ours", "theirs", "base"])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    for name, value in (("requests", 64), ("prompt", 128), ("answer", 64), ("seconds", 3600)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--root", type=Path, help="where models and adapters are written")
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--vllm", type=json.loads, default={}, help="further arguments of vLLM's, as JSON")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        (answer_gate if options.child.startswith("gate") else time_cases)(options, options.root)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # vLLM's processes end with this one
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(dir=options.root) as folder:
        root, logs = Path(folder), options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        prepare(options, root)
        arguments = [*sys.argv[1:], "--root", folder]
        results: list[dict[str, Any]] = []
        for name in options.only:
            left = deadline - time.monotonic()
            if left < 30:
                print(json.dumps({"step": name, "failed": "no time left"}), flush=True)
                continue
            if name.startswith("gate"):
                names = GATES[name]
                running = [Step(each, arguments, logs) for each in names]
                if all([step.wait(deadline - time.monotonic()) for step in running]):  # noqa: C419 - each is waited for
                    judge_gate(root, names)
            else:
                step = Step(name, arguments, logs)
                step.wait(left)
                results += step.results
        show([result for result in results if "tokens_per_second" in result])


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    if not results:
        return
    print(f"{'step':>18} {'requests':>8} {'adapters':>8} {'k':>2} {'tokens/s':>9} {'of its base':>11}")
    for result in results:
        base = next(
            r["tokens_per_second"]
            for r in results
            if not r["k"] and (r["step"], r["requests"]) == (result["step"], result["requests"])
        )
        rate = result["tokens_per_second"]
        print(
            f"{result['step']:>18} {result['requests']:>8} {result['adapters']:>8} {result['k']:>2} {rate:>9.0f} "
            f"{rate / base:>11.3f}"
        )


if __name__ == "__main__":
    main()
