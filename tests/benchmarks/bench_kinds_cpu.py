"""What adapters of other kinds cost on a CPU beside plain ones, and what an activated LoRA saves; ratios of one run.

The sections of `bench_engine_gpu.py` over a random model of SmolLM2-135M's widths, in float32: eight requests of 16
tokens in and 16 out, adapters of rank 16 on all seven projections. That their answers are right is
`tests/integration/test_engine_kinds.py`'s to say.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests python tests/benchmarks/bench_kinds_cpu.py [--only kinds activated]
"""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers
from engine_gpu.bench import Bench
from engine_gpu.kinds import activated, kinds

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever.engine import EngineWorker

SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {"kinds": (kinds, 8), "activated": (activated, 12)}
"""What is timed, and over how many layers."""


class CpuBench(Bench):
    """A bench of a size for one core.

    Args:
        num_layers: Of the model.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(None, is_tiny=False)
        self.batch, self.num_in, self.num_out, self.rounds, self.num_adapters = 8, 16, 16, 6, 8
        self._shape = {
            "vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": num_layers,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 4096,
        }  # fmt: skip

    def engine(self, **changes: Any) -> EngineWorker:
        """An engine of a size for it."""
        return super().engine(kv_cache_bytes=512 << 20, lora_cache_bytes=512 << 20, **changes)


def main() -> None:
    """Run the sections; each prints what it finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    arguments = parser.parse_args()
    assert not torch.cuda.is_available(), "hide the GPU: CUDA_VISIBLE_DEVICES="
    for name in arguments.only:
        section, num_layers = SECTIONS[name]
        bench = CpuBench(num_layers)
        bench.put("device", f"{platform.machine()}, {torch.get_num_threads()} threads")
        bench.put("versions", f"torch {torch.__version__}, transformers {transformers.__version__}")
        section(bench)


if __name__ == "__main__":
    main()
