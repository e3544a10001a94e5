"""Causal language models: `loading` reads and writes them, `encoding` turns text into batches, `tokens` turns tokens into text.

`limits` measures which inputs a model can take, and `pretrained` is the base class of tasks on such a model.
"""
