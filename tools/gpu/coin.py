"""A reward for models that know nothing: an even number of characters wins. It gives groups of random samples a signal."""


def even(response: str, label: str) -> float:
    """1 or 0."""
    return float(len(response) % 2 == 0)
