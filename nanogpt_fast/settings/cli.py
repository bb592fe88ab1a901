"""Turns a command line into a dataclass: nanoGPT's flat flags, config files and presets, read from left to right.

    load_config(argv) -> Config       the trainer's; find_preset, preset_names and to_toml go with it
    parse(cls, argv, ...) -> cls      every other command's

argv is normalised and checked here: names, forms (`--k=v`, `--k v`, `--k-with-dashes`, `--compile`, `--no-compile`),
types, files. tyro then fills positional arguments, builds the dataclass, and writes --help from its annotations and
comments. The dataclass checks its ranges. What comes later on the line wins, a file as much as a flag. A TOML file
sets keys in Config's sections, or at top level as flags do.

    python -m nanogpt_fast.settings.cli --config NAME ...    prints the resolved configuration as TOML
"""

import contextlib
import io
import logging
import os
import re
import sys
import textwrap
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import tyro

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.settings import nanogpt_config
from nanogpt_fast.settings.config import SECTION_OF, Config, present_setting
from nanogpt_fast.settings.options import BOOLS, PATHS, at_home, options_of, shown
from nanogpt_fast.settings.toml_files import read_toml, to_toml

log = logging.getLogger("nanogpt_fast.settings.cli")  # also as __main__
T = TypeVar("T")
C = TypeVar("C", bound=Config)

_LINE = "command line"
_SAMPLE_KEYS = ("start", "num_samples", "max_new_tokens", "temperature", "top_k")  # of nanoGPT's sample.py alone
_TRAIN_HELP = """\
presets:
{presets}

examples:
  {prog} --config shakespeare_char_cpu --max_iters=500
  {prog} config/train_shakespeare_char.py --batch_size=32
  torchrun --standalone --nproc_per_node=8 -m nanogpt_fast.train gpt2_124m

A config is a preset, a FILE.toml or a nanoGPT FILE.py, with or without --config
before it. What comes later wins."""


def load_config(
    argv: list[str],
    *,
    prog: str = "python -m nanogpt_fast.train",
    cls: type[C] = Config,
    description: str = "Train, finetune or evaluate a GPT.",
) -> C:
    """The trainer's configuration, or that of a command with sections beside. Raises ConfigError; --help prints and
    exits 0."""
    presets = textwrap.fill(", ".join(preset_names()), 80, initial_indent="  ", subsequent_indent="  ")
    epilog = _TRAIN_HELP.format(prog=prog, presets=presets)
    config = parse(cls, argv, prog=prog, description=description, epilog=epilog)
    optim = config.optim
    decays = optim.decay_lr and optim.schedule != "constant" and not config.run.eval_only
    if decays and optim.min_lr > optim.learning_rate:  # nanoGPT's meaning: --learning_rate moves no other setting
        _warn(f"the learning rate rises to min_lr = {optim.min_lr:g}, above its peak of {optim.learning_rate:g}: "
              f"--min_lr={optim.learning_rate / 10:.3g}, a tenth, is usual")  # fmt: skip
    return config


