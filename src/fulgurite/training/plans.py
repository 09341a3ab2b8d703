"""Which students are trained, from whom, in which order."""

from dataclasses import replace

from fulgurite.training.distil import Distillation, Judging

RANK = 64  # of the published LoRA files


def adversarial(
    teacher: str,
    teacher_steps: int,
    steps: int,
    updates: tuple[int, int, int],
    upon: str | None = None,
    prediction: str | None = None,
) -> tuple[Distillation, ...]:
    """A student of a whole UNet, as the paper's each stage has it.

    First small changes upon the teacher, against a judge that sees where steps begin, then against one that does not;
    then these are merged, and the whole UNet learns on against the second kind.
    """
    knowing = Distillation(
        f"{steps}-conditional",
        teacher,
        teacher_steps,
        steps,
        "conditional",
        None,
        updates[0],
        3e-4,
        RANK,
        upon or teacher,
        prediction=prediction,
    )
    relaxed = replace(
        knowing, name=f"{steps}-relaxed", objective="relaxed", start=knowing.name, updates=updates[1], peak=2e-4
    )
    whole = replace(relaxed, name=str(steps), start=relaxed.name, updates=updates[2], peak=2e-5, rank=None)
    return knowing, relaxed, whole


# SDXL-Lightning's own stages (arXiv 2402.13929): squared error with guidance once, then adversarially.
PAPER = (
    Distillation("32", None, 128, 32, "squared", None, 20_000, 1e-4, None),
    *adversarial("32", 32, 8, (6_000, 3_000, 3_000)),
    *adversarial("8", 8, 4, (6_000, 3_000, 3_000)),
    *adversarial("4", 4, 2, (6_000, 3_000, 3_000)),
    *adversarial("2", 2, 1, (6_000, 3_000, 3_000)),
)

# The same for SDXL, which predicts noise. From pure noise that says next to nothing of the clean latent, so the student
# of one step predicts that instead, which it is first taught by squared error.
SDXL = (
    *PAPER[:-3],
    Distillation("1-x0", "2", 2, 1, "squared", None, 3_000, 1e-5, None, "2", prediction="x0"),
    *adversarial("2", 2, 1, (6_000, 3_000, 3_000), upon="1-x0", prediction="x0"),
)

# A judge that is ahead of the student: of one step's latents the finest features at next to no noise tell the most.
KEEN = Judging(at=(10,), resolutions=2, peak=3e-4, ahead=450, turns=3)

# What two CPU cores bear. The undistilled small model is as good in 4 steps as in 32, so all that a student of 8, 4 or
# 2 steps takes from it is guidance, and one file serves for them. Of the strength it takes the one that the judge of
# finished models likes best. That of one step, blurred by squared error alone, learns from data besides, and ends half
# way: all the way surfaces are blotched.
QUICK = (
    Distillation("guided", None, 8, 8, "squared", None, 320, 2e-3, 10, guidance=2.0),
    Distillation("1-squared", "guided", 4, 1, "squared", None, 200, 1e-3, 2, upon="guided"),
    Distillation("1", None, 1, 1, "data", "1-squared", 2100, 3e-4, 2, upon="guided", judging=KEEN, share=0.5),
)
