"""Run vLLM's `LLM` with plain adapters and compositions in a process of its own; its tokens and seconds, as JSON.

Its arguments are a job and the file to write. A job is `{"model": FOLDER, "arguments": {...}, "max_tokens": N,
"num_runs": 1, "requests": [...]}`, and each request `[prompt_token_ids, [[name, folder, weight], ...]]`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Answer all requests in one batch."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from langchain_lora_retriever.vllm.compositions import Compositions, Member

    llm = LLM(job["model"], **job["arguments"])
    ids: dict[str, int] = {}
    compositions = Compositions()

    def request_of(members: list[Any]) -> Any:
        known = [Member(ids.setdefault(name, len(ids) + 1), name, path, weight) for name, path, weight in members]
        if len(known) == 1:
            return LoRARequest(known[0].name, known[0].lora_int_id, known[0].path)
        return compositions.request("mixture", known) if known else None

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in job["requests"]]
    loras = [request_of(members) for _, members in job["requests"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    seconds, outputs = 0.0, []
    for _ in range(job.get("num_runs", 1)):
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        seconds = time.perf_counter() - start
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps({"token_ids": token_ids, "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
