"""One sentence for every refusal: the argument, what it got, what it wants."""


def bad_value(name: str, got: object, want: str) -> ValueError:
    return ValueError(f"{name}: got {got}, want {want}")


def bad_type(name: str, got: object, want: str) -> TypeError:
    return TypeError(f"{name}: got {type(got).__name__}, want {want}")


def check_count(name: str, count: object, least: int) -> None:
    """Raises TypeError or ValueError unless `count` is an int of at least `least`."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise bad_type(name, count, "an int")
    if count < least:
        raise bad_value(name, count, f"at least {least}")
