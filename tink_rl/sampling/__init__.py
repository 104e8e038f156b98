"""Which adapter versions lie on a vLLM server: loaded on demand, used by count, dropped when idle."""
