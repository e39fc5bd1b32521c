"""A reward that asks for more than response and label, and says what it is made of (docs/customize.md, A reward)."""


def score(response: str, label: str, prompt: list, finish_reason: str) -> tuple[float, dict[str, float]]:
    """The share of digits in their place, less a tenth where the response had to be cut off."""
    answer = response.strip()
    right = sum(a == b for a, b in zip(answer, label)) / max(len(answer), len(label))
    copied = sum(digit in prompt[-1]["content"] for digit in answer) / max(1, len(answer))
    cut_off = float(finish_reason == "length")
    return right - 0.1 * cut_off, {"right": right, "copied": copied}


def answer_only(response: str, label: str, response_ids: list) -> tuple[float, dict[str, float], list[bool]]:
    """The same share of digits; what comes behind as many tokens as the label has is not trained on."""
    right = sum(a == b for a, b in zip(response.strip(), label)) / max(len(response.strip()), len(label))
    return right, {}, [i < len(label) for i in range(len(response_ids))]
