"""`import vllm_backend` as in the earlier integration; everything is in `tink_rl.vllm_backend`."""

from tink_rl.vllm_backend import *  # noqa: F403
