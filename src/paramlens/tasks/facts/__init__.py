"""Sentences through a language model (§5.2): `task` has the configuration, `facts` facts and their recall, `sentences` the batches.

`miniature` trains the small GPT-2 that is decomposed if no other model is given.
"""
