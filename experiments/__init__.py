"""The experiments, one file each: `--config=NAME` takes them from any folder, `train --list` names them."""
