"""The axes of the operators' arrays, and their types, once for all operators.

=======  ===================================================================
B        sequences of a batch
T        tokens
H        heads
G        groups of heads
D        channels: heads times channels of a head
K, V     of WKV-7: channels of a head that are keys, and that are values
P, N     of SSD: channels of a head, and width of what writes to the state
=======  ===================================================================

Inputs are float32 or bfloat16, states float32.
"""

import jax
from jaxtyping import Float

Array = jax.Array

# WKV-7
Keys = Float[Array, "B T H K"]  # r, log_w, k, a and b
Values = Float[Array, "B T H V"]
KeyValueState = Float[Array, "B H K V"]
KeyValueStates = Float[Array, "B _ H K V"]  # at the boundaries of blocks

# the time mix around WKV-7
Flat = Float[Array, "B T D"]
Vector = Float[Array, "D"]
Mus = Float[Array, "N S D"]  # of N mixes, on S sides

# SSD
Inputs = Float[Array, "B T H P"]
Decays = Float[Array, "B T H"]
Grouped = Float[Array, "B T G N"]  # b and c
InputState = Float[Array, "B H P N"]
InputStates = Float[Array, "B _ H P N"]  # at the boundaries of blocks
