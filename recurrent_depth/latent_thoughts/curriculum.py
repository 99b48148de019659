r"""From written steps to latent slots, stage by stage: :class:`Curriculum` (arXiv:2412.06769).

At stage k the first k · ``steps_per_stage`` steps of the chain are left out and k · c latents stand in their place.
Stage 0 is ordinary chain of thought. After the last latent stage one more stage may drop whatever text is left, with
the latents of the stage before.

The number of latents is a function of the stage alone. An example whose chain is shorter than k steps gets as many as
every other, in training and in answering, so the count can not tell how long the right chain is.
"""

from dataclasses import dataclass

from latentcot.reasoner import Phase
from latentcot.recurrent_depth.settings import check_count


@dataclass(frozen=True)
class Curriculum:
    """
    Args:
        latents_per_step: c; 1 (GSM8K in the paper: 2).
        steps_per_stage: steps removed by each stage; 1.
        max_stage: K, last stage that adds latents; 6 (GSM8K: 3).
        final_stage: whether stage K + 1 drops all text.
        epochs_per_stage: of every stage but the last; 5 (GSM8K: 3).
        total_epochs: the last stage takes what the others leave, as in the release, where the stage is the epoch
            divided by ``epochs_per_stage``, at most the last; ``None`` = the last stage is as long as the others.
        pad_to_max: every stage from 1 on has K · c latents.
        mix_probability: chance that an example trains at a stage drawn uniformly from 0..k instead of k; 0 (0.3 in the
            paper's planning analysis).

    Raises:
        ValueError: a count out of range, or ``total_epochs`` that leave the last stage nothing.
    """

    latents_per_step: int = 1
    steps_per_stage: int = 1
    max_stage: int = 6
    final_stage: bool = True
    epochs_per_stage: float = 5
    total_epochs: float | None = None
    pad_to_max: bool = False
    mix_probability: float = 0.0

    def __post_init__(self) -> None:
        check_count("latents_per_step", self.latents_per_step, 1)
        check_count("steps_per_stage", self.steps_per_stage, 1)
        check_count("max_stage", self.max_stage, 1)
        for name in ("final_stage", "pad_to_max"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} given, expected True or False")
        if not 0 <= self.mix_probability <= 1:
            raise ValueError(f"mix_probability: {self.mix_probability!r} given, expected a probability")
        if not self.epochs_per_stage > 0:
            raise ValueError(f"epochs_per_stage: {self.epochs_per_stage!r} given, expected a positive number")
        if self.total_epochs is not None and self.total_epochs <= self.epochs_per_stage * self.last_stage:
            raise ValueError(
                f"total_epochs: {self.total_epochs} given, but stages 0..{self.last_stage - 1} take "
                f"{self.epochs_per_stage * self.last_stage} of them and the last stage needs some"
            )

    @classmethod
    def gsm8k(cls) -> "Curriculum":
        """The paper's schedule on GSM8K: c = 2, K = 3, 25 epochs."""
        return cls(latents_per_step=2, max_stage=3, epochs_per_stage=3, total_epochs=25)

    @classmethod
    def prosqa(cls) -> "Curriculum":
        """The paper's schedule on ProntoQA and ProsQA: c = 1, K = 6, 50 epochs."""
        return cls(latents_per_step=1, max_stage=6, epochs_per_stage=5, total_epochs=50)

    @property
    def last_stage(self) -> int:
        return self.max_stage + int(self.final_stage)

    def check_stage(self, stage: int) -> int:
        if check_count("stage", stage) > self.last_stage:
            raise ValueError(f"stage: {stage} given, the last one is {self.last_stage}")
        return stage

    def latents(self, stage: int) -> int:
        """Latent slots at ``stage``: the same for every example."""
        counted = min(self.check_stage(stage), self.max_stage)
        if self.pad_to_max and stage > 0:
            counted = self.max_stage
        return counted * self.latents_per_step

    def steps_removed(self, stage: int) -> int | None:
        """How many steps are left out from the front; ``None`` = all of them, however many there are."""
        return None if self.check_stage(stage) > self.max_stage else stage * self.steps_per_stage

    def writes_text(self, stage: int) -> bool:
        """Whether steps may remain to be written at ``stage``."""
        return self.steps_removed(stage) is not None

    def epochs(self) -> tuple[float, ...]:
        """Length of stages 0 .. last, in the paper's epochs; only their proportions matter here."""
        earlier = (float(self.epochs_per_stage),) * self.last_stage
        last = self.epochs_per_stage if self.total_epochs is None else self.total_epochs - sum(earlier)
        return (*earlier, float(last))

    def phases(self) -> tuple[Phase, ...]:
        """One phase a stage, each a share of the budget; the optimiser starts afresh in each."""
        epochs = self.epochs()
        return tuple(
            Phase(
                f"stage {stage}",
                share=length / sum(epochs),
                form="latent" if stage else "cot",
                reset_optimizer=True,
                knobs={"stage": stage},
            )
            for stage, length in enumerate(epochs)
        )
