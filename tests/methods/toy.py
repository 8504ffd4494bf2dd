# SPDX-License-Identifier: Apache-2.0
"""A method whose experiment takes no time and whose numbers are known."""

from fastflat.methods import Arm, Check, Claim, Experiment, Figure, Method, Settings


def make(better: float = 1.0, checked: float = 1.0) -> tuple[Method, list]:
    """A method, and the list of (arm, seed, choice, steps) that its arms have run."""
    ran = []

    def arm(name: str, passes: float, bonus: float) -> Arm:
        def run(seed: int, settings: Settings) -> dict[str, float]:
            ran.append((name, seed, dict(settings.choice), settings.steps))
            good = -abs(settings.choice["lr"] - (0.1 if name == "base" else 0.3))
            score = bonus + 0.01 * seed + good
            return {
                "seconds_per_step": passes,
                "validation_accuracy": good,
                "test_accuracy": score,
                "loss": -score + (0.5 if seed == 1 and name == "<new>" else 0.0),
            }

        return Arm(name, run, passes)

    method = Method(
        name="toy",
        number=2,
        title="On <toys>",
        authors="A. Nobody",
        year=2021,
        arxiv="2101.00001",
        claim="The new way is better.",
        kernels=("descent",),
        check=lambda: [Check("one", 1.0, checked, 0.0, "equation 1")],
        experiment=Experiment(
            summary="Nothing is trained.",
            arms=(arm("base", 1, 0.0), arm("<new>", 2, better)),
            claims=(Claim("test_accuracy", "<new>", "base"), Claim("loss", "<new>", "base", "lower", margin=0.3)),
            full=Settings(passes=101, seeds=3),
            quick=Settings(passes=11, seeds=1, tune=False),
            figure=Figure("dots", ("test_accuracy", "loss")),
            grid={"lr": (0.2, 0.1, 0.3)},
        ),
    )
    return method, ran
