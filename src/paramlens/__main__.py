"""`python -m paramlens` is the command `paramlens`."""

from paramlens.cli.main import entry

if __name__ == "__main__":
    entry()
