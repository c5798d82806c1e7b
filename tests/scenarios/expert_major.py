"""Scenarios of rows by expert, a process a rank: on the CPU (tests/cpu), on GPUs (tests/dist)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from tests.rounds.expert_major import ExpertRound, check_expert_round, random_expert_round
from tests.scenarios.normal import make_buffer, set_up, synchronize


def random_rounds(
    group: dist.ProcessGroup, environ: Mapping[str, str], num_rounds: int, max_tokens: int
) -> int:
    """Rounds that differ in everything.

    Returns:
        Rounds that were compared.
    """
    set_up(group, environ)
    buffer = make_buffer(group)
    for seed in range(num_rounds):
        case = random_expert_round(group.size(), 7000 + seed, num_sms=12, max_tokens=max_tokens)
        check_expert_round(buffer, case)
    synchronize(buffer)
    buffer.destroy()
    return num_rounds


def model_shapes(group: dist.ProcessGroup, environ: Mapping[str, str], tokens: int) -> int:
    """Rows of a model, padded to 128 an expert, with host synchronisation and static sizes.

    Returns:
        Rounds that were compared.
    """
    set_up(group, environ)
    buffer = make_buffer(group, num_nvl_bytes=64 << 20)
    cases = [
        ExpertRound(
            num_tokens=(tokens,) * group.size(),
            hidden=7168,
            num_experts=32 * group.size(),
            num_topk=8,
            seed=seed,
            alignment=128,
            zero_padding=True,
            worst=seed % 2 == 1,
            cast=cast,
            num_sms=24,
        )
        for seed, cast in enumerate((None, None, "fp8", "nvfp4"))
    ]
    for case in cases:
        check_expert_round(buffer, case)
    synchronize(buffer)
    buffer.destroy()
    return len(cases)
