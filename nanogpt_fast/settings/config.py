"""A run's configuration: frozen dataclasses, one a section, with nanoGPT's names, meanings and defaults.

Flags stay flat (`--batch_size=32`); the sections only group them in --help and in TOML files.
The comment beside a field is its help text. How files and flags become a Config is cli.py's work.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from nanogpt_fast.errors import ConfigError


def require_range(ok: bool, key: str, rule: str, value: object) -> None:
    """Raise the ConfigError of a value out of its range; rule is what was expected."""
    if not ok:
        raise ConfigError(f"--{key} is out of range", where=f"{key} = {value!r}", expected=rule)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run goes, when it evaluates and saves."""

    out_dir: str = "out"  # checkpoints, metrics.jsonl and the log go here
    init_from: str = "scratch"  # scratch | resume | best | gpt2 ... gpt2-xl | a directory or ckpt.pt
    eval_interval: int = 2000  # evaluate (and save) every so many iterations
    log_interval: int = 1  # print a line every so many iterations
    eval_iters: int = 200  # batches a split in an evaluation
    eval_only: bool = False  # stop right after the first evaluation
    eval_mode: Literal["random", "full"] = "random"  # random batches as nanoGPT, or the whole validation split in order
    always_save_checkpoint: bool = True  # save after each evaluation, not only when val loss improves
    resume_step: int = 0  # with --init_from=resume: this checkpoint, instead of the newest; later ones are set aside
    keep_last: int = 2  # checkpoints kept besides the best one (at least 2)
    auto_resume: bool = False  # go on with the run that out_dir holds, where it holds one; else begin as init_from says
    async_save: bool = False  # write checkpoints while training goes on, from a copy in host memory
    sample_at_end: int = 0  # characters/tokens of a sample printed when training ends, 0 for none
    seed: int = 1337  # weights, data order, dropout

    def __post_init__(self) -> None:
        for key in ("eval_interval", "log_interval", "eval_iters"):
            require_range(getattr(self, key) >= 1, key, "a whole number >= 1", getattr(self, key))
        require_range(
            self.keep_last >= 2, "keep_last", ">= 2: the last one may be cut off while it is written", self.keep_last
        )
        for key in ("sample_at_end", "resume_step"):
            require_range(getattr(self, key) >= 0, key, ">= 0", getattr(self, key))
        require_range(0 <= self.seed < 2**63, "seed", "0 <= seed < 2^63", self.seed)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which order."""

    dataset: str = "openwebtext"  # name of a folder in data_dir holding train.bin and val.bin, or a glob of shards
    data_dir: str = "data"  # parent of the dataset folders
    gradient_accumulation_steps: int = 5 * 8  # micro-batches an iteration, over all ranks together
    batch_ramp: str = ""  # START:ITERS, from START micro-batches linearly up to all of them by iteration ITERS: 8:2000
    batch_size: int = 12  # sequences a micro-batch
    block_size: int = 1024  # tokens a sequence
    data_order: Literal["shuffle", "nanogpt"] = "shuffle"  # without replacement, or nanoGPT's own random batches
    document_mask: bool = False  # attention stays inside a document (ended by <|endoftext|>); positions do not restart
    ignore_fingerprint: bool = False  # resume although the data files changed since the checkpoint

    def __post_init__(self) -> None:
        for key in ("gradient_accumulation_steps", "batch_size", "block_size"):
            require_range(getattr(self, key) >= 1, key, "a whole number >= 1", getattr(self, key))
        _ = self.ramp

    @property
    def ramp(self) -> tuple[int, int, int]:
        """(micro-batches of the first iteration, of the last, iterations from one to the other), which is 0 without
        --batch_ramp. ConfigError for anything but START:ITERS."""
        full = self.gradient_accumulation_steps
        if not self.batch_ramp:
            return full, full, 0
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.batch_ramp)
        start, iterations = (int(found[1]), int(found[2])) if found else (0, 0)
        rule = f"START:ITERS, two whole numbers, 1 <= START <= gradient_accumulation_steps = {full}, ITERS >= 1: 8:2000"
        require_range(1 <= start <= full and iterations >= 1, "batch_ramp", rule, self.batch_ramp)
        return start, full, iterations


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the GPT."""

    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads; must divide n_embd
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # 0 for pretraining; try 0.1 and more for finetuning
    bias: bool = False  # biases in Linear and LayerNorm layers; GPT-2 has them
    norm_bias: bool = False  # biases in LayerNorm layers alone, where --bias=False
    tie_word_embeddings: bool = True  # the head is the token embedding's weight, as GPT-2's; False: a weight of its own
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # exact erf (nanoGPT) or tanh (OpenAI, HF, llm.c)
    vocab_size: int = 0  # 0 takes the dataset's; without one 50304 (GPT-2's 50257 padded to a multiple of 64)

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_embd"):
            require_range(getattr(self, key) >= 1, key, "a whole number >= 1", getattr(self, key))
        require_range(0.0 <= self.dropout < 1.0, "dropout", "0 <= dropout < 1", self.dropout)
        require_range(self.vocab_size >= 0, "vocab_size", ">= 0", self.vocab_size)
        if self.n_embd % self.n_head:
            # Only heads near the asked number are tried: a typo as wide as 10^9 must not take minutes to refuse.
            tried = range(max(1, self.n_head - 512), self.n_head + 513)
            near = sorted((h for h in tried if self.n_embd % h == 0), key=lambda h: abs(h - self.n_head))[:3]
            fits = f"n_head one of {', '.join(map(str, sorted(near)))} (nearest that fit)" if near else ""
            raise ConfigError(
                "n_embd is not divisible by n_head",
                where=f"n_embd = {self.n_embd}, n_head = {self.n_head}",
                expected=fits or "n_embd a multiple of n_head",
            )


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A model's resolved shape: what a checkpoint records as `model_args` and GPT(...) is built from."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    norm_bias: bool = False
    tie_word_embeddings: bool = True
    activation: str = "gelu"

    @property
    def head_params(self) -> int:
        """Parameters of a head that is not the token embedding's."""
        return 0 if self.tie_word_embeddings else self.vocab_size * self.n_embd

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every parameter, in the fixed order wte, wpe, blocks, ln_f, head unless it is tied."""
        C, shapes = self.n_embd, {}

        def add(name: str, *shape: int) -> None:
            shapes[f"transformer.{name}.weight"] = shape
            if (self.bias or (self.norm_bias and len(shape) == 1)) and name not in ("wte", "wpe"):
                shapes[f"transformer.{name}.bias"] = shape[:1]

        add("wte", self.vocab_size, C)
        add("wpe", self.block_size, C)
        for i in range(self.n_layer):
            add(f"h.{i}.ln_1", C)
            add(f"h.{i}.attn.c_attn", 3 * C, C)
            add(f"h.{i}.attn.c_proj", C, C)
            add(f"h.{i}.ln_2", C)
            add(f"h.{i}.mlp.c_fc", 4 * C, C)
            add(f"h.{i}.mlp.c_proj", C, 4 * C)
        add("ln_f", C)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = self.vocab_size, C
        return shapes

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters as nanoGPT counts them: without the position embedding unless asked."""
        total = sum(math.prod(shape) for shape in self.parameter_shapes().values())
        return total - self.block_size * self.n_embd if non_embedding else total


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning-rate schedule."""

    learning_rate: float = 6e-4  # peak learning rate
    max_iters: int = 600_000  # iterations in all
    weight_decay: float = 1e-1  # on tensors with two dimensions and more
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.95  # decay of its running square; 0.99 where an iteration has few tokens
    grad_clip: float = 1.0  # clip the global gradient norm at this value, 0.0 to switch off
    skip_step_sigma: float = 0.0  # skip an update whose loss is so many standard deviations above the mean; 0 never
    skip_step_window: int = 128  # ... of so many losses before it
    max_bad_steps: int = 10  # stop after so many updates in a row that were skipped or not finite
    decay_lr: bool = True  # warm up and follow the schedule; False keeps learning_rate from the first iteration on
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warm-up; wsd: stable, then decay
    decay_ratio: float = 0.2  # of lr_decay_iters, at its end, is wsd's decay: a line to min_lr
    warmup_iters: int = 2000  # linear warm-up, iterations
    lr_decay_iters: int = 600_000  # the decay ends here; usually max_iters
    min_lr: float = 6e-5  # the decay ends at this rate; usually learning_rate / 10

    def __post_init__(self) -> None:
        for key in ("learning_rate", "min_lr", "weight_decay", "grad_clip", "skip_step_sigma"):
            value = getattr(self, key)
            require_range(math.isfinite(value) and value >= 0, key, "a finite number >= 0", value)
        for key in ("beta1", "beta2"):
            require_range(0.0 <= getattr(self, key) < 1.0, key, f"0 <= {key} < 1", getattr(self, key))
        for key in ("max_iters", "warmup_iters", "lr_decay_iters"):
            require_range(getattr(self, key) >= 0, key, ">= 0", getattr(self, key))
        require_range(self.skip_step_window >= 2, "skip_step_window", ">= 2", self.skip_step_window)
        require_range(self.max_bad_steps >= 1, "max_bad_steps", ">= 1", self.max_bad_steps)
        require_range(0.0 < self.decay_ratio <= 1.0, "decay_ratio", "0 < decay_ratio <= 1", self.decay_ratio)
        if not self.decay_lr and self.schedule != "cosine":
            raise ConfigError(
                "--schedule contradicts --decay_lr=False, which keeps learning_rate without a warm-up",
                where=f"schedule = {self.schedule!r}, decay_lr = False",
                expected="one of the two",
                hint="--schedule=constant alone warms up and stays",
            )
        if self.schedule == "wsd" and self.warmup_iters > self.decay_begins:
            raise ConfigError(
                "the decay begins before the warm-up ends",
                where=f"warmup_iters = {self.warmup_iters}, lr_decay_iters = {self.lr_decay_iters}, "
                f"decay_ratio = {self.decay_ratio}: decay from iteration {self.decay_begins}",
                expected=f"warmup_iters <= {self.decay_begins}",
                hint="--schedule=linear decays right after the warm-up",
            )

    @property
    def decay_begins(self) -> int:
        """wsd: the last iteration at learning_rate."""
        return self.lr_decay_iters - round(self.decay_ratio * self.lr_decay_iters)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the figures go besides the console and out_dir/metrics.jsonl."""

    wandb_log: bool = False  # Weights & Biases (extra `log`)
    wandb_project: str = "owt"  # project there
    wandb_run_name: str = "gpt2"  # name of the run there
    tensorboard: bool = False  # event files under out_dir/tensorboard (extra `log`)


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """Device, precision and kernels."""

    device: str = "auto"  # auto | cpu | cuda | cuda:0 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where native
    residual_dtype: Literal["auto", "float32"] = "auto"  # of the residual stream; auto: dtype, nanoGPT's is float32
    tf32: bool = True  # float32 products on CUDA by TF32, as nanoGPT; False is exact, and several times slower
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # replay the step as CUDA graphs; on: fail where that cannot be
    recompute: Literal["none", "mlp", "block"] = "none"  # rebuilt in backward: GELU's output, a whole block
    micro_batch: Literal["", "auto"] = ""  # auto: the largest batch_size that fits, with as many tokens an iteration
    compile: bool = True  # torch.compile the reference ops on CUDA (takes a minute); no effect elsewhere
    kernels: str = "auto"  # auto (ours on CUDA, where right) | triton | reference, and triton,attention=reference
    rows: Literal["tuned", "shipped"] = "tuned"  # launch rows that nanogpt_fast.tune kept for this GPU, where it has
    backend: str = "nccl"  # torch.distributed backend for CUDA ranks (CPU ranks use gloo)
    timeout: float = 600.0  # seconds after which a rank that does not come ends the run, and is named
    parallel: Literal["ddp", "zero1"] = "ddp"  # zero1: a rank holds its share of masters and moments, not all of them
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # what ranks sum gradients in; bfloat16: half the bytes
    bucket_mb: float = 25.0  # gradients of so many MB, and whole blocks, are reduced at once while backward goes on
    dry_run: bool = False  # print the resolved configuration, tokens, memory; train nothing
    world: int = 0  # with --dry_run: up to how many ranks to foretell a rank's memory for
    on: str = ""  # with --dry_run: a GPU to foretell memory and time for, as h100, a100-40gb or its driver's name
    debug: bool = False  # tracebacks instead of short errors
    profile: str = ""  # START:STOP, iterations to trace as a Python slice: 10:15 is 10 to 14; to out_dir/profile
    profiler: Literal["torch", "nsys"] = "torch"  # a trace for Perfetto, or NVTX ranges for a run under nsys

    def __post_init__(self) -> None:
        _ = self.window
        for key in ("bucket_mb", "timeout"):
            value = getattr(self, key)
            require_range(math.isfinite(value) and value > 0, key, "a finite number > 0", value)
        require_range(0 <= self.world <= 4096, "world", "0 <= world <= 4096", self.world)
        torchrun = f"torchrun --nproc_per_node={self.world} -m nanogpt_fast.train, with the same flags, starts them"
        for key, foretells, hint in (
            ("on", "names a GPU to foretell a run for, and trains nothing", "--device chooses what to train on"),
            ("world", "is a number of ranks to foretell a run for, and starts none", torchrun),
        ):
            if (value := getattr(self, key)) and not self.dry_run:
                where, expected = f"{key} = {value!r}, dry_run = False", "--dry_run beside it"
                raise ConfigError(f"--{key} {foretells}", where=where, expected=expected, hint=hint)

    @property
    def window(self) -> range:
        """The iterations that --profile names; empty without it. ConfigError for anything but START:STOP."""
        if not self.profile:
            return range(0)
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.profile)
        window = range(int(found[1]), int(found[2])) if found else range(0)
        rule = "START:STOP, two whole numbers, START < STOP, as in a Python slice: 10:15 traces iterations 10 to 14"
        require_range(bool(window), "profile", rule, self.profile)
        return window


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is. Sections are read by the part they belong to, never the whole tree."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        if self.run.resume_step and self.run.init_from != "resume":
            raise ConfigError(
                "--resume_step is for --init_from=resume",
                where=f"resume_step = {self.run.resume_step}, init_from = {self.run.init_from!r}",
                expected="both, or neither",
            )
        window, last = self.system.window, self.optim.max_iters
        if window and (window.stop > last + 1 or self.run.eval_only):
            raise ConfigError(
                "--profile asks for iterations that this run does not have",
                where=f"profile = {self.system.profile!r}, max_iters = {last}, eval_only = {self.run.eval_only}",
                expected="none with eval_only" if self.run.eval_only else f"STOP <= {last + 1}: the last one is {last}",
            )
        if self.system.micro_batch == "auto" and self.data.data_order == "nanogpt":
            raise ConfigError(
                "nanoGPT's data order draws by batch_size, which --micro_batch=auto would change",
                where="micro_batch = 'auto', data_order = 'nanogpt'",
                expected="--data_order=shuffle, or a --batch_size of your own",
            )

    @property
    def tokens_per_iter(self) -> int:
        """Tokens one optimizer step sees, over all ranks."""
        return self.data.gradient_accumulation_steps * self.data.batch_size * self.data.block_size

    def shape(self, vocab_size: int) -> GPTConfig:
        """The model to build for this vocabulary, with data.block_size as its context."""
        return GPTConfig(block_size=self.data.block_size, **{**vars(self.model), "vocab_size": vocab_size})

    def flat(self) -> dict[str, Any]:
        """{flat name: value} over all sections, in order; nanoGPT's checkpoint `config`."""
        return {key: getattr(getattr(self, section), key) for key, section in SECTION_OF.items()}

    def replace(self, **changes: Any) -> "Config":
        """A copy with flat names changed, checked again."""
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            by_section.setdefault(SECTION_OF[key], {})[key] = value
        return dataclasses.replace(
            self,
            **{s: dataclasses.replace(getattr(self, s), **values) for s, values in by_section.items()},
        )


def present_setting(key: str, value: Any) -> tuple[str, Any]:
    """(key, value) of a file's setting under its present name: recompute_gelu became recompute."""
    if key == "recompute_gelu" and isinstance(value, bool):
        return "recompute", "mlp" if value else "none"
    return key, value


SECTION_OF: dict[str, str] = {
    option.name: section.name
    for section in dataclasses.fields(Config)
    for option in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
}
