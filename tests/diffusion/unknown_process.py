"""Masks that no sampler takes for masks."""

import dataclasses

from diffrwkv.diffusion.processes import Masked, Scheduled


@dataclasses.dataclass(frozen=True)
class Unknown(Scheduled):
    """A process that is no `Masked` as far as a sampler can see, and does what it does: it takes every step."""

    known: Masked

    vocabulary = property(lambda self: self.known.vocabulary)
    schedule = property(lambda self: self.known.schedule)

    def noise(self, *args):
        return self.known.noise(*args)

    def noised(self, z):
        return self.known.noised(z)

    def nats(self, *args):
        return self.known.nats(*args)

    def start(self, *args):
        return self.known.start(*args)

    def predict(self, *args):
        return self.known.predict(*args)

    def forward_law(self, *args):
        return self.known.forward_law(*args)

    def reverse_law(self, *args):
        return self.known.reverse_law(*args)