def parse(
    cls: type[T], argv: list[str], *, prog: str, description: str = "", epilog: str = "", default: T | None = None
) -> T:
    """argv as `cls`: Config, or any flat frozen dataclass of scalars, Literals and tyro.conf.Positional fields.

    Bare words fill the positional fields; a class without any takes them as config files. `default` replaces the
    class's own defaults. Raises ConfigError; --help prints and exits 0: the description (one line: tyro
    does not wrap it), the flags, and the epilog as it stands.
    """
    words, settings = ["--help"], {}
    if not {"-h", "--help"}.intersection(argv):
        reader = _Reader(cls, prog)
        words, settings = reader.read(argv)
        for key, (value, where) in settings.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(
                    f"--{key} is out of range", where=where, expected="at most 64 bits", found=shown(value)
                )
        if default is None:
            reader.check_complete(words, settings)
    console = _Console(sys.stdout)
    own_defaults: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
            return tyro.cli(
                cls,
                prog=prog,
                description=description,
                args=words + [f"--{key}={setting.value}" for key, setting in settings.items()],
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
                **own_defaults,
            )
    except SystemExit as stop:
        if not stop.code:
            print(console.getvalue().rstrip())
            if epilog:
                print(f"\n{epilog.strip()}")
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", console.getvalue())
        rows = [row.strip("│╭╰╮╯─|+ ") for row in plain.splitlines()]
        told = " ".join(row for row in rows if row.strip("-") and not row.startswith(("For full helptext", prog)))
        raise ConfigError(told, where=_LINE, hint=f"{prog} --help") from None
    except ConfigError as error:  # of a range check: add which file or flag brought the values it names
        keys = re.findall(r"(\w+) = ", error.where)
        sources = dict.fromkeys(settings[key].where for key in keys if key in settings)
        where = f"{error.where} ({', '.join(sources)})" if sources else error.where
        raise error.at(where) from None


def preset_names() -> list[str]:
    """The names --config takes."""
    return sorted(path.stem for path in _presets().glob("*.toml"))


def find_preset(name: str) -> Path:
    """The preset's TOML file, whatever the working directory. Raises ConfigError naming the closest presets."""
    names = preset_names()
    if name not in names:
        raise ConfigError(
            f"no preset is named {shown(name)}{did_you_mean(name, names)}",
            where=_LINE,
            expected=f"a FILE.toml, a nanoGPT FILE.py, or one of {', '.join(names)}",
        )
    return _presets() / f"{name}.toml"


def _presets() -> Path:
    """A wheel carries its presets inside the package; a checkout has configs/ beside it.

    Inside is looked at first: beside an installed package lies site-packages, where `configs` is someone else's.
    """
    package = Path(__file__).resolve().parent.parent
    packaged = package / "presets"
    return packaged if packaged.is_dir() else package.parent / "configs"


