"""Compile, cache, load and launch kernels; memory that peers reach; groups of ranks.

No module here knows what the kernels compute, and none does work at import.
"""
