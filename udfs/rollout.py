"""Answers drawn from the policy in plain torch, for GRPO: which pairs are answered, and what the policy writes.

In the training process, because the policy changes with every step: an engine would have to be given the weights anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from udfs.answer import Form
from udfs.difficulty import Difficulty
from udfs.forest import Row

if TYPE_CHECKING:
    import torch

REFILLS = 8  # draws for a batch of groups with spread before groups without any are taken


class Rollout(NamedTuple):
    """answers: number of a pair and the ids of its group of answers. drawn, without_spread: groups looked at."""

    answers: list[tuple[int, list[list[int]]]]
    drawn: int
    without_spread: int


def rolled_out(
    model: Any,
    rows: Sequence[Row],
    difficulty: Difficulty,
    form: Form,
    groups: int,
    tokens: int,
    key: tuple[int, ...],
) -> Rollout:
    """`groups` groups of answers, sampled at temperature 1 from the policy.

    Post-CoT the labels of a group are drawn from one prefill; a group whose labels are all right or all wrong is put
    back and another pair drawn, up to `REFILLS` times, and only then are chains written. What fails to find spread goes
    to the trainer as it is. With uniform sampling, and pre-CoT, where the label comes last, nothing is put back.
    """
    import torch

    model.eval()
    kept: list[tuple[int, list[int]]] = []  # number of a pair, first token of each of its answers
    spare: dict[int, list[int]] = {}  # likewise, without spread
    drawn = without = 0
    with torch.no_grad():
        for attempt in range(REFILLS):
            numbers = [int(i) for i in difficulty.draw(groups - len(kept), *key, attempt)]
            numbers = [i for i in numbers if i not in {n for n, _ in kept}]
            if not numbers:
                continue
            firsts = first_tokens(model, [rows[i].prompt for i in numbers], difficulty.group)
            for i, first in zip(numbers, firsts, strict=True):
                rights = sum(token == rows[i].answer[0] for token in first)
                has_spread = 0 < rights < difficulty.group
                drawn += 1
                without += not has_spread
                if has_spread or difficulty.uniform or form.order == "pre":
                    kept.append((i, first))
                else:
                    spare[i] = first
            if len(kept) >= groups:
                break
        here = {i for i, _ in kept}
        found = [*kept, *((i, first) for i, first in spare.items() if i not in here)]
        chosen = found[:groups]
        while len(chosen) < groups:  # fewer pairs than groups
            chosen.append(found[len(chosen) % len(found)])
        prompts = [rows[i].prompt for i, _ in chosen]
        written = continued(model, prompts, [firsts for _, firsts in chosen], form.end_ids, tokens)
    model.train()
    return Rollout([(i, answers) for (i, _), answers in zip(chosen, written, strict=True)], drawn, without)


def first_tokens(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` first tokens for each prompt, drawn from the whole vocabulary at temperature 1 off one prefill."""
    import torch

    logits = model(**_padded(model, prompts), use_cache=False, logits_to_keep=1).logits[:, -1].float()
    drawn: list[list[int]] = torch.multinomial(torch.softmax(logits, dim=-1), count, replacement=True).tolist()
    return drawn


def continued(
    model: Any, prompts: Sequence[Sequence[int]], firsts: Sequence[Sequence[int]], end_ids: Sequence[int], tokens: int
) -> list[list[list[int]]]:
    """Answers that begin with `firsts`, one list a prompt, sampled on at temperature 1 to an end or `tokens` long.

    A prompt is prefilled once; its keys and values are then shared out to its answers.
    """
    import torch

    inputs = _padded(model, prompts)
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    size = len(firsts[0])
    cache.batch_repeat_interleave(size)
    seen = inputs["attention_mask"].repeat_interleave(size, dim=0)
    position = inputs["position_ids"][:, -1:].repeat_interleave(size, dim=0)
    ends = torch.tensor(list(end_ids), device=seen.device)
    token = torch.tensor(firsts, device=seen.device).reshape(-1, 1)
    written = [token]
    ended = torch.isin(token, ends)
    while len(written) < tokens and not ended.all():
        position = position + 1
        seen = torch.nn.functional.pad(seen, (0, 1), value=1)
        logits = model(
            input_ids=token, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        token = torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)
        token = torch.where(ended, ends[0], token)
        ended |= torch.isin(token, ends)
        written.append(token)
    answers = []
    for ids in torch.cat(written, dim=1).tolist():
        end = next((i + 1 for i, token_id in enumerate(ids) if token_id in end_ids), len(ids))
        answers.append(ids[:end])
    return [answers[i * size : (i + 1) * size] for i in range(len(prompts))]


def _padded(model: Any, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompts side by side, all ending in the last column."""
    import torch

    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}
