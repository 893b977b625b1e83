"""Opens photos in every process of a launch, and says what each had to decode; launched by test_groups.py."""

import json
import sys
from pathlib import Path

from hotdog_hf.config import DataConfig
from hotdog_hf.data import check, prepare
from hotdog_hf.data.images import decode_image
from hotdog_hf.training import launch

data_dir, out = sys.argv[1:]
decoded = []
check.decode_image = lambda path, side: decoded.append(path) or decode_image(path)
accelerator = launch.build_accelerator("no")
config = DataConfig(data_dir=data_dir, val_fraction=0.2, bad_images="skip")
photos = prepare.open_photos(config, 0, accelerator)
timeout = accelerator.init_handler.timeout.total_seconds()
facts = [len(decoded), photos.names("validation"), list(map(str, photos.skipped)), timeout]
Path(f"{out}-{accelerator.process_index}").write_text(json.dumps(facts))
launch.finish(accelerator)
