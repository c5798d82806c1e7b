"""Configs, choices and variants: which kernel is compiled, for which shape and GPU. No launch."""
