"""Errors of a forward that is traced: those of its own code, and what cannot be traced."""

import dis

OWN = tuple(  # modules whose code runs while a forward is traced
    f"repvgg.fusion.{name}"
    for name in (
        *("tracer", "paths", "decisions", "proxies", "patching", "outside"),
        *("kinds", "flags", "errors", "attributes"),
    )
)


class UntraceableError(ValueError):
    """A forward needs what is only known when it runs."""


def in_a_line(error: Exception) -> str:
    """The message of an error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, UntraceableError) else f"{type(error).__name__}: {text}")[
        :200
    ]


def is_deliberate(error: BaseException) -> bool:
    """Whether a statement of the network's own code raised an exception."""
    trace = error.__traceback__
    if trace is None or isinstance(error, UntraceableError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, ZeroDivisionError) or "out of bounds for dimension" in str(error):
        return True  # of numbers and tensors that are no proxies
    code, home = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__", ""))
    if home.split(".")[0] == "torch" or home in OWN:
        return False
    return code.co_code[trace.tb_lasti] in (dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"])
