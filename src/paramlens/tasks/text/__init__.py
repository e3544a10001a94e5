"""Running text through a language model: `task` names it, and `pieces` cuts the text into batches."""
