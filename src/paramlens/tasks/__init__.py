"""What is decomposed. A task is one object that has its fields of the configuration, its target and its batches.

`base` defines the interface of a task and `registry` lists the tasks: `induction` is the paper's toy model, `facts` a few sentences through
a language model, `text` running text through a language model, and `custom` the caller's own model (`batches` reads its batches).
`language_models` loads and saves language models, and `reading` reads the user's text files.
"""
