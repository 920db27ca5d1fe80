"""The experiments, one file each: `--config=NAME` of train takes them from anywhere, `train --list` says what there is."""
