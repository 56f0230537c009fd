"""What every engine refuses, and in which words."""

from __future__ import annotations

from collections.abc import Iterable

from mas_hpc.errors import RolloutError
from mas_hpc.rollout.engine import Request


def unservable(request: Request, context_limit: int) -> str:
    """Why a request cannot be served by a model whose context has `context_limit` tokens; "" when it can."""
    if not request.prompt_ids:
        return "the prompt is empty: the first token is predicted from at least one; begin it with a bos token"
    wanted = len(request.prompt_ids) + request.sampling.max_new_tokens
    if wanted > context_limit:
        return (
            f"prompt of {len(request.prompt_ids)} tokens + max_new_tokens={request.sampling.max_new_tokens} "
            f"is {wanted}, beyond the model's context of {context_limit}; shorten the prompt or lower max_new_tokens"
        )
    return ""


def unknown_policy(policy: str, known: Iterable[str]) -> RolloutError:
    """The error of a request whose policy has no adapter in the engine."""
    return RolloutError(
        f"policy {policy!r}: the engine has no adapter of that name; expected one of {sorted(known)}; "
        "add it to the adapters of the model or map the agent to another policy"
    )
