"""All of reinforcement learning with LoRA on one page, without a trainer.

Sample from the version that is served, score, take a step, publish: `train` below is the whole loop,
with an optimizer of torch, a reward that is a function, and a vLLM server that always holds the policy.

No GPU (two cores, about a minute once vLLM has started; the tiny base is trained on first use):

    python -m recipes.loop

A server of your own (`tink-rl serve MODEL`), and a model that knows the task a little:

    python -m recipes.loop --vllm_server http://127.0.0.1:8000 --model MODEL

Letters in names: P prompts, G completions of each, B = P x G rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.evaluate import accuracy
from recipes.tasks import Task, load_task
from recipes.tiny_base import ensure_tiny_base
from tink_rl import SyncConfig, VLLMClient, VLLMServer, WeightSync
from tink_rl.gpus import exact_dtype

NUM_PROMPTS, GROUP, MAX_TOKENS = 16, 8, 8
LEARNING_RATE = 1e-3


def train(
    model: Any, tokenizer: Any, task: Task, client: VLLMClient, sync: WeightSync, num_steps: int
) -> list[dict[str, float]]:
    """Train the LoRA of `model`; reward and version of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    record = sync.publish(model)  # a fresh LoRA equals its base
    history = []
    for step in range(num_steps):
        problems = task.train[NUM_PROMPTS * step : NUM_PROMPTS * (step + 1)]
        output = client.generate(
            tokenizer(problems["prompt"])["input_ids"],
            n=GROUP,
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            model=record.name,  # the version just published; another one would be refused
        )
        answers = [answer for answer in problems["answer"] for _ in range(GROUP)]
        texts = tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
        rewards_B = torch.tensor(task.reward(completions=texts, answer=answers))

        loss = policy_gradient_loss(model, output, advantages_of(rewards_B))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

        history.append({"reward": rewards_B.mean().item(), "version": record.version})
        record = sync.publish(model)
        if step % 5 == 0 or step == num_steps - 1:
            print(
                f"{record.name}: reward of the step {history[-1]['reward']:.2f}, "
                f"published in {1e3 * record.seconds:.0f} ms",
                flush=True,
            )
    return history


def advantages_of(rewards_B: torch.Tensor) -> torch.Tensor:
    """How much better than the other completions of its prompt each one is (GRPO)."""
    rewards_PG = rewards_B.view(-1, GROUP)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return (centred_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-4)).flatten()


def policy_gradient_loss(
    model: Any, output: dict[str, Any], advantages_B: torch.Tensor
) -> torch.Tensor:
    """Mean over the sampled tokens of -advantage x pi / pi_sampler.

    The server says with which logprob it drew each token, so that the ratio also corrects what little
    server and trainer compute differently; its value is 1, its gradient the policy's.
    """
    prompts = [ids for ids in output["prompt_ids"] for _ in range(GROUP)]
    rows = [p + c for p, c in zip(prompts, output["completion_ids"], strict=True)]
    ids_BT = _padded(rows).to(model.device)
    sampled_BT = _padded(
        [
            [0] * len(prompt) + [1] * len(completion)
            for prompt, completion in zip(prompts, output["completion_ids"], strict=True)
        ]
    ).to(model.device)
    theirs_BT = _padded(
        [
            [0.0] * len(prompt) + [values[0] for values in logprobs]
            for prompt, logprobs in zip(prompts, output["logprobs"], strict=True)
        ]
    ).to(model.device)
    logprobs_BTV = model(input_ids=ids_BT).logits[:, :-1].float().log_softmax(-1)
    ours_BT = logprobs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    ratio_BT = (ours_BT - theirs_BT[:, 1:]).exp()
    weights_BT = sampled_BT[:, 1:] * advantages_B[:, None].to(model.device)
    return -(ratio_BT * weights_BT).sum() / sampled_BT.sum()


def _padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Rows of any length side by side; what is behind their ends is 0 and seen by no token before it."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@contextmanager
def server_of(options: argparse.Namespace, base: str) -> Iterator[tuple[str, str | None]]:
    """URL of a server of `base`, and the file of its token: the one that was given, or one for this run."""
    if options.vllm_server != "auto":
        yield options.vllm_server, options.token_file
        return
    print("starting vLLM (about 40 s on two cores)", flush=True)
    with VLLMServer(base, mode="both", dtype=exact_dtype("both"), max_lora_rank=16) as server:
        yield server.url, str(server.token_file)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train and measure; reward and version of each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="The base; default: the tiny base.")
    parser.add_argument("--vllm_server", default="auto", help="URL; auto: start one.")
    parser.add_argument("--token_file", help="Token of the control routes.")
    parser.add_argument("--policy", default="loop", help="Its name on the server.")
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args(arguments)

    base = options.model or str(ensure_tiny_base())
    task, tokenizer = load_task("digits"), AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    with server_of(options, base) as (url, token_file):
        config = SyncConfig(policy=options.policy, token_file=token_file)
        with VLLMClient(url) as client, WeightSync(url, base_model=base, config=config) as sync:
            history = train(model, tokenizer, task, client, sync, options.max_steps)
            last = str(sync.current.name) if sync.current else base
            right = accuracy(client, task, tokenizer, model=last, temperature=1.0)
    print(f"{last} answers {right:.2f} of problems that it never saw")
    return history


if __name__ == "__main__":
    main()
