"""What the operators' arguments that select a program have in common."""


def check_choices(operator, reverse, implementation, chunk_size, implementations, chunk_sizes):
    """Raises ValueError, naming the operator, for a direction, form or chunk size that it does not have."""
    if not isinstance(reverse, bool):
        raise ValueError(f"{operator} needs reverse to be True or False, not {reverse!r}; it selects the program.")
    if implementation is not None and implementation not in implementations:
        names = ", ".join(implementations)
        raise ValueError(f"{operator} has no implementation {implementation!r}; choose None or one of {names}.")
    if chunk_size is not None:
        if implementation == "reference":
            raise ValueError(f"{operator}'s reference has no chunks; leave chunk_size out.")
        if chunk_size not in chunk_sizes:
            raise ValueError(f"{operator} needs a chunk_size out of {chunk_sizes}, not {chunk_size!r}.")


def fit_chunk(chunk_size, length):
    """The chunk size, or the power of two that covers a shorter sequence."""
    return min(chunk_size, 1 << (length - 1).bit_length())
