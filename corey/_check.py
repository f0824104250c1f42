"""One sentence for every refusal: the argument, what it got, what it wants."""


def bad_value(name: str, got: object, want: str) -> ValueError:
    return ValueError(f"{name}: got {got}, want {want}")


def bad_type(name: str, got: object, want: str) -> TypeError:
    return TypeError(f"{name}: got {type(got).__name__}, want {want}")
