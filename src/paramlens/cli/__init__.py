"""The command line. Read `main` first."""
