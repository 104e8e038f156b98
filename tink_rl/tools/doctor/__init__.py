"""Looks at an environment, a model, a server or an adapter, and says what to do about what it finds."""
