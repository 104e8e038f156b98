"""Registered adapters on disk: checked copies by digest, and which id means which of them."""
