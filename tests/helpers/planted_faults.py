"""Faults of the trainer that tests/test_planted_faults.py plants, by file; those of the kernels have a file beside."""

from typing import NamedTuple


class Fault(NamedTuple):
    """old, which stands once in the file, becomes new; then some test of `tests`, pytest's arguments, must fail."""

    what: str
    old: str
    new: str
    tests: str


FAULTS: dict[str, list[Fault]] = {
    "nanogpt_fast/model.py": [
        Fault(
            "LayerNorm's eps is ten times as small",
            "EPS = 1e-5",
            "EPS = 1e-6",
            "tests/test_model.py -k test_logits_are_gpt2s",
        ),
        Fault(
            "two dropouts share a site",
            "self.site = 1 + 3 * index",
            "self.site = 1 + 2 * index",
            "tests/test_model.py -k test_every_dropout_has_its_own_site",
        ),
        Fault(
            "residual projections are drawn too wide",
            "std / math.sqrt(2 * self.config.n_layer)",
            "std / math.sqrt(self.config.n_layer)",
            "tests/test_model.py -k test_init_is_nanogpts",
        ),
        Fault(
            "the cache is full one token early",
            "if idx.size(1) > c.block_size:",
            "if idx.size(1) >= c.block_size:",
            "tests/test_model_generate.py -k test_greedy_with_the_cache",
        ),
        Fault(
            "padding ids may be drawn",
            "logits = logits[:, :valid_vocab].to",
            "logits = logits.to",
            "tests/test_model_generate.py -k test_padded_vocabulary_is_never_drawn",
        ),
        Fault(
            "the end of text belongs to the next document",
            "return ends.cumsum(-1, dtype=torch.int32) - ends",
            "return ends.cumsum(-1, dtype=torch.int32)",
            "tests/ops/test_document_mask.py -k test_the_ids_count",
        ),
    ],
    "nanogpt_fast/step.py": [
        Fault(
            "the gradient is a rank's mean, not all ranks'",
            "(micro_batches * B * T)",
            "(A * B * T)",
            "tests/test_distributed.py -k test_two_ranks_train_what_one_does",
        ),
        Fault(
            "a rank's dropout counters overlap the next one's",
            "world.rank * A)",
            "world.rank)",
            "tests/test_step.py -k test_dropout_counters_do_not_depend",
        ),
        Fault(
            "the loss is summed over ranks",
            "report[LOSS] /= world.size",
            "report[LOSS] /= 1",
            "tests/commands/test_train_ranks.py -k test_two_ranks_train_as_one",
        ),
        Fault(
            "an update that was broken off looks whole",
            "self.whole = False",
            "self.whole = True",
            "tests/commands/test_train_faults.py -k test_an_update_that_was_broken_off",
        ),
        Fault(
            "the loss is not divided by the micro-batches",
            "(self._loss / A)",
            "(self._loss / 1)",
            "tests/test_step.py -k test_loss_is_this_ranks_mean",
        ),
    ],
    "nanogpt_fast/optim.py": [
        Fault(
            "vectors decay",
            "weight_decay if len(shape) > 1 else 0.0",
            "weight_decay if len(shape) > 0 else 0.0",
            "tests/test_optim.py -k test_decay_is_nanogpts_rule",
        ),
        Fault(
            "the loss scale grows one step late",
            "grow = self.good_steps == self.GROWTH_INTERVAL",
            "grow = self.good_steps > self.GROWTH_INTERVAL",
            "tests/test_optim.py -k test_loss_scale",
        ),
        Fault(
            "the norm is reported with the loss scale",
            "norm = scaled / scalars[LOSS_SCALE]",
            "norm = scaled * 1.0",
            "tests/test_optim.py -k test_norm_is_reported",
        ),
        Fault(
            "the resumed step count is 0",
            "self.scalars[STEP] = numbers[\"optimizer_step\"]",
            "self.scalars[STEP] = 0.0",
            "tests/test_optim.py -k test_state_round_trip",
        ),
    ],
    "nanogpt_fast/guards.py": [
        Fault(
            "the window is full one loss late",
            "self.seen[0] >= len(self.losses)",
            "self.seen[0] > len(self.losses)",
            "tests/test_guards.py -k test_refuses_what_numpy_finds",
        ),
        Fault(
            "the ring is saved newest first",
            "losses[at:] + losses[:at]",
            "losses[:at] + losses[at:]",
            "tests/test_guards.py -k 'resumed or window'",
        ),
    ],
    "nanogpt_fast/graphs.py": [
        Fault(
            "the capture comes one call late",
            "if self._calls < WARM_UP:",
            "if self._calls <= WARM_UP:",
            "tests/test_graphs.py",
        ),
    ],
    "nanogpt_fast/schedule.py": [
        Fault(
            "the warm-up ends one iteration late",
            "if it < config.warmup_iters:",
            "if it <= config.warmup_iters:",
            "tests/test_schedule.py",
        ),
        Fault(
            "the warm-up begins at 0",
            "(it + 1) / (config.warmup_iters + 1)",
            "it / config.warmup_iters",
            "tests/test_schedule.py",
        ),
        Fault(
            "the decay ends one iteration early",
            "if it > end:",
            "if it >= end:",
            "tests/test_schedule.py",
        ),
        Fault(
            "wsd decays from the warm-up on",
            "if config.schedule == \"wsd\" else",
            "if config.schedule == \"cosine\" else",
            "tests/test_schedule.py",
        ),
        Fault(
            "a ramp is one iteration ahead",
            "step * (it * (",
            "step * ((it + 1) * (",
            "tests/test_schedule.py",
        ),
        Fault(
            "a ramp's iterations are summed one too many",
            "count * (count - 1) // 2",
            "count * (count + 1) // 2",
            "tests/test_schedule.py",
        ),
    ],
    "nanogpt_fast/scoring.py": [
        Fault(
            "bits are nats",
            "self.nll / math.log(2.0) / self.text_bytes",
            "self.nll / self.text_bytes",
            "tests/test_scoring.py -k test_bits_per_byte",
        ),
        Fault(
            "a file's last target is masked",
            "position >= valid[:, None]",
            "position >= valid[:, None] - 1",
            "tests/test_scoring.py -k test_the_whole_split",
        ),
        Fault(
            "overlapping windows miss a token of context",
            "start = max(0, end - block_size)",
            "start = max(0, end - block_size + 1)",
            "tests/test_scoring.py -k test_overlapping_windows",
        ),
    ],
    "nanogpt_fast/hardware.py": [
        Fault(
            "nanoGPT's count takes causal attention",
            "12.0 * L * C * T",
            "6.0 * L * C * T",
            "tests/test_hardware.py -k count_of",
        ),
        Fault(
            "llm.c's count leaves positions out",
            "config.num_params(non_embedding=False) +",
            "config.num_params() +",
            "tests/test_hardware.py -k count_of",
        ),
    ],
    "nanogpt_fast/trainer.py": [
        Fault(
            "the rate is the next iteration's",
            "self.optimizer.set_lr(learning_rate(iteration, ",
            "self.optimizer.set_lr(learning_rate(iteration + 1, ",
            "tests/commands/test_train_figures.py -k test_every_update_has",
        ),
        Fault(
            "a checkpoint's step is one behind",
            "self.keeper.position = self._position(iteration + 1)",
            "self.keeper.position = self._position(iteration)",
            "tests/commands/test_train.py -k test_the_end_of_a_run_is_saved",
        ),
        Fault(
            "a stop is looked at on logged iterations only",
            "                        if iteration > self.start and self._asked(stop):\n                            return self._leave(stop)\n                        self.meter.leave_out(window.reach(iteration, self.meter.step_ms(iteration)))\n                        with span(ranges.ITERATION):\n                            self._evaluate_where_due(iteration, stop)\n                            if self.world.size == 1 and stop():",
            "                        logged = iteration % run.log_interval == 0\n                        if iteration > self.start and logged and self._asked(stop):\n                            return self._leave(stop)\n                        self.meter.leave_out(window.reach(iteration, self.meter.step_ms(iteration)))\n                        with span(ranges.ITERATION):\n                            self._evaluate_where_due(iteration, stop)\n                            if self.world.size == 1 and logged and stop():",
            "tests/commands/test_train_faults.py -k test_a_stop_is_heeded",
        ),
        Fault(
            "one rank's signal stops nobody",
            "self._votes += report.stop",
            "self._votes += 0.0",
            "tests/commands/test_train_ranks.py -k test_a_signal_to_one_rank",
        ),
        Fault(
            "bad steps are tolerated one too long",
            "if in_a_row >= self.config.optim.max_bad_steps:",
            "if in_a_row > self.config.optim.max_bad_steps:",
            "tests/commands/test_train_guards.py -k test_too_many",
        ),
        Fault(
            "no evaluation is better than a better one",
            "improved = val is None or val < keeper.best_val_loss",
            "improved = val is None or val > keeper.best_val_loss",
            "tests/commands/test_train.py -k test_saves_only_improvements",
        ),
        Fault(
            "every evaluation draws the same batches",
            "(run.seed << 20) + iteration * world.size + world.rank",
            "(run.seed << 20) + world.rank",
            "tests/commands/test_train_figures.py -k test_each_evaluation_draws",
        ),
        Fault(
            "the end of a run is not saved",
            "elif saved < end - 1 and",
            "elif saved < end - 2 and",
            "tests/commands/test_train.py -k test_the_end_of_a_run_is_saved",
        ),
        Fault(
            "evaluations count as training",
            "self.meter.restart()\n        self.loader.take_wait()",
            "self.loader.take_wait()",
            "tests/commands/test_train_figures.py -k test_an_evaluation_is_no_training_time",
        ),
    ],
    "nanogpt_fast/keeper.py": [
        Fault(
            "everything is healthy",
            "if not (self.step.whole and all(map(math.isfinite, losses))):",
            "if False:",
            "tests/commands/test_train_faults.py -k 'finite or broken_off'",
        ),
        Fault(
            "weights that are not finite are healthy",
            "return bool(torch.isfinite(self.step.optimizer.flat.master.sum()))",
            "return True",
            "tests/commands/test_train_figures.py -k test_weights_that_are_not_finite",
        ),
        Fault(
            "the best loss is forgotten",
            "\"best_val_loss\": None if math.isinf(self.best_val_loss) else self.best_val_loss,",
            "\"best_val_loss\": None,",
            "tests/commands/test_resume_faults.py -k test_an_unbeaten_best_loss",
        ),
        Fault(
            "the samples seen are forgotten",
            "            \"samples_seen\": samples,\n",
            "",
            "tests/commands/test_train_figures.py -k test_a_resume_with_another_batch",
        ),
        Fault(
            "the number of updates is forgotten",
            "            **numbers,\n",
            "",
            "tests/commands/test_train_figures.py -k test_a_resume_goes_on_with_the_number",
        ),
        Fault(
            "the guard's losses are forgotten",
            "            **self.step.guard.state_dict(),\n",
            "",
            "tests/commands/test_train_guards.py -k test_a_resumed_run",
        ),
        Fault(
            "nanoGPT's draws are forgotten",
            "state[\"draws\"] = draws.to_json()",
            "pass",
            "tests/commands/test_resume_faults.py -k test_nanogpts_order_goes_on",
        ),
        Fault(
            "the time that has passed is forgotten",
            "            \"elapsed_s\": self._elapsed(),\n",
            "",
            "tests/commands/test_resume_faults.py -k test_elapsed_goes_on",
        ),
        Fault(
            "an old evaluation's loss is this checkpoint's",
            "if self.evaluated and self.evaluated[0] == step else None",
            "if self.evaluated else None",
            "tests/commands/test_train.py -k test_a_stopped_step",
        ),
        Fault(
            "saves may fail once more",
            "self._failed >= MAX_FAILED_SAVES",
            "self._failed > MAX_FAILED_SAVES",
            "tests/commands/test_train_figures.py -k test_two_saves_may_fail",
        ),
    ],
    "nanogpt_fast/meter.py": [
        Fault(
            "MFU is all ranks'",
            "flops * tokens / seconds / self._ranks",
            "flops * tokens / seconds",
            "tests/commands/test_resume_faults.py -k test_mfu_is_a_ranks_share",
        ),
        Fault(
            "the time left has no evaluations",
            "+ evaluations * self._evaluating / max(self._evaluations, 1.0)",
            "",
            "tests/commands/test_resume_faults.py -k test_the_time_left",
        ),
        Fault(
            "milliseconds are seconds",
            "\"time_ms\": seconds * 1e3",
            "\"time_ms\": seconds",
            "tests/commands/test_resume_faults.py -k test_mfu_is_a_ranks_share",
        ),
        Fault(
            "a rate's tokens are the next iterations'",
            "tokens_before(iteration + 1 - n)) / n",
            "tokens_before(iteration - n)) / n",
            "tests/commands/test_train.py -k test_figures_follow_a_batch_ramp",
        ),
    ],
    "nanogpt_fast/train.py": [
        Fault(
            "all ranks read rank 0's batches",
            "rank=world.rank,",
            "rank=0,",
            "tests/commands/test_train_ranks.py -k test_two_ranks_train_as_one",
        ),
        Fault(
            "a resumed run begins with the first samples",
            "resumed.state.get(\"samples_seen\", samples) if resumed else 0",
            "0",
            "tests/commands/test_resume.py -k test_half_and_resume",
        ),
    ],
    "nanogpt_fast/parts.py": [
        Fault(
            "a smaller block takes the last positions' moments",
            "t[:rows] if k.endswith(\"wpe.weight\")",
            "t[-rows:] if k.endswith(\"wpe.weight\")",
            "tests/commands/test_resume_faults.py -k test_the_moments_of_the_first",
        ),
        Fault(
            "a finetuning run takes the moments over",
            "elif config.run.init_from == \"resume\" and restored",
            "elif restored",
            "tests/commands/test_resume.py -k test_training_from_the_best",
        ),
        Fault(
            "ranks begin with weights of their own",
            "world.broadcast_(flat.master)",
            "pass",
            "tests/commands/test_train_ranks.py -k test_two_ranks_train_as_one",
        ),
    ],
    "nanogpt_fast/distributed.py": [
        Fault(
            "rank 1 is the main one",
            "return self.rank == 0",
            "return self.rank == 1",
            "tests/commands/test_train_figures.py -k test_the_first_rank",
        ),
        Fault(
            "accumulation need not divide by the ranks",
            "if count % size:",
            "if count < size:",
            "tests/test_distributed.py -k must_divide",
        ),
        Fault(
            "a vote of one is lost",
            "return bool(votes.item())",
            "return bool(votes.item() == self.size)",
            "tests/test_distributed.py -k test_two_ranks_train_what_one_does",
        ),
    ],
    "nanogpt_fast/restore.py": [
        Fault(
            "resume takes weights without moments",
            "return _from_native(out_dir, data_dir, optimizer)",
            "return _from_native(out_dir, data_dir, False)",
            "tests/test_restore.py -k test_resume_takes_the_newest",
        ),
        Fault(
            "a tokenizer may have one id too many",
            "if tokenizer.vocab_size > vocab_size:",
            "if tokenizer.vocab_size > vocab_size + 1:",
            "tests/test_restore.py -k test_a_tokenizer_too_large",
        ),
    ],
    "nanogpt_fast/verdict.py": [
        Fault(
            "a verdict holds for any residual type",
            "for name in (\"dtype\", \"wide_residual\", ",
            "for name in (\"dtype\", ",
            "tests/test_verify.py -k test_a_verdict_is_kept",
        ),
        Fault(
            "a verdict holds for any number of rows",
            "        \"rows\": min(setup.rows, proof.ROWS),\n",
            "",
            "tests/test_verify.py -k test_a_verdict_is_kept",
        ),
    ],
    "nanogpt_fast/tuned.py": [
        Fault(
            "kept rows hold for any kernel",
            "        \"kernels\": kernel_sources(),\n",
            "",
            "tests/test_tuned.py -k test_any_other_fact",
        ),
        Fault(
            "kept rows hold beside any mask",
            "f\"{setup.dtype}{products}{masks}\"",
            "f\"{setup.dtype}{products}\"",
            "tests/test_tuned.py -k test_rows_are_for_the_dtype",
        ),
    ],
    "nanogpt_fast/run/manifest.py": [
        Fault(
            "what is written is not synced",
            "os.fsync(file.fileno())",
            "pass",
            "tests/run/test_checkpoint_crash.py -k test_everything_is_on_the_disk",
        ),
        Fault(
            "the manifest comes first",
            "    with ThreadPoolExecutor(len(contents)) as pool:\n        entries = list",
            "    (folder / MANIFEST).touch()\n    with ThreadPoolExecutor(len(contents)) as pool:\n        entries = list",
            "tests/run/test_checkpoint.py -k test_layout_on_disk",
        ),
        Fault(
            "a hash is not compared",
            "if found != expected:",
            "if len(found) != len(expected):",
            "tests/run/test_checkpoint_damage.py -k test_every_single_byte",
        ),
        Fault(
            "a link passes for a file",
            "info = path.lstat()",
            "info = path.stat()",
            "tests/run/test_checkpoint_damage.py -k test_links_and_pipes",
        ),
    ],
    "nanogpt_fast/run/rundir.py": [
        Fault(
            "a folder is renamed before it is synced",
            "    sync(tmp)\n    if os.path.lexists(final):",
            "    if os.path.lexists(final):",
            "tests/run/test_checkpoint_crash.py -k test_everything_is_on_the_disk",
        ),
        Fault(
            "the rename is not synced",
            "os.rename(tmp, final)\n    sync(final.parent)",
            "os.rename(tmp, final)",
            "tests/run/test_checkpoint_crash.py -k test_everything_is_on_the_disk",
        ),
    ],
    "nanogpt_fast/run/checkpoint.py": [
        Fault(
            "one checkpoint fewer is kept",
            "*list(losses)[-keep_last:]",
            "*list(losses)[-keep_last + 1 :]",
            "tests/run/test_checkpoint.py -k test_the_newest_and_the_best_stay",
        ),
        Fault(
            "the earlier of equals is the best",
            "key=lambda s: (losses[s], -s)",
            "key=lambda s: (losses[s], s)",
            "tests/run/test_checkpoint.py -k test_the_newest_and_the_best_stay",
        ),
        Fault(
            "the resumed step is set aside too",
            "if s > step}",
            "if s >= step}",
            "tests/run/test_checkpoint.py -k test_an_abandoned_future",
        ),
        Fault(
            "the best is pruned",
            "keep = {_best_step(losses), *",
            "keep = {*",
            "tests/run/test_checkpoint.py -k test_the_newest_and_the_best_stay",
        ),
    ],
    "nanogpt_fast/run/log.py": [
        Fault(
            "a row of the resumed step is kept",
            "_iteration_of(line) >= step",
            "_iteration_of(line) > step",
            "tests/commands/test_resume_faults.py -k test_rows_of_steps",
        ),
        Fault(
            "rows that found no room are dropped",
            "self._waiting = self._waiting[self._file.write(self._waiting) :]",
            "data, self._waiting = self._waiting, b''\n                self._file.write(data)",
            "tests/run/test_log.py -k test_rows_that_found_no_room",
        ),
        Fault(
            "NaN is written as it is",
            "None if _not_finite(v) else v",
            "v",
            "tests/run/test_log.py -k test_lines_and_rows",
        ),
    ],
    "nanogpt_fast/run/stopping.py": [
        Fault(
            "the exit code is the signal's number",
            "return 128 + self.received",
            "return self.received",
            "tests/run/test_stopping.py",
        ),
        Fault(
            "a second Ctrl-C is waited for",
            "if self.received == signal.SIGINT == number:",
            "if False:",
            "tests/run/test_stopping.py -k test_a_second_ctrl_c",
        ),
    ],
    "nanogpt_fast/data/token_format.py": [
        Fault(
            "uint32 shards are read as uint16",
            "LLMC_UINT32: (7, \"<u4\")",
            "LLMC_UINT32: (7, \"<u2\")",
            "tests/data/test_token_format.py -k test_every_layout",
        ),
        Fault(
            "tokens are counted in bytes",
            "(identity[0] - offset) // size, identity)",
            "identity[0] - offset, identity)",
            "tests/data/test_token_format.py -k test_every_layout",
        ),
    ],
    "nanogpt_fast/data/token_writer.py": [
        Fault(
            "a journal promises what is not synced",
            "                split.sync()\n",
            "                pass\n",
            "tests/data/test_token_writer.py -k test_what_a_journal_promises",
        ),
        Fault(
            "meta.json comes before the files' names are synced",
            "            sync(self.folder)\n            write_json(self.folder / \"meta.json\", meta.to_json())",
            "            write_json(self.folder / \"meta.json\", meta.to_json())\n            sync(self.folder)",
            "tests/data/test_token_writer.py -k test_what_is_renamed",
        ),
        Fault(
            "a shard's header counts bytes",
            "(self._file.tell() - HEADER_BYTES) // TOKEN_BYTES",
            "self._file.tell() - HEADER_BYTES",
            "tests/data/test_token_writer.py -k test_any_writes_give",
        ),
    ],
    "nanogpt_fast/data/orders.py": [
        Fault(
            "every epoch has one order",
            "_keys(self.seed, epoch, 1 + ROUNDS)",
            "_keys(self.seed, 0, 1 + ROUNDS)",
            "tests/data/test_orders.py -k test_epochs_differ",
        ),
        Fault(
            "the cuts never move",
            "self.block_size + shift.astype(np.int64)",
            "self.block_size",
            "tests/data/test_orders.py -k test_epochs_differ",
        ),
        Fault(
            "nanoGPT's draws reach one token less",
            "max(0, file.n_tokens - block_size) for",
            "max(0, file.n_tokens - block_size - 1) for",
            "tests/data/test_orders.py -k test_draws_are",
        ),
        Fault(
            "a window too long by one passes",
            "if longest.n_tokens <= block_size:",
            "if longest.n_tokens < block_size:",
            "tests/data/test_orders.py -k test_too_few_tokens",
        ),
    ],
    "nanogpt_fast/data/loader.py": [
        Fault(
            "ranks read one micro-batch apart, not their share",
            "(sample + self._rank * rows)",
            "(sample + self._rank * self._batch_size)",
            "tests/data/test_loader.py -k test_any_number_of_ranks_sees_one_order",
        ),
        Fault(
            "an id of vocab_size passes",
            "if ids.max() < vocab_size:",
            "if ids.max() <= vocab_size:",
            "tests/data/test_loader.py -k test_id_outside",
        ),
        Fault(
            "a negative id passes",
            "out if out.dtype == np.uint16 else out.view(np.uint32)",
            "out",
            "tests/data/test_loader.py -k test_negative_id",
        ),
        Fault(
            "samples seen are a rank's",
            "self.samples_seen += self._accumulation(self._iteration) * self._batch_size",
            "self.samples_seen += self._micro_batches(self._iteration) * self._batch_size",
            "tests/data/test_loader.py -k test_any_number_of_ranks_sees_one_order",
        ),
        Fault(
            "a batch of an evaluation crosses shards",
            "np.searchsorted(ends, drawn, side=\"right\")",
            "np.searchsorted(ends, drawn, side=\"left\")",
            "tests/data/test_loader_eval.py -k test_random_batches_of_several",
        ),
    ],
    "nanogpt_fast/data/tokens.py": [
        Fault(
            "a read begins at a byte, not a token",
            "self.files[index].offset + first * size",
            "self.files[index].offset + first",
            "tests/data/test_tokens.py -k test_rows_of_several_files",
        ),
        Fault(
            "the end of a file is not in its fingerprint",
            "self._read(index, total - len(tail), memoryview(tail))",
            "self._read(index, 0, memoryview(tail))",
            "tests/data/test_tokens.py -k fingerprint",
        ),
    ],
    "nanogpt_fast/data/text_files.py": [
        Fault(
            "a byte-order mark is text",
            "text.removeprefix(\"\\ufeff\")",
            "text",
            "tests/data/test_text_files.py -k test_a_byte_order_mark",
        ),
        Fault(
            "line ends stay as they are",
            "io.IncrementalNewlineDecoder(None, translate=True)",
            "io.IncrementalNewlineDecoder(None, translate=False)",
            "tests/data/test_documents.py -k test_line_ends",
        ),
    ],
    "nanogpt_fast/data/encode.py": [
        Fault(
            "val is what train is",
            "return draw(document, seed) < val_fraction * 2**64",
            "return draw(document, seed) >= val_fraction * 2**64",
            "tests/data/test_encode.py -k test_the_split_by_documents",
        ),
        Fault(
            "the split ignores the seed",
            "f\"{seed}:{document}\"",
            "f\"{document}\"",
            "tests/data/test_encode.py -k test_the_split_by_documents",
        ),
    ],
    "nanogpt_fast/data/tokenizer.py": [
        Fault(
            "ids of characters are one off",
            "self._id_of[codes] = np.arange(len(codes))",
            "self._id_of[codes] = np.arange(len(codes)) + 1",
            "tests/data/test_tokenizer.py -k test_characters_round_trip",
        ),
    ],
    "nanogpt_fast/generate.py": [
        Fault(
            "what stops a text is given out",
            "if stop_at_eot and int(token) == tokenizer.eot:",
            "if stop_at_eot and int(token) > (tokenizer.eot or 0):",
            "tests/commands/test_sample.py -k test_stop_at_eot",
        ),
    ],
    "nanogpt_fast/weights/huggingface.py": [
        Fault(
            "the square projection is not transposed",
            "\"attn.c_attn.weight\", \"attn.c_proj.weight\", ",
            "\"attn.c_attn.weight\", ",
            "tests/weights/test_huggingface.py -k test_import_gives_their_logits",
        ),
        Fault(
            "tanh is exported as the exact GELU",
            "{\"gelu\": \"gelu\", \"gelu_tanh\": \"gelu_new\"}",
            "{\"gelu\": \"gelu\", \"gelu_tanh\": \"gelu\"}",
            "tests/weights/test_huggingface.py -k 'export_gives_our_logits or round_trip'",
        ),
    ],
    "nanogpt_fast/weights/llmc.py": [
        Fault(
            "padding rows stay",
            "tensors[\"transformer.wte.weight\"][:V]",
            "tensors[\"transformer.wte.weight\"][:]",
            "tests/weights/test_llmc.py -k 'round_trip or padding'",
        ),
        Fault(
            "the padded vocabulary is V",
            "math.ceil(V / VOCAB_MULTIPLE) * VOCAB_MULTIPLE",
            "V",
            "tests/weights/test_llmc.py -k 'header_and or padding'",
        ),
        Fault(
            "a layer's tensors stand together",
            "for name in _BLOCK for i in range(n_layer)]",
            "for i in range(n_layer) for name in _BLOCK]",
            "tests/weights/test_llmc.py -k test_header_and_every",
        ),
    ],
    "nanogpt_fast/weights/nanogpt_ckpt.py": [
        Fault(
            "the optimizer's groups are swapped",
            "enumerate([*decayed, *rest])",
            "enumerate([*rest, *decayed])",
            "tests/weights/test_nanogpt_ckpt.py -k test_optimizer_goes_on",
        ),
        Fault(
            "an old optimizer's names are in the new order",
            "orders = _group_sizes(saved), (optimizer_names(config), old_optimizer_names(config))",
            "orders = _group_sizes(saved), (optimizer_names(config),)",
            "tests/weights/test_old_nanogpt.py -k test_old_forms_are_read",
        ),
    ],
    "nanogpt_fast/settings/nanogpt_config.py": [
        Fault(
            "a setting that other lines use is a helper",
            "helpers = names.keys() & used - set(names if known is None else known)",
            "helpers = names.keys() & used",
            "tests/settings/test_settings_faults.py tests/settings/test_nanogpt_config.py -k 'helper or folded'",
        ),
        Fault(
            "a huge power is computed",
            "a.bit_length() * b > 2 * MAX_BITS",
            "False",
            "tests/settings/test_nanogpt_config.py -k test_nothing_a_file_says",
        ),
    ],
    "nanogpt_fast/settings/config.py": [
        Fault(
            "a head may be cut",
            "if self.n_embd % self.n_head:",
            "if self.n_embd < self.n_head:",
            "tests/settings/test_config.py -k test_heads",
        ),
        Fault(
            "wsd's decay begins an iteration late",
            "self.lr_decay_iters - round(",
            "1 + self.lr_decay_iters - round(",
            "tests/test_schedule.py -k wsd",
        ),
        Fault(
            "dropout may be 1",
            "0.0 <= self.dropout < 1.0",
            "0.0 <= self.dropout <= 1.0",
            "tests/settings/test_config.py -k test_a_value_out_of_range",
        ),
    ],
    "nanogpt_fast/errors.py": [
        Fault(
            "no near name is near enough",
            "n=3, cutoff=0.6",
            "n=3, cutoff=0.99",
            "tests/settings/test_cli.py -k test_a_wrong_command_line",
        ),
        Fault(
            "C1 controls reach the terminal",
            "\\x7f-\\x9f",
            "\\x7f",
            "tests/commands/test_commands_faults.py tests/commands/test_command.py -k 'terminal or console'",
        ),
        Fault(
            "a damaged checkpoint ends in the data's exit code",
            "locked or does not fit the run.\"\"\"\n\n    exit_code = 4",
            "locked or does not fit the run.\"\"\"\n\n    exit_code = 3",
            "tests/commands/test_command.py tests/weights/test_convert.py -k 'exit'",
        ),
    ],
    "nanogpt_fast/files.py": [
        Fault(
            "a pipe is read",
            "if stat.S_ISREG(mode):",
            "if not stat.S_ISDIR(mode):",
            "tests/settings/test_settings_faults.py -k test_a_pipe_or_a_device",
        ),
        Fault(
            "a large file is read",
            "if size > limit:",
            "if size < 0:",
            "tests/settings/test_settings_faults.py -k test_a_huge_file",
        ),
        Fault(
            "a write has its name before it is on the disk",
            "        file.flush()\n        os.fsync(file.fileno())\n    os.replace(temporary, path)",
            "        file.flush()\n    os.replace(temporary, path)",
            "tests/test_files.py",
        ),
        Fault(
            "NaN passes for JSON",
            "parse_constant=_no_number",
            "parse_constant=float",
            "tests/data/test_dataset_faults.py tests/weights/test_weights_faults.py -k 'impossible or strange'",
        ),
    ],
    "nanogpt_fast/command.py": [
        Fault(
            "a signal's exit code is the signal's number",
            "return 128 + number",
            "return number",
            "tests/commands/test_command.py -k test_signals_unwind",
        ),
    ],
}
