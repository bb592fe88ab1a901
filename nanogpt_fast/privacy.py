"""What a report that people send around must not say: who they are, and where their files lie."""

import getpass
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any


def user_name() -> str:
    """Who runs this; a number where the uid has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a uid without a name, as in containers
        return str(os.getuid()) if hasattr(os, "getuid") else "user"


def private(value: Any) -> Any:
    """The same with the home folder as ~, and user and host name replaced where they are part of a path."""
    if isinstance(value, dict):
        return {private(key): private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [private(item) for item in value]
    if not isinstance(value, str):
        return value
    with suppress(RuntimeError):  # neither $HOME nor an entry in passwd
        value = re.sub(rf"{re.escape(str(Path.home()))}(?![\w.-])", "~", value)
    for secret, shown in ((user_name(), "$USER"), (socket.gethostname(), "$HOST")):
        value = re.sub(rf"(?<=[/\\_@]){re.escape(secret)}(?![A-Za-z0-9])", shown, value)
    return value
