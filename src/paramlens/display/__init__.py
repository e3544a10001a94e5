"""Display of results as tables in a terminal or a notebook.

`tables` has the tables as data, `result` the text and HTML form of results, `verdicts` the limits at which metrics pass or fail.
`terminal` prints tables, and `streams` makes stdout and stderr safe to use.
"""
