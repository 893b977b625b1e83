"""Run the chapter's comparison and its exercises as one study over several seeds, or compare recipes.

accelerate launch scripts/reproduce.py                                    # all of it, on the chapter's photos
accelerate launch scripts/reproduce.py --data-dir my/photos --seeds 3 --only finetune scratch light
python scripts/reproduce.py --only rates --image-size 128                 # one exercise, on smaller images
python scripts/reproduce.py --only compare --data-dir my/photos pictures  # the recipes on several folders

Finished runs are not repeated: the same command resumes an interrupted study.
"""

import tyro

from hotdog_hf.data.folder import check_data_dir
from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.model.places import check_weights
from hotdog_hf.study.plan import ReproduceConfig


def main(config: ReproduceConfig) -> None:
    """Train the runs that are missing, and write the results."""
    # Imported below so that --help, a mistyped flag and a missing file respond before torch is loaded.
    for folder in config.data_dir:
        check_data_dir(folder)
    check_weights(config.weights)

    from hotdog_hf.study import comparison, runner
    from hotdog_hf.training import launch

    accelerator = launch.build_accelerator("auto", num_threads=config.num_threads)
    stop = launch.StopSignal()
    run = comparison.compare_folders if config.only == ("compare",) else runner.run_study
    failure = run(config, accelerator, stop)
    launch.finish(accelerator)
    if failure:
        raise failure
    if stop.number:
        raise SystemExit(stop.exit_code)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ReproduceConfig))
