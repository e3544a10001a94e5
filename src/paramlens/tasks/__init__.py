"""What is decomposed: each task owns its target and its batches.

`induction` is the paper's toy model, `facts` sentences of a language model (`miniature` trains a small one), `text` running text, and
`batches` the caller's own data. `loading`, `tokens`, `language` and `limits` deal with language models, `reading` with the user's files.
"""
