"""The ways into training; the only modules that import trl."""
