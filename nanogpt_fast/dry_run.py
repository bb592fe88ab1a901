"""--dry_run: the resolved configuration, and what a run of it asks for."""

from nanogpt_fast import distributed
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.splits import dataset_folder
from nanogpt_fast.hardware import flops_per_token, memory_estimate, resolve_peak
from nanogpt_fast.ops import LOGITS_ROWS, REFERENCE, select_ops
from nanogpt_fast.restore import restore, shape_of
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.cli import to_toml
from nanogpt_fast.settings.config import Config
from nanogpt_fast.weights.canonical import GPT2_PADDED


def describe(config: Config) -> str:
    """--dry_run: the resolved configuration, and what it asks for."""
    folder = dataset_folder(config.data)
    meta = read_meta(folder) if folder else None
    known = meta.vocab_size if meta and meta.tokenizer.get("kind") != "gpt2" else GPT2_PADDED
    shape, source = config.shape(config.model.vocab_size or known), "a new model"
    if config.run.init_from != "scratch":
        restored = restore(config.run.init_from, config.run.out_dir, config.data.data_dir)
        shape, source = shape_of(config, restored, None, lambda _: None), restored.source
    device = distributed.resolve_device(config.system.device)
    ops = select_ops(config.system.kernels, device.type)
    dtype = distributed.resolve_dtype(config.system.dtype, device)
    flops = flops_per_token(shape)["nanogpt"]
    memory = memory_estimate(
        shape,
        config.data.batch_size,
        dtype.itemsize,
        residual_bytes=4 if config.system.residual_dtype == "float32" else None,
        recompute_gelu=config.system.recompute_gelu and ops.mlp is not REFERENCE.mlp,
        logits_rows=None if ops.linear_cross_entropy is REFERENCE.linear_cross_entropy else LOGITS_ROWS,
    )
    peak, peak_source = resolve_peak(device, dtype)
    rows = [
        f"model           {source}: {shape.num_params() / 1e6:,.2f}M parameters, vocab_size {shape.vocab_size:,}",
        f"memory          {sum(memory.values()) / 2**30:.2f} GiB estimated: "
        + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in memory.items()),
        f"device          {device}, {str(dtype).removeprefix('torch.')}, peak {peak_source}",
    ]
    if not config.run.eval_only:
        batches = BatchSchedule.of(config.data)
        tokens, first = batches.tokens_before(config.optim.max_iters + 1), batches.tokens_before(1)
        ramp = f"{first:,}, growing to " if config.data.batch_ramp else ""
        rows.append(f"tokens          {ramp}{config.tokens_per_iter:,} an iteration, {tokens:,} in all")
        rows.append(f"compute         {flops / 1e9:.3f} GFLOP a token, {flops * tokens / 1e15:,.3f} PFLOP in all")
        if peak:
            rows.append(
                f"time            {flops * tokens / peak / 3600:.2f} hours and more on one such device (MFU 100%)"
            )
    return to_toml(config.replace(dry_run=False)) + "\n" + "\n".join(f"# {row}" for row in rows)
