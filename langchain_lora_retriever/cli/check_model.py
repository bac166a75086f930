"""`lora-retriever check-model`: what will happen with a base model, told before it is downloaded."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_lora_retriever.cli.options import JsonOption, check_model_name
from langchain_lora_retriever.cli.terminal import print_error, print_facts, print_json, status

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.model.outlook import DeviceFit, ModelOutlook

__all__ = ["check_model"]

_REQUEST_TOKENS = 2048
_RANK = 16


def check_model(
    model: Annotated[str, typer.Argument(help="Hub name or folder.", callback=check_model_name)],
    *,
    run: Annotated[bool, typer.Option("--run", metavar="", help="Load it, and let it answer.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="bfloat16, float16 or float32; as it would be loaded if not given."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", metavar="", help="Run Python code that comes with the model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what will happen with a base model, from its configuration alone: no weight is read."""
    from langchain_lora_retriever.engine.model.outlook import look_ahead  # noqa: PLC0415 - seconds to import

    kwargs: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if trust_remote_code:
        kwargs["trust_remote_code"] = True
    outlook = look_ahead(model, **kwargs)
    fit = None if outlook.refusal is not None else outlook.fit(request_tokens=_REQUEST_TOKENS, rank=_RANK)
    found = _try(model, kwargs) if run and outlook.refusal is None else None
    if as_json:
        values = dataclasses.asdict(outlook) | {"targets": outlook.targets}
        print_json(values | {"fit": fit and fit._asdict(), "run": found})
    else:
        print_facts(_facts(outlook, fit, found))
    if outlook.refusal is not None:
        print_error(outlook.refusal)
        raise typer.Exit(1)


def _facts(outlook: ModelOutlook, fit: DeviceFit | None, found: dict[str, Any] | None) -> dict[str, str]:
    facts = {"architecture": f"{outlook.architecture} ({outlook.model_type})"}
    if outlook.refusal is not None:
        return facts
    graphs = "steps of streams alone" if outlook.has_states else "yes"
    targets = ", ".join(f"{count} {name}" for name, count in outlook.targets.items())
    size = _size(outlook.weight_bytes)
    quantised = f", {outlook.quantisation}" if outlook.quantisation else ""
    facts |= {
        "layers": ", ".join(f"{count} {kind}" for kind, count in outlook.attention),
        "context": f"{outlook.max_model_len:,} tokens",
        "weights": f"{outlook.num_parameters / 1e9:.2f} billion, {size} ({outlook.dtype}{quantised})",
        "fused on a GPU": f"{outlook.num_fusable} of {outlook.num_layers} layers, if the check at the start agrees",
        "CUDA graphs": f"no: {', '.join(outlook.host_reads)}" if outlook.host_reads else graphs,
        "prefixes shared": "no: layers keep states" if outlook.has_states else "yes",
        "adapters may target": targets,
        "keys and values": f"{_size(outlook.token_bytes)} a token",
    }
    if outlook.missing_packages:
        facts["not installed"] = f"{', '.join(outlook.missing_packages)}, by which these weights are read"
    if outlook.state_bytes:
        facts["states"] = f"{_size(outlook.state_bytes)} a request"
    if fit is not None:
        facts[fit.device] = _fit_text(outlook, fit)
    if found is not None:
        fused = f"{found['fused']} of {found['layers']} layers fused"
        facts["run"] = f"{found['backend']}, {fused}, {found['graphs']} graphs; it answers {found['text']!r}"
    return facts


def _fit_text(outlook: ModelOutlook, fit: DeviceFit) -> str:
    if fit.free_bytes <= 0:
        return (
            f"{_size(fit.total_bytes)}: too small by {_size(-fit.free_bytes)}. Take a quantised edition, a smaller "
            "model, or several GPUs; what does not fit can be offloaded (device_map, offload_folder), which is slow."
        )
    return (
        f"{_size(fit.total_bytes)}, {_size(fit.free_bytes)} of them beside the weights: {fit.num_requests:,} requests "
        f"of {_REQUEST_TOKENS:,} tokens, and {fit.num_adapters:,} adapters of rank {_RANK} on all modules "
        f"({_size(_RANK * outlook.rank_bytes)} each)"
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _try(model: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Load the model, start an engine, and let it answer a few tokens."""
    from langchain_lora_retriever.engine import EngineWorker, load_base_model  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.types import SamplingParams  # noqa: PLC0415

    with (  # gptqmodel for one prints to standard output, which is the answer's
        status(f"Loading {model}"),
        redirect_stdout(sys.stderr),
        EngineWorker(load_base_model(model, **kwargs)) as worker,
    ):
        prompt = worker.tokenizer.encode("The capital of France is")
        answer = worker.submit(prompt, SamplingParams(max_tokens=8)).result(600)
        executor = worker.core.runner.executor
        return {
            "backend": executor.name,
            "fused": executor.num_fused_layers,
            "layers": len(worker.core.runner.probe.attention),
            "graphs": len(executor.graphs),
            "text": answer.text,
        }
