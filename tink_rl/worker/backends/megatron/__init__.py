"""A Megatron-LM text-generation server behind the queue of the worker."""
