"""The version of this library, for whatever records it; the package itself is above everything that does."""

__version__ = "0.1.0"
