"""Lookup programs on CUDA devices. Only ``status`` may be imported where triton is not installed."""
