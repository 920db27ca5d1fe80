"""Diffusion, as far as no network is needed: what noise is, how a text is cut, what is trained, how it is sampled.

    schedules   how much of a text still shows at a time
    processes   what noise is, and what a network's output means
    layouts     how a text is cut into parts that have times of their own
    objectives  what training minimises: a process, a layout and options
    samplers    how a canvas is filled: a process, a face of the network, keys

A network is a function here, (z, t) -> output float [B, L, V]: z int32 [B, L], or float [B, L, V] where a process says
so; t float32 [B] or [B, N]; V counts the mask's token. Of a large output a `deferred.Network` makes what is read.
"""
