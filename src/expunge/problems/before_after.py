"""Greedy answers to a few questions, before and after unlearning: what a person looks at first."""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.outcome import Outcome
from expunge.problems.causal_lm import CausalLM

EACH = 3
"""Questions of what is forgotten, and of what is kept."""


def answers(outcome: Outcome, device: str = "cpu", *, tokens: int = 32) -> list[dict[str, str]]:
    """Ask the original and the unlearned model for the first samples of each part.

    Of a text the first half is the question.

    Args:
        outcome: of a language model with a tokenizer, with its problem and request.
        device: where the models answer; they come back to where they were.
        tokens: most new tokens of an answer.

    Returns:
        `part` (`forget` or `retain`), `question`, `wanted` (the data's answer), `before` and `after`
        of each.
    """
    problem, request = outcome.problem, outcome.request
    assert isinstance(problem, CausalLM)
    assert request is not None
    forget = request.resolve(problem.train)
    parts = {"forget": forget, "retain": problem.train.without(forget)}
    asked = [(part, int(i)) for part, ids in parts.items() for i in ids[:EACH]]
    places = problem.train.positions([i for _, i in asked]).tolist()
    split = [problem.train.rows[p].asked for p in places]
    prompts = [prompt for prompt, _ in split]
    said = {
        name: problem.texts(_generate(problem, model, prompts, device, tokens))
        for name, model in (("before", problem.model), ("after", outcome.runnable()))
    }
    questions, wanted = problem.texts(prompts), problem.texts([answer for _, answer in split])
    return [
        {
            "part": part,
            "question": questions[n],
            "wanted": wanted[n].strip(),
            **{name: texts[n].strip() for name, texts in said.items()},
        }
        for n, (part, _) in enumerate(asked)
    ]


def _generate(
    problem: CausalLM, model: nn.Module, prompts: list[Tensor], device: str, tokens: int
) -> list[Tensor]:
    home = next(model.parameters()).device
    try:
        return problem.generate(model.to(device), prompts, tokens=tokens)
    finally:
        model.to(home)