def _warn(text: str) -> None:
    """A warning; of torchrun's ranks one gives it."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", text)


class _Console(io.StringIO):
    """Catches what tyro prints, and answers for stdout when tyro asks about colours and box characters."""

    def __init__(self, stdout: TextIO):
        super().__init__()
        self.stdout = stdout

    def isatty(self) -> bool:
        return self.stdout.isatty() and not os.environ.get("NO_COLOR")

    @property
    def encoding(self) -> str:
        return self.stdout.encoding or "utf-8"


class _Setting(NamedTuple):
    """A value on its way into the dataclass, and the file or flag that gave it."""

    value: Any
    where: str


class _Reader:
    """Reads flags and config files for one dataclass."""

    def __init__(self, cls: type, prog: str):
        self.cls, self.prog = cls, prog
        options = options_of(cls)
        self.flags = {name: option for name, option in options.items() if not option.positional}
        self.slots = [option for option in options.values() if option.positional]
        self.preset: dict[str, _Setting] = {}  # what presets said, also where a flag says otherwise

    def read(self, argv: list[str]) -> tuple[list[str], dict[str, _Setting]]:
        """The positional words, and the settings of all flags and files, a later one replacing an earlier, as in
        nanoGPT; but what --config names stands below every flag, wherever it is written."""
        words: list[str] = []
        settings: dict[str, _Setting] = {}
        args = deque(argv)
        while args:
            arg = args.popleft()
            if any("\ud800" <= char <= "\udfff" for char in arg):  # how Python passes bytes that are not UTF-8
                raise ConfigError("an argument is not UTF-8 text", where=_LINE, found=ascii(arg)[:200])
            name, equals, value = arg.partition("=")
            if name == "--config":
                chosen = self.read_config(value if equals else _next_value(name, args, "a preset or a file"))
                given = {key for key, setting in settings.items() if setting.where == _LINE}
                settings |= {key: setting for key, setting in chosen.items() if key not in given}
            elif name.startswith("--"):
                key, text = self.read_flag(name, value if equals else None, args)
                settings[key] = _Setting(self.flags[key].value(text, _LINE, from_text=True), _LINE)
            elif name.startswith("-") and len(arg) > 1:
                raise self.unknown(name, _LINE)
            elif self.slots:
                words.append(at_home(arg, _LINE) if self.slots[0].name in PATHS else arg)
            elif equals and name.replace("-", "_") in self.flags:
                raise ConfigError(f"a flag begins with two dashes, did you mean --{arg}?", where=_LINE, found=arg)
            else:
                settings |= self.read_config(arg)
        self.keep_ratio(settings)
        return words, settings

    def keep_ratio(self, settings: dict[str, _Setting]) -> None:
        """Where a preset says min_lr and another rate than its own was asked for, min_lr goes along."""
        peak, end = self.preset.get("learning_rate"), self.preset.get("min_lr")
        rate = settings.get("learning_rate")
        if not (peak and end and rate and peak.value > 0 and end.value > 0):
            return
        if settings["min_lr"] is end and rate.value != peak.value:
            kept = float(f"{rate.value * end.value / peak.value:.12g}")
            settings["min_lr"] = _Setting(kept, end.where)
            ratio = f"{Path(end.where).stem}'s ratio to learning_rate is kept"
            _warn(f"min_lr = {kept:g}: {ratio}; --min_lr={end.value:g} leaves it as it was")

    def check_complete(self, words: list[str], settings: dict[str, _Setting]) -> None:
        """As many words as the positional fields need and can hold, and every flag without a default."""
        flags = [flag for flag in self.flags.values() if flag.required]
        needed = [slot.metavar for slot in self.slots] + [f"--{flag.name}={flag.metavar}" for flag in flags]
        usage = " ".join([self.prog, *needed])
        missing = [slot.metavar.split()[0] for slot in self.slots if slot.required][len(words) :]
        missing += [f"--{flag.name}" for flag in flags if flag.name not in settings]
        if missing:
            told = " and ".join(missing)
            raise ConfigError(f"{told} missing", where=_LINE, expected=usage, hint=f"{self.prog} --help")
        if len(words) > len(self.slots) and not any(slot.repeats for slot in self.slots):
            raise ConfigError(f"one word too many: {shown(words[len(self.slots)])}", where=_LINE, expected=usage)

    def read_flag(self, name: str, text: str | None, args: deque[str]) -> tuple[str, str]:
        """(key, text) of a flag in any of its forms; takes the next word as its value if it has none inline."""
        key = name[2:].replace("-", "_")
        positive = key.removeprefix("no_")
        if key not in self.flags and text is None and positive in self.flags and self.flags[positive].kind is bool:
            return positive, "False"
        if key not in self.flags:
            raise self.unknown(name, _LINE)
        if text is None and self.flags[key].kind is bool:
            text = args.popleft() if args and args[0].lower() in BOOLS else "True"
        return key, _next_value(name, args, self.flags[key].expected) if text is None else text

    def unknown(self, name: str, where: str) -> ConfigError:
        """The error for a flag (`--name`) or a config file's key (`name`) that this dataclass does not have."""
        dashes = "--" if name.startswith("-") else ""
        key = name.lstrip("-").replace("-", "_")
        if issubclass(self.cls, Config) and key in _SAMPLE_KEYS:
            hint = "give it to python -m nanogpt_fast.sample"
            return ConfigError(f"{name} is a setting of sampling, not of training", where=where, hint=hint)
        if not issubclass(self.cls, Config) and key in SECTION_OF:
            hint = "leave it out here, give it to python -m nanogpt_fast.train"
            return ConfigError(f"{name} is a setting of training, not of this command", where=where, hint=hint)
        known = [f"--{flag}" for flag in (*self.flags, "config")] if dashes else list(self.flags)
        near = did_you_mean(dashes + key, known)
        return ConfigError(
            f"unknown {'flag' if dashes else 'key'} {name[:100]}{near}", where=where, hint=f"{self.prog} --help"
        )

    def read_config(self, name: str) -> dict[str, _Setting]:
        """The settings of a preset, a TOML file or a nanoGPT .py file."""
        path, is_preset = Path(at_home(name, "--config")), False
        if path.suffix.lower() not in (".py", ".toml"):
            path, is_preset = find_preset(name), True
        try:
            items = list(self.python_items(path) if path.suffix.lower() == ".py" else self.toml_items(path))
        except (FileNotFoundError, IsADirectoryError):
            raise _missing(path) from None
        except OSError as error:
            raise ConfigError("a config file cannot be read", where=str(path), found=str(error.strerror)) from None
        settings = {}
        for key, value, where in items:
            key, value = present_setting(key, value)
            if key not in self.flags:
                raise self.unknown(key, where)
            settings[key] = _Setting(self.flags[key].value(value, where, from_text=False), where)
        self.preset |= settings if is_preset else {}
        return settings

    def python_items(self, path: Path) -> Iterator[tuple[str, Any, str]]:
        """(key, value, where) of a nanoGPT config; names that begin with an underscore are helpers of its own, and so
        are those that only its own lines use."""
        for key, (value, line) in nanogpt_config.read(path, self.flags.keys()).items():
            if not key.startswith("_"):
                yield key, value, f"{path}:{line}"

    def toml_items(self, path: Path) -> Iterator[tuple[str, Any, str]]:
        """(key, value, where), each key checked to stand in its section or at top level."""
        sections = {option.section: None for option in self.flags.values() if option.section}
        seen: set[str] = set()
        for name, value in read_toml(path).items():
            in_section = isinstance(value, dict)
            where = f"{path} [{name[:100]}]" if in_section else str(path)
            if in_section and name not in sections:
                known = f"one of [{'], ['.join(sections)}]" if sections else "keys without sections"
                raise ConfigError(
                    f"unknown section [{name[:100]}]{did_you_mean(name, sections)}", where=where, expected=known
                )
            for key, item in value.items() if in_section else [(name, value)]:
                home = self.flags[key].section if key in self.flags else name
                if in_section and home != name:
                    raise ConfigError(f"{key} is in the wrong section", where=where, expected=f"[{home}]")
                if key in seen:
                    raise ConfigError(
                        f"{key} is set twice", where=where, expected="in its section or at top level, once"
                    )
                seen.add(key)
                yield key, item, where


