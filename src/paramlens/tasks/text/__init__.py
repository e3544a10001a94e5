"""Running text through a language model: `task` has the configuration, and `pieces` makes batches of the text."""
