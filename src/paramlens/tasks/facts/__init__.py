"""Sentences of a language model (§5.2): `task` names it, `facts` has facts and how well a model knows them, `sentences` its batches.

`miniature` trains the small GPT-2 that is decomposed where no other model is given.
"""