def _next_value(name: str, args: deque[str], expected: str) -> str:
    """The word after a flag. One that begins with a single dash is a value too (--min_lr -1e-5)."""
    if not args or args[0].startswith("--"):
        found = args[0] if args else "the end of the line"
        raise ConfigError(f"{name} needs a value", where=_LINE, expected=expected, found=found)
    return args.popleft()


def _missing(path: Path) -> ConfigError:
    """Names the files beside it, or the presets; the hint is the preset that stands for one of nanoGPT's files."""
    beside = sorted(file.name for file in path.parent.glob(f"*{path.suffix}") if file.is_file())
    stem = path.stem.removeprefix("train_")
    preset = next((name for name in preset_names() if name == stem or name.startswith(f"{stem}_")), None)
    known = f"in {path.parent}: {', '.join(beside)}" if beside else f"a file, or one of {', '.join(preset_names())}"
    return ConfigError(
        f"there is no config file {path}{did_you_mean(path.name, beside)}",
        where=f"working directory {Path.cwd()}",
        expected=known,
        hint=f"--config {preset}, the preset" if preset else "",
    )


def main(argv: list[str]) -> None:
    print(to_toml(load_config(argv, prog="python -m nanogpt_fast.settings.cli")), end="")


if __name__ == "__main__":
    run_command(main)
