"""Which students are trained, from whom, in which order."""

from dataclasses import dataclass, replace

from fulgurite.training.distil import Adversary, Distillation
from fulgurite.training.loop import Adam

RANK = 64  # of the published LoRA files


@dataclass(frozen=True)
class Pace:
    """How fast students learn: rates of the first stage, of LoRAs against both discriminators, of whole UNets.

    ``discriminator`` and ``heads``: the discriminators' own rates, where they are not the student's.
    """

    squared: float
    conditional: float
    relaxed: float
    whole: float
    discriminator: float | None
    heads: float | None
    alone: Adam  # by squared error
    against: Adam  # a discriminator
    edges: bool  # whether small changes are those of the first and last convolutions and of the embeddings, too


# The paper's section 3.6, of batches of 512.
SDXL_PACE = Pace(
    1e-5, 1e-6, 1e-6, 5e-7, None, None, Adam(0.9, 0.999, decay=0), Adam(0.0, 0.99, decay=0), edges=False
)  # fmt: skip
# Of the small model: a hundredth of the updates, of smaller batches.
SMALL_PACE = Pace(1e-4, 3e-4, 2e-4, 2e-5, 3e-5, 1e-3, Adam(), Adam(0.5), edges=True)

# Where steps are short, ends are looked at as they are; of one or two steps with noise added, so that structure counts
# as much as detail does; at last, detail more (the paper's section 3.7.2).
AS_THEY_ARE, NOISED, MOSTLY_FINE = (0,), (10, 250, 500, 750), 5 * (10,) + (250, 500, 750)
FOUR = 4  # timesteps at which students of one and two steps learn to begin: 250, 500, 750, 1000 (its section 3.7.1)
UPDATES = 6_000, 3_000, 3_000  # of an adversarial student's three parts


def adversarial(
    pace: Pace,
    steps: int,
    teacher: str,
    farther: str,
    beneath: Distillation | None = None,
) -> tuple[Distillation, ...]:
    """A student of a whole UNet, as the paper's each stage has it, of teachers that are named by their steps.

    First a LoRA on the teacher, or on what is ``beneath``, against a discriminator that sees where steps begin, then
    against one that does not; then the LoRA is merged, and the whole UNet learns on against the second kind. That one
    asks for no path, so its examples may be ``farther``'s, the teacher's teacher, who draws better (the paper's section
    3.4).
    """
    few = steps <= 2
    at, at_last = (NOISED, MOSTLY_FINE) if few else (AS_THEY_ARE, AS_THEY_ARE)
    adversary = Adversary(at=at, peak=pace.discriminator, heads=pace.heads)
    knowing = Distillation(
        f"{steps}-conditional", teacher, int(teacher), steps, "conditional", None, UPDATES[0], pace.conditional, RANK,
        beneath.name if beneath else teacher, prediction=beneath.prediction if beneath else None,
        begins=FOUR if few else None, adversary=adversary, adam=pace.against, edges=pace.edges,
    )  # fmt: skip
    relaxed = replace(
        knowing,
        name=f"{steps}-relaxed",
        teacher=farther,
        teacher_steps=int(farther),
        objective="relaxed",
        start=knowing.name,
        updates=UPDATES[1],
        peak=pace.relaxed,
    )
    whole = replace(
        relaxed,
        name=str(steps),
        start=relaxed.name,
        updates=UPDATES[2],
        peak=pace.whole,
        rank=None,
        adversary=replace(adversary, at=at_last),
    )
    return knowing, relaxed, whole


def paper(pace: Pace, beneath: Distillation | None = None) -> tuple[Distillation, ...]:
    """SDXL-Lightning's own stages (arXiv 2402.13929): squared error with guidance once, then adversarially.

    How many updates is not said there. ``beneath``: whom the student of one step begins with, if not that of two.
    """
    return (
        Distillation("32", None, 128, 32, "squared", None, 20_000, pace.squared, None, adam=pace.alone),
        *adversarial(pace, 8, "32", "32"),
        *adversarial(pace, 4, "8", "8"),
        *adversarial(pace, 2, "4", "8"),
        *([beneath] if beneath else []),
        *adversarial(pace, 1, "2", "4", beneath=beneath),
    )


SMALL = paper(SMALL_PACE)

# SDXL predicts noise. From pure noise that says next to nothing of the clean latent, so the student of one step
# predicts that instead: first what the student of two steps would make of it in one (the paper's section 3.7.3).
SDXL = paper(
    SDXL_PACE,
    Distillation(
        "1-x0",
        teacher="2",
        teacher_steps=1,
        steps=1,
        objective="squared",
        start=None,
        updates=3_000,
        peak=SDXL_PACE.squared,
        rank=None,
        upon="2",
        prediction="x0",
        begins=FOUR,
        adam=SDXL_PACE.alone,
    ),
)

# A discriminator that is ahead of the student: of one step's latents the finest features at next to no noise tell most.
KEEN = Adversary(at=(10,), resolutions=2, peak=3e-4, heads=1e-3, ahead=450, turns=3)

# What two CPU cores bear. The undistilled small model is as good in 4 steps as in 32, so all that a student of 8, 4 or
# 2 steps takes from it is guidance, and one file serves for them. Of the strength it takes the one that the evaluator
# likes best. That of one step, blurred by squared error alone, learns from data besides, and ends half
# way: all the way surfaces are blotched.
QUICK = (
    Distillation("guided", None, 8, 8, "squared", None, 4800, 2e-3, 12, guidance=2.0),
    Distillation("1-squared", "guided", 4, 1, "squared", None, 200, 1e-3, 2, upon="guided"),
    Distillation(
        "1", None, 1, 1, "data", "1-squared", 2100, 3e-4, 2, upon="guided", adversary=KEEN, adam=Adam(0.5), share=0.5
    ),
)
