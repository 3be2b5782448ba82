"""The checks of `benchmarks/gpu.py`: one row each, made of the real commands and judged by the files they write."""
