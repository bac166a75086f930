"""The sections of `bench_engine_gpu.py`."""
