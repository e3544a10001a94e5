"""Causal language models: `loading` reads and writes them, `encoding` makes batches of text, `tokens` makes text of tokens.

`limits` measures what a model can be given, and `pretrained` is what tasks on such a model have in common.
"""
