"""Results as people see them: tables, in a terminal, in a notebook.

`tables` holds the table itself, `result` gives result objects their text and HTML form, `verdicts` says which metrics pass and fail.
`terminal` and `streams` print them and keep stdout and stderr safe to use.
"""
