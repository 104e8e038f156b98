"""The doors into training; the only rooms that import trl."""
