"""A plan of example-level privacy as text."""

from __future__ import annotations

from fedcore.observability.words import counted, epsilon_text
from server.privacy.plan import ExamplePrivacyPlan


def table(found: ExamplePrivacyPlan) -> str:
    """Formats the plan as text."""
    plan, question, privacy = found.forecast, found.question, found.question.privacy
    how = "given" if privacy.noise_multiplier != "auto" else f"least for {privacy.max_epsilon:g}"
    lines = [
        f"Example-level privacy (one example, or a null record in its place) of a client with "
        f"{counted(plan.examples, 'example', ',')}.",
        "",
        f"noise multiplier      {plan.noise_multiplier:.4f}  ({how}, by {privacy.accountant})",
        f"epsilon               {epsilon_text(plan.epsilon)} of {privacy.max_epsilon:g} at delta "
        f"{privacy.target_delta:g} after "
        f"{plan.participations:,} {'round' if plan.participations == 1 else 'rounds'}",
        f"steps                 {plan.steps_per_round:,} "
        f"{'in round 1' if question.epochs else 'a round'}, {plan.steps:,} in all, of "
        f"{plan.batch_size:.1f} examples expected (rate {plan.sample_rate:.4g})",
        f"gradients             {plan.gradients_per_round:,} expected a round",
        f"noise, mean gradient  {plan.step_noise:.4g} of clip_norm in a coordinate of one step; "
        f"{plan.run_noise:.3g} in the mean over all",
    ]
    if found.lasts < plan.participations:
        lines.append(
            f"budget lasts          {counted(found.lasts, 'round')}; then the client declines"
        )
    lines += ["", f"{'round':>8}  {'epsilon':>8}"]
    chosen = found.epsilons[:: max(1, len(found.epsilons) // 10)]
    chosen += () if chosen[-1] == found.epsilons[-1] else (found.epsilons[-1],)
    lines += [f"{number:>8,}  {epsilon_text(epsilon):>8}" for number, epsilon in chosen]
    lines += [
        "",
        f"{'what would help':<34}{'noise':>10}{'epsilon':>10}{'a step':>10}{'overall':>10}",
    ]
    for change, row, refused in [
        ("as planned", plan, ""),
        *((each.change, each.forecast, each.refused) for each in found.what_if),
    ]:
        if row is None:
            lines.append(f"{change:<34}  refused: {refused.split('. ')[0]}")
            continue
        lines.append(
            f"{change:<34}{row.noise_multiplier:>10.4f}{epsilon_text(row.epsilon):>10}"
            f"{row.step_noise:>10.4g}{row.run_noise:>10.3g}"
        )
    return "\n".join(lines)
