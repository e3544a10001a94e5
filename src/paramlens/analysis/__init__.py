"""What a decomposition says: everything here reads a run directory and never the trainer.

Read `circuit` first. `commands/` has each analysis as an object (`analysis`): its command with options, and its section of the page.
"""
