"""Hard negatives mined again with the model as it is then, every `refresh_steps` of a stage."""

from __future__ import annotations

from sailplan.curriculum.rounds import Rounds
from sailplan.curriculum.stages import ROUNDS, refresh_hard_negatives
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.watch import phase
from sailplan.train.callback import Callback, Run, StageRun
from sailplan.train.places import Places


class MiningRefresh(Callback):
    """Refresh a stage's mined negatives as `stages.NAME.hard_negatives.refresh_steps` says.

    The loader reads ahead, so it ends at a refresh and is opened anew with the new negatives.
    """

    def read_until(self, stage: StageRun, done: int) -> int:
        every = _every(stage)
        return min(stage.span.steps, (done // every + 1) * every) if every else stage.span.steps

    def before_reading(self, run: Run, stage: StageRun, done: int) -> None:
        every = _every(stage)
        if every and done and done % every == 0:
            name = stage.span.name
            if (
                run.context.config.data.workers
            ):  # they are forked: no other thread may hold a lock then
                run.join()
            with phase("mining"), run.keeping():
                stage.state = refresh_hard_negatives(
                    run.context, name, run.folder.curriculum(name), stage.state, done
                )
            rounds = Rounds(run.folder.curriculum(name) / ROUNDS)

            def prune() -> None:
                steps = Places(run.config, run.folder).steps()
                if steps is not None:
                    rounds.prune(step + 1 - stage.span.first for step in steps)

            on_main(run.context.parallel, "removing old rounds", prune)


def _every(stage: StageRun) -> int:
    mined = stage.settings.hard_negatives
    return mined.refresh_steps if mined is not None else 0
