"""Runnable recipes; each states its commands and the numbers to expect at its top."""
