"""The flags of `evaluate --suite=NAME`, a file each; `diffrwkv.suites` does what they say."""

from types import ModuleType

from diffrwkv.cli.suites import choices, likelihood, samples

SUITES: dict[str, ModuleType] = {
    "choices": choices,
    "likelihood": likelihood,
    "samples": samples,
}
