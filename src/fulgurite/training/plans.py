"""Which students are trained, from whom, in which order."""

from fulgurite.training.distil import Distillation


def adversarial(
    teacher: str | None, teacher_steps: int, steps: int, start: str, updates: tuple[int, int]
) -> tuple[Distillation, Distillation]:
    """A student trained against a judge that sees where steps begin, then against one that does not."""
    knowing = Distillation(
        f"{steps}-conditional", teacher, teacher_steps, steps, "conditional", start, updates[0], 3e-4
    )
    relaxed = Distillation(str(steps), teacher, teacher_steps, steps, "relaxed", knowing.name, updates[1], 2e-4)
    return knowing, relaxed


# SDXL-Lightning's own stages (arXiv 2402.13929): squared error with guidance once, then adversarially.
PAPER = (
    Distillation("32", None, 128, 32, "squared", None, 20_000, 5e-4),
    *adversarial("32", 32, 8, "32", (10_000, 5_000)),
    *adversarial("8", 8, 4, "8", (10_000, 5_000)),
    *adversarial("4", 4, 2, "4", (10_000, 5_000)),
    *adversarial("2", 2, 1, "2", (10_000, 5_000)),
)

# What two CPU cores bear: squared errors all the way down.
QUICK = (
    Distillation("8", None, 16, 8, "squared", None, 400, 2e-3),
    Distillation("4", "8", 8, 4, "squared", "8", 400, 2e-3),
    Distillation("2", "4", 4, 2, "squared", "4", 350, 2e-3),
    Distillation("1", "2", 2, 1, "squared", "2", 350, 2e-3),
)
