"""Scores of a gate, as DeepEP 2's own test scripts draw them."""

import math

import torch

__all__ = ["get_unbalanced_scores"]


def get_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float, precise: bool
) -> torch.Tensor:
    """Scores by which rank 0 gets about `ratio` times the tokens of another rank.

    A part of the tokens has the best score at an expert of rank 0; the others have none there.

    Args:
        num_tokens: of this rank.
        num_experts: over all ranks.
        num_ranks: of the group.
        num_topk: choices a token.
        ratio: 1 = uniform, unless `precise`.
        precise: exactly so many tokens as the ratio says on average, instead of about so many.

    Returns:
        float32 `[num_tokens, num_experts]` in [0, 2).
    """
    scores = torch.rand((num_tokens, num_experts), dtype=torch.float32)
    num_local = num_experts // num_ranks
    others = num_experts - num_local
    if (ratio == 1 and not precise) or num_topk > others:
        return scores

    def reached(choices: int) -> float:
        """How likely one of the other ranks is reached by so many choices there."""
        return 1 - math.comb(others - num_local, choices) / math.comb(others, choices)

    # f = ratio * (f * reached(K - 1) + (1 - f) * reached(K))
    with_all, with_one_less = reached(num_topk), reached(num_topk - 1)
    part = min(1.0, ratio * with_all / (1 + ratio * (with_all - with_one_less)))
    if precise:
        is_first = torch.randperm(num_tokens) < round(part * num_tokens)
    else:
        is_first = torch.rand(num_tokens, dtype=torch.float32) < part
    own, token = scores[:, :num_local].argmax(dim=1), torch.arange(num_tokens)
    best = scores[token, own]
    scores[:, :num_local] = 0
    scores[token, own] = torch.where(is_first, best + 1, 0)
    return scores
