"""Fine-tune a pretrained image classifier on a folder of photos.

accelerate launch scripts/train.py                                  # the chapter: hot dogs, ResNet-18
accelerate launch scripts/train.py --recipe scratch                 # the comparison: random weights
accelerate launch scripts/train.py --data-dir my/photos --weights my.safetensors --epochs 10
python scripts/train.py --help                                      # every knob
"""

from hotdog_hf.config import TrainConfig, parse_train_config
from hotdog_hf.data.folder import check_data_dir
from hotdog_hf.data.labels import check_tables
from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.model.places import check_weights


def main(config: TrainConfig) -> None:
    """Train one network on the hardware that the launcher provides."""
    # Imported below so that --help, a mistyped flag and a missing file respond before torch is loaded.
    check_data_dir(config.data.data_dir)
    check_tables(config.data.labels)
    check_weights(config.model.weights)

    from hotdog_hf import hub
    from hotdog_hf.model.licenses import describe_upload
    from hotdog_hf.training import launch
    from hotdog_hf.training.launch import StopSignal
    from hotdog_hf.training.loop import train

    accelerator = launch.build_accelerator(
        config.run.precision,
        config.run.tracker,
        config.run.num_threads,
        config.run.deterministic,
        may_shard=True,
    )
    if config.hub.push_to_hub and accelerator.is_main_process:
        hub.check_can_push(config.hub.push_to_hub)  # fails now, not after the training
    stop = StopSignal()
    run_dir = train(config, accelerator, stop)
    if run_dir and config.hub.push_to_hub and accelerator.is_main_process:
        accelerator.print(describe_upload(run_dir / "model"))
        url = hub.push_folder(run_dir / "model", config.hub.push_to_hub, private=config.hub.private)
        accelerator.print(f"pushed to {url}")
    launch.finish(accelerator)
    if run_dir is None:
        raise SystemExit(stop.exit_code)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_train_config())
