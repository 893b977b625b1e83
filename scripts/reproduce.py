"""Run the chapter's comparison and its exercises as one study over several seeds.

accelerate launch scripts/reproduce.py                                    # all of it, on the chapter's photos
accelerate launch scripts/reproduce.py --data-dir my/photos --seeds 3 --only finetune scratch best
python scripts/reproduce.py --only rates --image-size 128                 # one exercise, on smaller images

Finished runs are not repeated: the same command resumes an interrupted study.
"""

import tyro

from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.study.plan import ReproduceConfig


def main(config: ReproduceConfig) -> None:
    """Plan the runs, train those that are missing, and write the results."""
    # Imported here so that --help and a mistyped flag respond before torch is loaded.
    from hotdog_hf.study import runner
    from hotdog_hf.training import launch

    accelerator = launch.build_accelerator("auto", num_threads=config.num_threads)
    stop = launch.StopSignal()
    study = runner.plan_study(config, accelerator)
    failure = runner.train_missing(study, accelerator, stop)
    zero_shot = None if failure or stop.number else runner.ask_source(study, accelerator)
    if accelerator.is_main_process and study.results:
        runner.write(study, zero_shot, accelerator)
    launch.finish(accelerator)
    if failure:
        raise failure
    if stop.number:
        raise SystemExit(stop.exit_code)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ReproduceConfig))
