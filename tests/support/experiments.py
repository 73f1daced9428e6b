"""Experiments that are over in a moment."""

TINY = """
title = "tiny"
dtype = "float32"
[sizes.local]
batch = 2
tokens = 32
[sizes.local.model]
d_model = 32
vocabulary = 256
layers = [{ repeat = 2, heads = 4, head_dim = 8, mlp_hidden = 64 }]
[[plans]]
role = "baseline"
family = "baseline"
[[plans]]
role = "proposed"
family = "ring"
"""
