"""The Tink worker: an HTTP API, a queue and a backend that samples from many adapters by name."""
