"""What is decomposed. A task is one object, which owns its fields of the configuration, its target and its batches.

`base` says what a task answers, and `registry` lists all of them: `induction` is the paper's toy model, `facts` sentences of a language
model, `text` running text, and `custom` a model of the caller's own, whose `batches` come in many forms. `language_models` loads and saves
those, and `reading` reads the user's text files.
"""
