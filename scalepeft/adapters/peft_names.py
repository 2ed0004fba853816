"""What our methods are called in HF PEFT; peft is not needed."""

TAKEN = frozenset({"boft", "hira", "hra", "ia3", "lora", "oft"})
"""Methods of which PEFT has one of that name, with settings and tensors of its own."""


def peft_name(method: str) -> str:
    """Name of the method in PEFT, in lower case; ``<name>_adapter`` holds a layer's tensors."""
    return f"scalepeft_{method}" if method in TAKEN else method


def told(method: str) -> str:
    """``peft_type`` in a file. Without the plug-in PEFT looks it up and ends with it as KeyError,
    so that it says what to do.
    """
    name = peft_name(method).upper()
    return f"{name}: pip install scalepeft, then import scalepeft.integrations.peft"


def method_of(peft_type: str) -> str:
    """The method that a file's ``peft_type`` (``HOFT``, or ``told``) names."""
    return peft_type.partition(":")[0].lower().removeprefix("scalepeft_")
