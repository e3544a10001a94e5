"""The command line: parse, call, print. Read `main` first."""
