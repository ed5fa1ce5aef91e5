"""The one place where the version is written; packaging and checkpoints read it from here."""

__version__ = "0.1.0"
