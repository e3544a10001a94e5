"""Analyses of a decomposition. Everything here reads a run directory and never uses the trainer.

Read `circuit` first. `commands/` holds each analysis as an object (`analysis`): its command with options, and its section of the page.
"""
