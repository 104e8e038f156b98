"""Lives inside vLLM's processes: plugin, routes, receiver."""
