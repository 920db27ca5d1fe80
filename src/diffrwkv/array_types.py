"""The axis legend and the array aliases, once for the whole library.

Axes, as they are spelt in shapes and signatures:

=====  =====================================================================
B      sequences of a batch
L, T   positions of a sequence (L in models and diffusion, T in operators)
D      width of the residual stream (`dim`)
H      heads
K      channels of a head that are keys (rows of a state)
V      channels of a head that are values (columns of a state); where no head
       is in sight, the vocabulary, the mask id counted
N      parts of a text, each noised at a time of its own
S      denoising steps
=====  =====================================================================
"""

from typing import Any

import jax
from jaxtyping import Bool, Float, Int, Key

Array = jax.Array
DType = Any  # whatever jnp.dtype() takes
PyTree = Any

Tokens = Int[Array, "B L"]  # ids; the mask id among them
SoftTokens = Float[Array, "B L V"]  # at each position, numbers that weigh the embeddings of all ids
Valid = Bool[Array, "B L"]  # True at real positions, False at right padding
Times = Float[Array, " B"]  # diffusion time, in [0, 1]
Logits = Float[Array, "B L V"]  # float32
Noised = Tokens | SoftTokens  # a text under noise
Positions = Bool[Array, "B L"]  # True at some of them
PerToken = Float[Array, "B L"]  # a number for each position: nats, a probability
TokenTimes = Float[Array, "B #L"]  # times of positions; [B, 1] where all of a text have one
PartTimes = Float[Array, " B"] | Float[Array, "B N"]  # times of texts, or of the parts of each
Law = Float[Array, "B L V"]  # float32, at each position the log-probabilities of all ids
OneKey = Key[Array, ""]  # of jax.random.key
Keys = Key[Array, " B"]  # one for each sequence
TokenKeys = Key[Array, "B L"]
Hidden = Float[Array, "B L D"]
HeadHidden = Float[Array, "B L H K"]
State = Float[Array, "B H K V"]  # float32, row = key channel, column = value channel
